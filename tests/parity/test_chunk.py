"""Ladder B: one chunk against Hugging Face: logits, loss, and every parameter's gradient by name."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ministral.model import vision
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.packed import PackedBatch
from ray_ministral.model.weights import load_chunk, read_tensors
from tests.parity.small_models import (
    IMAGE_TOKEN,
    MERGED_PATCH,
    YARN,
    Padded,
    Row,
    mixed_rows,
    pad_images,
    pad_rows,
    save_directory,
    small_config,
    small_model,
)

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""fp32 sums in another order; logits are of the order of one."""

ROPES = ("yarn", "default")


def gradients(model: Ministral3Model) -> dict[str, torch.Tensor]:
    return dict(read_tensors(model, lambda parameter: parameter.grad))


def reference_gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"{name} has a gradient of zero, so this proves nothing"
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def packed(rows: list[Row], **options: Any) -> PackedBatch:
    lengths = tuple(len(row.token_ids) for row in rows)
    return PackedBatch(
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        token_ids_T=torch.cat([row.token_ids for row in rows]),
        images=[image for row in rows for image in row.pixels],
        **options,
    )


def single_logits(model: Any, row: Row) -> torch.Tensor:
    """Hugging Face's logits `[P, V]` of one row on its own, without any padding."""
    pixels, sizes = pad_images(row.pixels)
    with torch.no_grad():
        return model(input_ids=row.token_ids[None], pixel_values=pixels, image_sizes=sizes).logits[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_plain_logits(side: str, rope: str, tied: bool, reference: Any, directory: Any) -> None:
    ours = load_chunk(directory(tied=tied, rope=rope))
    batch = pad_rows(mixed_rows(), side)
    with torch.no_grad():
        theirs = reference(tied=tied, rope=rope)(**batch.arguments).logits
        logits = ours(**batch.arguments)
    mask = batch.attention_mask.bool()
    assert logits.shape == theirs.shape
    assert theirs[mask].std() > 0.1, "logits so flat would be equal whatever the model does"
    torch.testing.assert_close(logits[mask], theirs[mask], **CLOSE)
    assert not logits[~mask].any()


def test_positions_are_counted_as_hugging_face_counts_them(reference: Any, directory: Any) -> None:
    batch = pad_rows(mixed_rows(), "left")
    arguments = {**batch.arguments, "position_ids": None}
    with torch.no_grad():
        theirs = reference()(**arguments).logits
        logits = load_chunk(directory())(**arguments)
    mask = batch.attention_mask.bool()
    torch.testing.assert_close(logits[mask], theirs[mask], **CLOSE)


def test_no_attention_mask_means_no_padding(reference: Any, directory: Any) -> None:
    row = mixed_rows()[0]
    pixels, sizes = pad_images(row.pixels)
    with torch.no_grad():
        logits = load_chunk(directory())(row.token_ids[None], pixel_values=pixels, image_sizes=sizes)
    torch.testing.assert_close(logits[0], single_logits(reference(), row), **CLOSE)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ROPES)
def test_packed_logits(rope: str, tied: bool, reference: Any, directory: Any) -> None:
    rows = mixed_rows()
    assert max(len(row.token_ids) for row in rows) > 2 * 16, "rows must reach beyond original_max_position_embeddings"
    theirs = torch.cat([single_logits(reference(tied=tied, rope=rope), row) for row in rows])
    model = load_chunk(directory(tied=tied, rope=rope))
    with torch.no_grad():
        logits = model(packed=packed(rows))
        some = torch.tensor([3, 0, len(theirs) - 1])
        torch.testing.assert_close(model(packed=packed(rows, logit_rows=some)), logits[some])
    torch.testing.assert_close(logits, theirs, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layers_forward_is_megatrons(dtype: torch.dtype, directory: Any) -> None:
    """To the bit, the gradients too, over one set of modules."""
    batch = packed([row for row in mixed_rows() if not row.images])
    found = []
    for ours in (True, False):
        model = load_chunk(directory(), dtype=dtype)
        for layer in model.language_model.decoder.layers:
            if not ours:
                del layer.forward  # the class's own shows again
        logits = model(packed=batch)
        logits.float().logsumexp(-1).sum().backward()
        found.append([logits, *gradients(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_packed_weights_are_as_near_to_the_truth_as_plain_ones(
    tied: bool, dtype: torch.dtype, directory: Any, reference: Any
) -> None:
    padded = pad_rows(mixed_rows())
    with torch.no_grad():
        truth = reference(tied=tied)(**padded.arguments).logits[padded.attention_mask.bool()]

    def distance(model: Ministral3Model) -> float:
        with torch.inference_mode():
            logits = model(**padded.arguments)[padded.attention_mask.bool()]
        return float((logits.float() - truth).square().mean().sqrt())

    model = load_chunk(directory(tied=tied), dtype=dtype).requires_grad_(False)
    plain = distance(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.pack()
    assert sum(parameter.numel() for parameter in model.parameters()) < parameters / 2, "nothing was packed"
    assert distance(model) < (1.1 * plain if dtype == torch.bfloat16 else 1e-5)


def test_text_only_batch(reference: Any, directory: Any) -> None:
    rows = [row for row in mixed_rows() if not row.images]
    assert len(rows) > 1
    with torch.no_grad():
        logits = load_chunk(directory())(packed=packed(rows))
    torch.testing.assert_close(logits, torch.cat([single_logits(reference(), row) for row in rows]), **CLOSE)


@pytest.mark.parametrize("beta", [None, 0.0, 0.3])
def test_query_scale(beta: float | None, tmp_path: Path) -> None:

    rope = {**YARN, "llama_4_scaling_beta": 0.0 if beta is None else beta, "original_max_position_embeddings": 8}
    theirs = small_model(small_config(rope=rope))
    ours = load_chunk(save_directory(theirs, tmp_path / "model"))
    if beta is None:  # Hugging Face cannot run without it; it means the same as 0
        config_file = tmp_path / "model" / "config.json"
        config_file.write_text(config_file.read_text().replace('"llama_4_scaling_beta": 0.0,', ""))
        assert "llama_4_scaling_beta" not in config_file.read_text()
        ours = load_chunk(tmp_path / "model")
    row = mixed_rows()[4]
    with torch.no_grad():
        torch.testing.assert_close(ours(packed=packed([row])), single_logits(theirs, row), **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"mscale": None, "mscale_all_dim": None},
        {"attention_factor": 0.7},
        {"factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5},
    ],
    ids=str,
)
def test_yarn_variants(changes: dict[str, Any], tmp_path: Path) -> None:
    """Where YaRN scales the rotary tables, too: the published models have factors that cancel out."""
    rope = {key: value for key, value in (YARN | changes).items() if value is not None}
    theirs = small_model(small_config(rope=rope))
    ours = load_chunk(save_directory(theirs, tmp_path / "model"))
    row = mixed_rows()[4]
    expected = single_logits(theirs, row)
    with torch.no_grad():
        torch.testing.assert_close(ours(packed=packed([row])), expected, **CLOSE)
        usual = small_model(small_config())
        assert (single_logits(usual, row) - expected).abs().max() > 1e-3, "the change changes nothing"


def test_rope_as_older_configs_say_it(directory: Any, reference: Any, tmp_path: Path) -> None:
    """`rope_scaling` with `type`, and `rope_theta` beside it."""
    folder = Path(shutil.copytree(directory(), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    config["text_config"]["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (folder / "config.json").write_text(json.dumps(config))
    row = mixed_rows()[4]
    with torch.no_grad():
        logits = load_chunk(folder)(packed=packed([row]))
    torch.testing.assert_close(logits, single_logits(reference(), row), **CLOSE)


def test_bfloat16_is_as_near_to_the_truth_as_hugging_face(directory: Any, reference: Any) -> None:
    """Rounding differs in its details, so both are held against fp32."""
    batch = pad_rows(mixed_rows())
    mask = batch.attention_mask.bool()
    theirs = copy.deepcopy(reference()).to(torch.bfloat16)
    for module, original in zip(theirs.modules(), reference().modules(), strict=True):
        if hasattr(module, "inv_freq"):  # `from_pretrained` keeps it in fp32, `to` does not
            module.inv_freq = original.inv_freq
    with torch.no_grad():
        truth = reference()(**batch.arguments).logits[mask]
        their_error = (theirs(**batch.arguments).logits[mask].float() - truth).pow(2).mean().sqrt()
        logits = load_chunk(directory(), dtype=torch.bfloat16)(**batch.arguments)[mask]
    assert logits.dtype == torch.bfloat16
    assert 0 < (logits.float() - truth).pow(2).mean().sqrt() < 1.2 * their_error


def run_backward(model: Any, batch: Padded, **extra: Any) -> torch.Tensor:
    model.zero_grad()
    output = model(**batch.arguments, labels=batch.labels, **extra)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_every_gradient(side: str, tied: bool, reference: Any, directory: Any) -> None:
    theirs, ours = reference(tied=tied), load_chunk(directory(tied=tied))
    batch = pad_rows(mixed_rows(), side)
    try:
        expected = run_backward(theirs, batch)
        loss = run_backward(ours, batch)
        torch.testing.assert_close(loss, expected)
        assert len(gradients(ours)) == len(list(theirs.named_parameters()))
        assert_gradients_equal(gradients(ours), reference_gradients(theirs))
    finally:
        theirs.zero_grad()


def test_packed_loss_and_gradients_equal_the_padded_ones(directory: Any) -> None:
    rows = mixed_rows()
    model = load_chunk(directory())
    batch = pad_rows(rows)
    expected = run_backward(model, batch)
    by_name = {name: gradient.clone() for name, gradient in gradients(model).items()}
    labels = []
    for row, padded_labels in zip(rows, batch.labels, strict=True):
        labels.append(torch.cat([padded_labels[1 : len(row.token_ids)], torch.tensor([-100])]))
    model.zero_grad()
    loss = model(packed=packed(rows), labels=torch.cat(labels))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    assert_gradients_equal(gradients(model), by_name)


def test_loss_mask_leaves_labels_out(reference: Any, directory: Any) -> None:
    theirs, ours = reference(), load_chunk(directory())
    batch = pad_rows(mixed_rows())
    keep = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    labels = batch.labels.masked_fill(~keep, -100)
    assert 0 < int((labels != -100).sum()) < int((batch.labels != -100).sum())
    with torch.no_grad():
        expected = theirs(**batch.arguments, labels=labels).loss
        everything = theirs(**batch.arguments, labels=batch.labels).loss
        torch.testing.assert_close(ours(**batch.arguments, labels=batch.labels, loss_mask=keep), expected)
    assert abs(float(everything - expected)) > 1e-3


def test_fully_masked_labels_give_no_loss_and_no_nan(directory: Any) -> None:
    model = load_chunk(directory())
    batch = pad_rows(mixed_rows())
    loss = model(**batch.arguments, labels=torch.full_like(batch.labels, -100))
    loss.backward()
    assert float(loss.detach()) == 0
    found = gradients(model)
    assert found
    assert all(not gradient.any() for gradient in found.values())


def test_inputs_embeds(reference: Any, directory: Any) -> None:
    theirs, ours = reference(), load_chunk(directory())
    batch = pad_rows(mixed_rows())
    embeds = theirs.get_input_embeddings()(batch.input_ids).detach()
    arguments = {**batch.arguments, "input_ids": None, "inputs_embeds": embeds}
    mask = batch.attention_mask.bool()
    with torch.no_grad():
        torch.testing.assert_close(ours(**arguments)[mask], theirs(**arguments).logits[mask], **CLOSE)
        embeds = embeds.masked_fill((batch.input_ids == IMAGE_TOKEN)[..., None], 0.5)
        with pytest.raises(ValueError, match="image tokens"):
            ours(**{**arguments, "inputs_embeds": embeds})


@pytest.mark.parametrize(("language", "tower", "projector"), list(itertools.product([False, True], repeat=3)))
def test_freeze(language: bool, tower: bool, projector: bool, reference: Any, directory: Any) -> None:
    theirs, ours = reference(), load_chunk(directory())
    batch = pad_rows(mixed_rows())
    ours.freeze(language, tower, projector)
    frozen = {
        "model.language_model.": language,
        "lm_head.": language,
        "model.vision_tower.": tower,
        "model.multi_modal_projector.": projector,
    }
    try:
        expected = run_backward(theirs, batch)
        wanted = {
            name: gradient
            for name, gradient in reference_gradients(theirs).items()
            if not any(name.startswith(prefix) and off for prefix, off in frozen.items())
        }
        assert len(wanted) < len(reference_gradients(theirs)) or not (language or tower or projector)
        if language and tower and projector:
            loss = ours(**batch.arguments, labels=batch.labels)
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected)
            return
        torch.testing.assert_close(run_backward(ours, batch), expected)
        assert_gradients_equal(gradients(ours), wanted)
    finally:
        theirs.zero_grad()


def images_of(sizes: list[tuple[int, int]], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h * MERGED_PATCH, w * MERGED_PATCH, generator=generator) for h, w in sizes]


def reference_features(model: Any, images: list[torch.Tensor]) -> list[torch.Tensor]:
    pixels, sizes = pad_images(images)
    with torch.no_grad():
        return list(model.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output)


@pytest.mark.parametrize("max_patches", [vision.MAX_PATCHES_PER_BATCH, 20, 1])
def test_image_features(max_patches: int, reference: Any, directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vision.encode_images.__kwdefaults__, "max_patches", max_patches)
    images = images_of([(1, 1), (3, 2), (1, 1), (2, 3), (3, 2), (3, 2), (1, 5)])
    expected = reference_features(reference(), images)
    model = load_chunk(directory())
    pixels, sizes = pad_images(images)
    assert pixels is not None
    assert sizes is not None
    with torch.no_grad():
        for features in (
            model.get_image_features(images),
            model.get_image_features(pixels, sizes),
            model.get_image_features(pixels, sizes.tolist()),
        ):
            assert len(features) == len(images)
            for ours, theirs in zip(features, expected, strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)


# 0 means the same as -3 here, and Hugging Face fails on it.
@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 2])
def test_vision_feature_layer(layer: int, tmp_path: Path) -> None:

    theirs = small_model(small_config(vision_feature_layer=layer))
    ours = load_chunk(save_directory(theirs, tmp_path / "model"))
    images = images_of([(2, 3), (1, 1)])
    with torch.no_grad():
        for mine, expected in zip(ours.get_image_features(images), reference_features(theirs, images), strict=True):
            torch.testing.assert_close(mine, expected, **CLOSE)


def test_too_few_or_too_many_placeholders(directory: Any) -> None:
    model = load_chunk(directory())
    row = mixed_rows()[0]
    for images in (row.images * 2, ()):
        # without any image there is nothing to place, as in Hugging Face
        batch = packed([Row(row.token_ids, images)])
        if images:
            with pytest.raises(ValueError, match=r"12 features for 6 image tokens \(id 5\)"):
                model(packed=batch)
        else:
            assert torch.isfinite(model(packed=batch)).all()


def test_a_random_model_has_hugging_faces_parameters(reference: Any) -> None:
    config = reference(tied=False).config
    torch.manual_seed(0)
    model = Ministral3Model(config)
    ours = dict(read_tensors(model, lambda parameter: parameter.data))
    theirs = dict(reference(tied=False).named_parameters())
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: p.shape for n, p in theirs.items()}
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    matrices = [tensor for tensor in ours.values() if tensor.ndim > 1]
    assert all(abs(float(matrix.std()) / config.text_config.initializer_range - 1) < 0.2 for matrix in matrices)
