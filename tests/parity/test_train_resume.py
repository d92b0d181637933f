"""Resume on another number of stages and another schedule: the same bits as a run that was never interrupted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import Mistral3ForConditionalGeneration

from ray_ministral.config import OptimizerConfig
from ray_ministral.errors import InputError
from ray_ministral.model.weights import load_chunk, read_tensors
from ray_ministral.training import restore
from ray_ministral.training import snapshot as snapshot_module
from ray_ministral.training.checkpoint import (
    TrainState,
    commit_checkpoint,
    damage,
    latest_good,
    publish_model,
    read_state,
    temporary_folder,
)
from ray_ministral.training.lora import LoraOptions
from ray_ministral.training.restore import load_stage
from ray_ministral.training.snapshot import BackgroundWriter, save_stage, snapshot, write_snapshot
from tests.parity.small_models import quiet_transformers
from tests.parity.train_harness import Pipeline
from tests.parity.train_runs import CLIP_NORM, FOUR, INTERLEAVED, ONE, THREE, TWO, Layout, make_batch, run

OPTIMIZERS = {name: OptimizerConfig(name=name, weight_decay=0.1) for name in ("adamw", "muon")}
LORA = LoraOptions(4, alpha=8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def save(
    pipeline: Pipeline, folder: Path, step: int, model_dir: Path, *, lora: LoraOptions | None = None, **state: Any
) -> Path:
    """A checkpoint of all stages, written in the foreground."""
    temporary = temporary_folder(folder, step, generation=1)
    parts = [save_stage(stage, temporary) for stage in pipeline.stages]
    config = pipeline.stages[0].chunks[0].hf_config
    return commit_checkpoint(
        temporary, parts, TrainState(step, seed=0, **state), config=config, model_dir=model_dir, lora=lora
    )


def resume(pipeline: Pipeline, checkpoint: Path) -> Pipeline:
    for stage in pipeline.stages:
        load_stage(stage, checkpoint)
    return pipeline


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whatever file it is in."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in tensors, f"{name} is stored twice"
                tensors[name] = file.get_tensor(name)
    return tensors


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [
        name for name in theirs if ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name])
    ]
    assert not different


@pytest.mark.parametrize(
    ("tied", "optimizer"), [(False, "adamw"), (True, "adamw"), (True, "muon")], ids=["untied", "tied", "muon"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_and_ten_are_twenty(dtype: str, tied: bool, optimizer: str, directory: Any, tmp_path: Path) -> None:
    model_dir = directory(tied=tied)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "optimizer": OPTIMIZERS[optimizer]}
    whole = TWO.pipeline(model_dir, **options)
    curve = run(whole, TWO, range(20))
    assert min(norm for _, norm in curve) > CLIP_NORM, "clipping must be active"
    expected = stored(save(whole, tmp_path / "whole", 20, model_dir))

    first = TWO.pipeline(model_dir, **options)
    assert run(first, TWO, range(10)) == curve[:10]
    halfway = save(first, tmp_path / "first", 10, model_dir)
    for layout in (ONE, THREE, INTERLEAVED):
        second = resume(layout.pipeline(model_dir, **options), halfway)
        assert run(second, layout, range(10, 20)) == curve[10:], layout
        assert_same_bits(stored(save(second, tmp_path / layout.schedule, 20, model_dir)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_resume(dtype: str, directory: Any, tmp_path: Path) -> None:
    model_dir = directory(tied=True)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "lora": LORA}
    whole = THREE.pipeline(model_dir, **options)
    curve = run(whole, THREE, range(12))
    expected = stored(save(whole, tmp_path / "whole", 12, model_dir, lora=LORA))
    first = FOUR.pipeline(model_dir, **options)
    assert run(first, FOUR, range(6)) == curve[:6]
    halfway = save(first, tmp_path / "first", 6, model_dir, lora=LORA)
    # Another seed would begin with other adapters: what is loaded must not depend on it.
    second = resume(INTERLEAVED.pipeline(model_dir, seed=99, **options), halfway)
    assert run(second, INTERLEAVED, range(6, 12)) == curve[6:]
    assert_same_bits(stored(save(second, tmp_path / "second", 12, model_dir, lora=LORA)), expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", [ONE, INTERLEAVED], ids=["one", "interleaved"])
def test_the_model_is_hugging_faces(layout: Layout, tied: bool, directory: Any, tmp_path: Path) -> None:
    model_dir = directory(tied=tied)
    pipeline = layout.pipeline(model_dir)
    run(pipeline, layout, range(2))
    checkpoint = save(pipeline, tmp_path, 2, model_dir)
    publish_model(checkpoint, tmp_path / "final")
    ours = pipeline.weights()
    ours.pop("lm_head.weight") if tied else None
    for folder in (checkpoint / "model", tmp_path / "final"):
        with quiet_transformers():
            theirs, report = Mistral3ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert_same_bits(ours, {name: parameter.data for name, parameter in theirs.named_parameters()})
        assert_same_bits(dict(read_tensors(load_chunk(folder), lambda p: p.data)), ours)
        # Captioning needs these beside the weights.
        for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (model_dir / name).read_bytes()


def test_optimizer_tensors_have_hugging_faces_names(directory: Any, tmp_path: Path) -> None:
    model_dir = directory(tied=True)
    pipeline = TWO.pipeline(model_dir, dtype=torch.bfloat16)
    run(pipeline, TWO, range(3))
    checkpoint = save(pipeline, tmp_path, 3, model_dir)
    with quiet_transformers():
        theirs = Mistral3ForConditionalGeneration.from_pretrained(checkpoint / "model")
    assert theirs.dtype == torch.bfloat16
    tensors = stored(checkpoint)
    names = dict(theirs.named_parameters())
    kinds = ("exp_avg", "exp_avg_sq", "master", "step")
    held = {name for name in tensors if name.rpartition(".")[2] in kinds}
    assert held == {f"{name}.{kind}" for name in names for kind in kinds}
    for name, parameter in names.items():
        assert tensors[f"{name}.step"] == 3
        master = tensors[f"{name}.master"]
        assert master.dtype == torch.float32
        assert master.shape == tensors[f"{name}.exp_avg"].shape == parameter.shape
        assert master.bfloat16().equal(parameter.data)
    assert any(not tensors[f"{name}.master"].equal(p.data.float()) for name, p in names.items()), "masters say more"


def test_moments_are_those_of_the_named_tensor(directory: Any, tmp_path: Path) -> None:
    """After one step exp_avg is (1 - beta1) times the clipped gradient: held against gradients by name."""
    model_dir = directory()
    pipeline = THREE.pipeline(model_dir)
    schedule = THREE.make_schedule(pipeline)
    batch = make_batch(0)
    pipeline.compute(schedule, batch.microbatches, *batch.blocks)
    gradients = {name: tensor.clone() for name, tensor in pipeline.gradients().items()}
    for stage in pipeline.stages:
        stage.commit(1.0, 1e-3)
    tensors = stored(save(pipeline, tmp_path, 1, model_dir))
    assert len(gradients) > 40
    for name, gradient in gradients.items():
        torch.testing.assert_close(tensors[f"{name}.exp_avg"], gradient * (1 - OPTIMIZERS["adamw"].adam_beta1))
        torch.testing.assert_close(tensors[f"{name}.exp_avg_sq"], gradient**2 * (1 - OPTIMIZERS["adamw"].adam_beta2))


def test_a_snapshot_is_the_stage_at_that_step(directory: Any, tmp_path: Path) -> None:
    model_dir = directory()
    pipeline = TWO.pipeline(model_dir, dtype=torch.bfloat16)
    run(pipeline, TWO, range(2))
    expected = stored(save(pipeline, tmp_path / "a", 2, model_dir))
    taken = [snapshot(stage) for stage in pipeline.stages]
    run(pipeline, TWO, range(2, 4))  # in place: what only refers to the stage's tensors changes now
    parts = [write_snapshot(one, tmp_path / "b") for one in taken]
    assert_same_bits(stored(tmp_path / "b"), expected)
    assert {record.path for part in parts for record in part.files} == {
        path.relative_to(tmp_path / "b").as_posix() for path in (tmp_path / "b").rglob("*.safetensors")
    }


def test_writing_beside_training(directory: Any, tmp_path: Path) -> None:
    model_dir = directory()
    pipeline = TWO.pipeline(model_dir)
    run(pipeline, TWO, range(2))
    expected = stored(save(pipeline, tmp_path / "a", 2, model_dir))
    writers = [BackgroundWriter() for _ in pipeline.stages]
    folder = temporary_folder(tmp_path / "b", 2, generation=7)
    futures = [writer.submit(snapshot(stage), folder) for writer, stage in zip(writers, pipeline.stages, strict=True)]
    curve = run(pipeline, TWO, range(2, 4))
    parts = [future.result(timeout=60) for future in futures]
    config = pipeline.stages[0].chunks[0].hf_config
    checkpoint = commit_checkpoint(folder, parts, TrainState(2, 0), config=config, model_dir=model_dir)
    assert damage(checkpoint, checksums=True) is None
    assert_same_bits(stored(checkpoint), expected)
    again = resume(ONE.pipeline(model_dir), checkpoint)
    assert run(again, ONE, range(2, 4)) == curve
    (tmp_path / "file").touch()
    failed = writers[0].submit(snapshot(pipeline.stages[0]), tmp_path / "file" / "below")
    with pytest.raises(OSError, match="file"):
        failed.result(timeout=60)
    for writer in writers:
        writer.close()


def test_before_the_first_step_and_with_more_unfrozen(directory: Any, tmp_path: Path) -> None:
    """What was never stepped has no moments and starts with fresh ones."""
    model_dir = directory()
    frozen = (False, True, True)
    begun = TWO.pipeline(model_dir, freeze=frozen)
    curve = run(begun, TWO, range(2))
    at_zero = save(TWO.pipeline(model_dir, freeze=frozen), tmp_path / "zero", 0, model_dir)
    assert run(resume(ONE.pipeline(model_dir, freeze=frozen), at_zero), ONE, range(2)) == curve

    at_two = save(begun, tmp_path / "two", 2, model_dir)
    tensors = stored(at_two)
    assert "model.vision_tower.ln_pre.weight.step" not in tensors
    unfrozen = resume(ONE.pipeline(model_dir), at_two)
    run(unfrozen, ONE, range(2, 3))
    tensors = stored(save(unfrozen, tmp_path / "three", 3, model_dir))
    assert tensors["model.vision_tower.ln_pre.weight.step"] == 1
    assert tensors["model.language_model.norm.weight.step"] == 3


def test_stages_that_train_nothing(directory: Any, tmp_path: Path) -> None:
    """With the language model frozen only the first stage has an optimizer; the others still save their weights."""
    model_dir, frozen = directory(tied=True), (True, False, False)
    begun = TWO.pipeline(model_dir, freeze=frozen)
    curve = run(begun, TWO, range(4))
    begun = TWO.pipeline(model_dir, freeze=frozen)
    run(begun, TWO, range(2))
    checkpoint = save(begun, tmp_path, 2, model_dir)
    assert [path.name for path in (checkpoint / "optimizer").iterdir()] == ["optimizer-00001-of-00002.safetensors"]
    for layout in (ONE, THREE, FOUR):
        resumed = resume(layout.pipeline(model_dir, freeze=frozen), checkpoint)
        assert_same_bits(resumed.weights(), begun.weights())
        assert run(resumed, layout, range(2, 4)) == curve[2:]


def test_the_dtype_may_change(directory: Any, tmp_path: Path) -> None:
    """Masters come from masters: nothing is lost by going to fp32."""
    model_dir = directory()
    pipeline = TWO.pipeline(model_dir, dtype=torch.bfloat16)
    run(pipeline, TWO, range(3))
    checkpoint = save(pipeline, tmp_path / "bf16", 3, model_dir)
    single = resume(ONE.pipeline(model_dir), checkpoint)
    masters = {name: t for name, t in stored(checkpoint).items() if name.endswith(".master")}
    assert len(masters) > 40
    assert_same_bits({f"{name}.master": tensor for name, tensor in single.weights().items()}, masters)
    back = resume(TWO.pipeline(model_dir, dtype=torch.bfloat16), save(single, tmp_path / "fp32", 3, model_dir))
    assert_same_bits(stored(save(back, tmp_path / "back", 3, model_dir)), stored(checkpoint))


def forget_moments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restore._Chunk, "_moments", lambda self, parameter, like: {})


def restart_the_step_count(patch: pytest.MonkeyPatch) -> None:
    moments = restore._Chunk._moments

    def change(self: Any, parameter: Any, like: Any) -> Any:
        return moments(self, parameter, like) | {"step": torch.tensor(0.0)}

    patch.setattr(restore._Chunk, "_moments", change)


def masters_from_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restore, "MASTER", "nobody")


def swap_gate_and_up(patch: pytest.MonkeyPatch) -> None:
    """Two tensors of one parameter and one shape: nothing but the name tells their moments apart."""
    parameters = snapshot_module.parameter_slots
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def change(model: Any) -> Any:
        found = parameters(model)
        for slots in found.values():
            swapped = {name: re.sub("gate_proj|up_proj", lambda m: other[m[0]], name) for name in slots}
            slots.update({name: slots[instead] for name, instead in swapped.items() if instead in slots})
        return found

    patch.setattr(snapshot_module, "parameter_slots", change)


@pytest.mark.parametrize("mutation", [forget_moments, restart_the_step_count, masters_from_weights, swap_gate_and_up])
def test_each_mutation_turns_the_resumed_run_red(mutation: Any, directory: Any, tmp_path: Path) -> None:
    """Ladder G: what a resume may get wrong without a crash."""
    model_dir, options = directory(tied=True), {"dtype": torch.bfloat16}
    begun = TWO.pipeline(model_dir, **options)
    run(begun, TWO, range(4))
    expected = run(TWO.pipeline(model_dir, **options), TWO, range(7))[4:]

    def resumed(folder: Path) -> list[tuple[float, float]]:
        second = resume(THREE.pipeline(model_dir, **options), save(begun, folder, 4, model_dir))
        return run(second, THREE, range(4, 7))

    assert resumed(tmp_path / "right") == expected
    with pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        assert resumed(tmp_path / "wrong") != expected


@pytest.fixture
def three_checkpoints(directory: Any, tmp_path: Path) -> tuple[Path, Path]:
    """The folder with steps 1, 2, 3, and the model directory."""
    model_dir = directory()
    pipeline = TWO.pipeline(model_dir)
    for step in range(3):
        run(pipeline, TWO, [step])
        save(pipeline, tmp_path / "checkpoints", step + 1, model_dir, cursor={"epoch": 0, "index": 4 * step})
    return tmp_path / "checkpoints", model_dir


def test_damage_falls_back_to_the_one_before(three_checkpoints: tuple[Path, Path]) -> None:
    folder, model_dir = three_checkpoints
    newest = folder / "step-00000003"
    assert latest_good(folder, checksums=True).checkpoint == newest
    weights = next((newest / "model").glob("model-00002*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "step-00000002" / "COMMITTED").unlink()
    found = latest_good(folder)
    assert found.checkpoint == folder / "step-00000001"
    assert [line.partition(":")[0] for line in found.skipped] == ["step-00000003", "step-00000002"]
    state = read_state(found.checkpoint)
    assert (state.step, state.cursor) == (1, {"epoch": 0, "index": 0})
    # And it is one that a run can go on from, to the same bits as from the beginning.
    assert run(resume(THREE.pipeline(model_dir), found.checkpoint), THREE, [1]) == run_all(model_dir, 2)[1:]
    shutil.rmtree(found.checkpoint / "optimizer")
    assert latest_good(folder).checkpoint is None


def run_all(model_dir: Path, steps: int) -> list[tuple[float, float]]:
    return run(TWO.pipeline(model_dir), TWO, range(steps))


def test_a_flipped_bit_is_seen_by_checksums(three_checkpoints: tuple[Path, Path]) -> None:
    folder, _ = three_checkpoints
    moments = next((folder / "step-00000003" / "optimizer").iterdir())
    content = bytearray(moments.read_bytes())
    content[-3] ^= 4
    moments.write_bytes(content)
    assert latest_good(folder).checkpoint == folder / "step-00000003"
    found = latest_good(folder, checksums=True)
    assert found.checkpoint == folder / "step-00000002"
    assert "checksum" in found.skipped[0]
    assert moments.name in found.skipped[0]


def test_what_does_not_fit_is_refused(directory: Any, three_checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, model_dir = three_checkpoints[0] / "step-00000003", three_checkpoints[1]
    with pytest.raises(InputError, match=r"holds all weights, this run trains adapters.*--model"):
        resume(ONE.pipeline(model_dir, lora=LORA), checkpoint)
    with pytest.raises(InputError, match=r"layers\.4.*another model"):
        resume(Layout((6,), 1, "gpipe").pipeline(directory(layers=6)), checkpoint)

    adapted = TWO.pipeline(model_dir, lora=LORA)
    run(adapted, TWO, [0])
    adapters = save(adapted, tmp_path / "lora", 1, model_dir, lora=LORA)
    with pytest.raises(InputError, match=r"holds adapters, this run trains all weights.*merged first"):
        resume(ONE.pipeline(model_dir), adapters)
    with pytest.raises(InputError, match=r"\[4, \d+\].*\[2, \d+\].*--lora-rank"):
        resume(ONE.pipeline(model_dir, lora=LoraOptions(2)), adapters)

    moments = next((checkpoint / "optimizer").iterdir())
    moments.write_bytes(moments.read_bytes()[:100])
    with pytest.raises(InputError, match=rf"cannot read .*{moments.name}"):
        resume(ONE.pipeline(model_dir), checkpoint)
