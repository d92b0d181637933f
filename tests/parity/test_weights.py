"""Ladder A: Hugging Face -> stages -> Hugging Face, to the bit; and what is wrong with a directory is named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mistral3ForConditionalGeneration

from ray_ministral.errors import ModelError
from ray_ministral.model.architecture import Architecture, load_config
from ray_ministral.model.checkpoint import Checkpoint, canonical_name, expected_shapes, hub_name
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.weights import finish_save, load_chunk, read_tensors, save_chunk, tensor_slots
from ray_ministral.pipeline.partition import Partition, stage_parameters
from tests.parity.small_models import (
    mixed_rows,
    named_weights,
    pad_rows,
    quiet_transformers,
    save_directory,
    small_config,
    small_model,
)

SPLITS = [(4,), (2, 2), (1, 3), (2, 1, 1), (1, 1, 1, 1)]
EMBEDDING = "model.language_model.embed_tokens.weight"


def load_stages(folder: Path, split: tuple[int, ...], **options: Any) -> list[Ministral3Model]:
    return [load_chunk(folder, stage, **options) for stage in Partition.from_layers(split, sum(split)).stages]


def all_tensors(chunks: list[Ministral3Model]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        for name, tensor in read_tensors(chunk, lambda parameter: parameter.data):
            assert name not in found, f"{name} is in two stages"
            found[name] = tensor
    return found


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def save_stages(chunks: list[Ministral3Model], folder: Path) -> None:
    weight_map: dict[str, str] = {}
    for part, chunk in enumerate(chunks):
        weight_map |= save_chunk(chunk, folder, part, len(chunks))
    finish_save(chunks[0].hf_config, folder, weight_map)


def open_with_hugging_face(folder: Path, **options: Any) -> Any:
    with quiet_transformers():
        model, info = Mistral3ForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, **options
        )
    assert not any(info.values()), info
    return model.eval()


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a single-file directory."""
    path = folder / "model.safetensors"
    # Clones: tensors that share memory cannot be saved.
    save_file({k: v.contiguous().clone() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def copy(directory: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a shared directory that a test may spoil."""

    def make(**arguments: Any) -> Path:
        return Path(shutil.copytree(directory(**arguments), tmp_path / "copy"))

    return make


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_round_trip(split: tuple[int, ...], tied: bool, reference: Any, directory: Any, tmp_path: Path) -> None:
    theirs = named_weights(reference(tied=tied))
    chunks = load_stages(directory(tied=tied), split)
    ours = all_tensors(chunks)
    if tied and len(split) > 1:
        assert torch.equal(ours.pop("lm_head.weight"), theirs[EMBEDDING])
    assert_same(ours, theirs)

    save_stages(chunks, tmp_path)
    assert Checkpoint.open(tmp_path).has_output_layer != tied, "a tied output layer is saved once, as the embedding"
    again = open_with_hugging_face(tmp_path)
    assert_same(named_weights(again), theirs)
    assert again.config.tie_word_embeddings == tied
    batch = pad_rows(mixed_rows())
    with torch.no_grad():
        assert torch.equal(again(**batch.arguments).logits, reference(tied=tied)(**batch.arguments).logits)


def test_what_we_save_we_load(directory: Any, tmp_path: Path) -> None:
    save_stages(load_stages(directory(), (1, 3)), tmp_path)
    Checkpoint.open(tmp_path).check(load_config(tmp_path))
    assert_same(all_tensors(load_stages(tmp_path, (2, 1, 1))), all_tensors([load_chunk(directory())]))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_each_stage_holds_its_own_and_nothing_else(tied: bool, directory: Any) -> None:
    folder = directory(tied=tied)
    arch = Architecture.from_config(load_config(folder))
    for split in SPLITS:
        for stage, chunk in zip(Partition.from_layers(split, 4).stages, load_stages(folder, split), strict=True):
            names = tensor_slots(chunk).keys()
            layers = {name.split(".")[3] for name in names if ".language_model.layers." in name}
            assert layers == {str(layer) for layer in stage.layers}
            assert any(name.startswith("model.vision_tower.") for name in names) == stage.is_first
            assert any(name.startswith("model.multi_modal_projector.") for name in names) == stage.is_first
            assert (EMBEDDING in names) == stage.is_first
            assert ("model.language_model.norm.weight" in names) == stage.is_last
            parameters = dict(chunk.named_parameters())
            assert sum(parameter.numel() for parameter in parameters.values()) == stage_parameters(arch, stage)
            covered = {id(slot.parameter) for slot in tensor_slots(chunk).values()}
            assert covered == {id(parameter) for parameter in parameters.values()}, "a parameter without a name"
            assert not any(tensor.is_meta for tensor in [*parameters.values(), *chunk.buffers()])


def test_a_stage_reads_only_its_own_tensors(directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_ministral.model import weights

    read: list[str] = []
    load_tensor = weights._load_tensor

    def spy(stored: Any, *rest: Any) -> None:
        read.append(canonical_name(stored.name))
        load_tensor(stored, *rest)

    monkeypatch.setattr(weights, "_load_tensor", spy)
    for stage in Partition.from_layers((1, 2, 1), 4).stages:
        read.clear()
        chunk = load_chunk(directory(), stage)
        assert sorted(read) == sorted(tensor_slots(chunk))


def test_progress_counts_every_byte(directory: Any) -> None:
    seen: list[tuple[int, int]] = []
    stage = Partition.from_layers((1, 3), 4).stages[1]
    chunk = load_chunk(directory(), stage, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(parameter.nbytes for parameter in chunk.parameters())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}), "every tensor moves it on"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_newer_names(tied: bool, copy: Any, reference: Any) -> None:
    folder = copy(tied=tied)
    stored = load_file(folder / "model.safetensors")
    assert all(not name.startswith("model.") for name in stored), "save_pretrained is known to write the hub's names"
    rewrite(folder, lambda tensors: {canonical_name(name): tensor for name, tensor in tensors.items()})
    assert load_file(folder / "model.safetensors").keys() == named_weights(reference(tied=tied)).keys()
    assert_same(all_tensors([load_chunk(folder)]), named_weights(reference(tied=tied)))


def test_names_go_both_ways(reference: Any, directory: Any) -> None:
    stored = load_file(directory() / "model.safetensors").keys()
    assert {canonical_name(name) for name in stored} == named_weights(reference()).keys()
    assert {hub_name(name) for name in named_weights(reference())} == stored


@pytest.mark.parametrize("split", [(4,), (1, 2, 1)], ids=str)
def test_sharded_files_with_an_index(split: tuple[int, ...], reference: Any, tmp_path: Path) -> None:
    folder = save_directory(reference(), tmp_path / "model", max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert_same(all_tensors(load_stages(folder, split)), named_weights(reference()))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(stored: torch.dtype, wanted: torch.dtype, copy: Any, reference: Any) -> None:
    folder = copy()
    rewrite(folder, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    expected = {name: tensor.to(stored).to(wanted) for name, tensor in named_weights(reference()).items()}
    assert_same(all_tensors(load_stages(folder, (1, 3), dtype=wanted)), expected)


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16], ids=str)
def test_saved_in_the_dtype_that_was_loaded(loaded: torch.dtype, tmp_path: Path) -> None:
    theirs = small_model(small_config()).to(torch.bfloat16)
    folder = save_directory(theirs, tmp_path / "bf16")
    chunks = load_stages(folder, (1, 3), dtype=loaded)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1.0001)  # as training would: what bf16 cannot hold
    save_stages(chunks, tmp_path / "saved")
    again = open_with_hugging_face(tmp_path / "saved")
    assert again.dtype == loaded
    assert_same(named_weights(again), all_tensors(chunks))


def to_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the hub's Instruct checkpoints: linears of the language model in fp8 with scales, the rest in bf16."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".layers." in name and name.startswith("language_model") and name.endswith("proj.weight"):
            scale = (tensor.abs().max() / 448).to(torch.bfloat16)
            result[name] = (tensor / scale.float()).to(torch.float8_e4m3fn)
            result[name + "_scale_inv"] = scale
            result[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.02, dtype=torch.bfloat16)
        else:
            result[name] = tensor.to(torch.bfloat16)
    return result


def say_fp8(config: dict[str, Any]) -> None:
    config["quantization_config"] = {
        "activation_scheme": "static",
        "dequantize": False,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": None,
    }


@pytest.mark.parametrize("rows", [4096, 7])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_fp8(
    wanted: torch.dtype, rows: int, copy: Any, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_ministral.model.weights.DEQUANTIZE_ROWS", rows)
    folder = copy()
    rewrite(folder, to_fp8)
    edit_config(folder, say_fp8)
    stored = load_file(folder / "model.safetensors")
    expected = {}
    for name, tensor in stored.items():
        if name.endswith(".weight"):
            scale = stored.get(name + "_scale_inv", torch.tensor(1.0))
            expected[canonical_name(name)] = (tensor.float() * scale.float()).to(wanted)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) == 4 * 7
    chunks = load_stages(folder, (2, 2), dtype=wanted)
    assert_same(all_tensors(chunks), expected)
    for name, tensor in named_weights(reference()).items():
        torch.testing.assert_close(expected[name].float(), tensor, rtol=0.1, atol=2e-3)

    # What was undone on loading is not claimed when saving.
    save_stages(chunks, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert_same(named_weights(open_with_hugging_face(tmp_path / "saved")), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("merge", [1, 2])
def test_expected_shapes_are_hugging_faces(bias: bool, merge: int) -> None:
    config = small_config(multimodal_projector_bias=bias)
    config.spatial_merge_size = merge
    with torch.device("meta"), quiet_transformers():
        theirs = {name: tuple(p.shape) for name, p in Mistral3ForConditionalGeneration(config).named_parameters()}
    assert expected_shapes(config) == theirs


def test_projector_bias(tmp_path: Path) -> None:
    theirs = small_model(small_config(multimodal_projector_bias=True))
    folder = save_directory(theirs, tmp_path / "model")
    ours = load_chunk(folder)
    assert_same(all_tensors([ours]), named_weights(theirs))
    batch = pad_rows(mixed_rows()[:1])
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch.arguments), theirs(**batch.arguments).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("top", "text"), [(True, True), (False, True), (True, False), (None, True), (None, False)])
def test_the_checkpoint_says_whether_embeddings_are_tied(
    top: bool | None, text: bool, copy: Any, reference: Any
) -> None:
    """Configs disagree with themselves; with an output layer of its own a model is not tied, without one it is."""

    def say(config: dict[str, Any]) -> None:
        config.pop("tie_word_embeddings", None)
        if top is not None:
            config["tie_word_embeddings"] = top
        config["text_config"]["tie_word_embeddings"] = text

    folder = copy()
    edit_config(folder, say)
    assert_same(all_tensors([load_chunk(folder)]), named_weights(reference()))
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if canonical_name(n) != "lm_head.weight"})
    tied = load_chunk(folder)
    assert tied.language_model.output_layer.weight is None or tied.share_embeddings_and_output_weights
    assert "lm_head.weight" not in all_tensors([tied])
    last = load_stages(folder, (2, 2))[1]
    assert torch.equal(all_tensors([last])["lm_head.weight"], named_weights(reference())[EMBEDDING])


# What is wrong with a directory


def problem(folder: Path) -> str:
    """What `ModelError` says on the two ways to meet it: the check before a job, and loading itself."""
    with pytest.raises(ModelError) as before:
        Checkpoint.open(folder).check(load_config(folder))
    with pytest.raises(ModelError) as loading:
        Ministral3Model.from_pretrained(folder)
    assert str(before.value) == str(loading.value)
    return str(before.value)


LAYER_2 = "language_model.model.layers.2"


def test_missing_tensors(copy: Any) -> None:
    folder = copy()
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(f"{LAYER_2}.mlp")})
    message = problem(folder)
    for part in ("gate", "up", "down"):
        assert f"model.language_model.layers.2.mlp.{part}_proj.weight" in message
    assert "missing" in message


def test_missing_output_layer(copy: Any) -> None:
    folder = copy()
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if canonical_name(n) != "lm_head.weight"})
    message = problem(folder)
    assert "lm_head.weight" in message
    assert "tie_word_embeddings" in message


def test_surplus_tensors(copy: Any) -> None:
    folder = copy()
    rewrite(folder, lambda tensors: tensors | {"language_model.model.layers.4.mlp.up_proj.weight": torch.ones(96, 64)})
    assert "surplus tensors: model.language_model.layers.4.mlp.up_proj.weight" in problem(folder)


def test_misshapen_tensors(copy: Any) -> None:
    folder = copy()
    name = f"{LAYER_2}.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors | {name: tensors[name][:16]})
    message = problem(folder)
    assert "model.language_model.layers.2.self_attn.k_proj.weight is [16, 64], wanted [32, 64]" in message


def test_many_problems_are_cut_short(copy: Any) -> None:
    folder = copy()
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if "vision" not in n})
    assert "and 16 more" in problem(folder)


def test_integer_weights(copy: Any) -> None:
    folder = copy()
    name = f"{LAYER_2}.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    assert "model.language_model.layers.2.mlp.up_proj.weight is I8" in problem(folder)


def test_a_tensor_stored_twice(copy: Any) -> None:
    folder = copy()
    name = f"{LAYER_2}.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors | {canonical_name(name): tensors[name]})
    message = problem(folder)
    assert "stored twice" in message
    assert repr(name) in message
    assert repr(canonical_name(name)) in message


def test_fp8_without_scale(copy: Any) -> None:
    folder = copy()
    rewrite(folder, to_fp8)
    rewrite(
        folder, lambda tensors: {n: t for n, t in tensors.items() if n != f"{LAYER_2}.mlp.up_proj.weight_scale_inv"}
    )
    edit_config(folder, say_fp8)
    assert "model.language_model.layers.2.mlp.up_proj.weight" in problem(folder)


def test_fp8_with_a_scale_for_each_block(copy: Any) -> None:
    folder = copy()
    rewrite(folder, to_fp8)
    scale = f"{LAYER_2}.mlp.up_proj.weight_scale_inv"
    rewrite(folder, lambda tensors: tensors | {scale: tensors[scale].expand(2, 1)})
    edit_config(folder, say_fp8)
    message = problem(folder)
    assert scale in message
    assert "[2, 1]" in message


@pytest.mark.parametrize("weight", ["mlp.up_proj.weight", "mlp.no_such.weight"])
def test_a_scale_of_nothing(weight: str, copy: Any) -> None:
    folder = copy()
    scale = f"{LAYER_2}.{weight}_scale_inv"
    rewrite(folder, lambda tensors: tensors | {scale: torch.tensor(0.5)})
    assert scale in problem(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_other_quantisation(method: str, copy: Any) -> None:
    folder = copy()
    edit_config(folder, lambda config: config.update(quantization_config={"quant_method": method}))
    with pytest.raises(ModelError, match=method):
        load_config(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 3])
def test_an_index_that_leaves_the_directory(name: Any, copy: Any) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = problem(folder)
    assert repr(name) in message
    assert "plain name" in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": {}}}', "\x00"])
def test_a_broken_index(text: str, copy: Any) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in problem(folder)


def test_an_index_of_absent_files(copy: Any) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in problem(folder)


def test_one_file_goes_before_an_index(copy: Any) -> None:
    """As transformers does: a stale index beside a whole file is not followed."""
    folder = copy()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    Checkpoint.open(folder).check(load_config(folder))


def test_pickles_are_never_opened(copy: Any) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    folder = copy()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    message = problem(folder)
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1])
def test_truncated_weights(keep: int, copy: Any) -> None:
    folder = copy()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors" in problem(folder)


def test_weights_that_are_something_else(copy: Any) -> None:
    folder = copy()
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}) * 50)
    assert "model.safetensors" in problem(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["text_config"].update(sliding_window=4096), "sliding_window is 4096"),
        (lambda c: c.update(model_type="llava"), "'llava'"),
        (lambda c: c.pop("model_type"), "None"),
        (lambda c: c["text_config"].update(model_type="mistral"), "'mistral'"),
        (lambda c: c.pop("text_config"), "text_config"),
        (lambda c: c["vision_config"].update(model_type="siglip_vision_model"), "'siglip_vision_model'"),
        (lambda c: c["text_config"]["rope_parameters"].update(rope_type="llama3"), "'llama3'"),
        (lambda c: c["text_config"]["rope_parameters"].update(rope_type="spiral"), "spiral"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "'gelu'"),
        (lambda c: c["text_config"].update(num_key_value_heads=3), "3 KV heads"),
        (lambda c: c["text_config"].update(attention_dropout=0.1), "attention_dropout is 0.1"),
        (lambda c: c["text_config"].update(hidden_size="many"), "hidden_size"),
        (lambda c: c.update(vision_feature_layer=[-2, -1]), "vision_feature_layer is [-2, -1]"),
        (lambda c: c.update(vision_feature_layer=3), "vision_feature_layer is 3"),
        (lambda c: c.update(vision_feature_layer=-4), "vision_feature_layer is -4"),
        (lambda c: c["text_config"]["rope_parameters"].pop("original_max_position_embeddings"), "original_max"),
    ],
)
def test_a_config_that_cannot_be_run(change: Any, says: str, copy: Any) -> None:
    folder = copy(rope="default") if says == "original_max" else copy()
    edit_config(folder, change)
    with pytest.raises(ModelError) as caught:
        load_config(folder)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_config_that_is_no_json_object(text: str, copy: Any) -> None:
    folder = copy()
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_config(folder)


def test_no_directory(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ModelError, match=r"no config\.json"):
            load_config(folder)
