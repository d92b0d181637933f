"""Which tensors of a directory count, and under which names; whole models are in `tests/parity/test_weights.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ray_ministral.errors import ModelError
from ray_ministral.model.checkpoint import Checkpoint, canonical_name, hub_name

NAMES = {
    "language_model.model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "language_model.model.norm.weight": "model.language_model.norm.weight",
    "language_model.lm_head.weight": "lm_head.weight",
    "vision_tower.ln_pre.weight": "model.vision_tower.ln_pre.weight",
    "multi_modal_projector.norm.weight": "model.multi_modal_projector.norm.weight",
}


def write(folder: Path, name: str, *tensors: str) -> None:
    save_file({tensor: np.zeros(2, np.float32) for tensor in tensors}, str(folder / name))


@pytest.mark.parametrize(("hub", "canonical"), NAMES.items())
def test_names(hub: str, canonical: str) -> None:
    assert canonical_name(hub) == canonical_name(canonical) == canonical
    assert hub_name(canonical) == hub


def test_a_name_that_nobody_knows_stays() -> None:
    assert canonical_name("consolidated.wq") == hub_name("consolidated.wq") == "consolidated.wq"


def test_tensors_are_found_under_their_canonical_names(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", "vision_tower.ln_pre.weight", "language_model.lm_head.weight")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors.keys() == {"model.vision_tower.ln_pre.weight", "lm_head.weight"}
    assert checkpoint.has_output_layer
    stored = checkpoint.tensors["lm_head.weight"]
    assert (stored.name, stored.shape, stored.dtype) == ("language_model.lm_head.weight", (2,), "F32")
    assert stored.path == str(tmp_path / "model.safetensors")


def test_buffers_and_activation_scales_are_passed_over(tmp_path: Path) -> None:
    write(
        tmp_path,
        "model.safetensors",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight_scale_inv",
        "language_model.model.layers.0.mlp.up_proj.activation_scale",
        "language_model.model.rotary_emb.inv_freq",
        "vision_tower.patch_positional_embedding.inv_freq",
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors.keys() == {"model.language_model.layers.0.mlp.up_proj.weight"}
    scale = checkpoint.scales["model.language_model.layers.0.mlp.up_proj.weight"]
    assert scale.name == "language_model.model.layers.0.mlp.up_proj.weight_scale_inv"
    assert not checkpoint.has_output_layer


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    """The hub's repositories hold the weights a second time, as consolidated.safetensors."""
    write(tmp_path, "model-00001-of-00002.safetensors", "vision_tower.a", "vision_tower.b")
    write(tmp_path, "model-00002-of-00002.safetensors", "vision_tower.c")
    write(tmp_path, "consolidated.safetensors", "vision_tower.d")
    weight_map = {
        "vision_tower.a": "model-00001-of-00002.safetensors",
        "vision_tower.b": "model-00001-of-00002.safetensors",
        "vision_tower.c": "model-00002-of-00002.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = Checkpoint.open(tmp_path).tensors
    assert found.keys() == {f"model.vision_tower.{letter}" for letter in "abc"}
    assert found["model.vision_tower.c"].path.endswith("model-00002-of-00002.safetensors")


def test_twice_in_two_files(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors", "vision_tower.a")
    write(tmp_path, "b.safetensors", "model.vision_tower.a")
    weight_map = {"vision_tower.a": "a.safetensors", "model.vision_tower.a": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"stored twice, in '.*a\.safetensors' as .* and in '.*b\.safetensors' as"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("names", [[], ["pytorch_model.bin"], ["consolidated.safetensors", "x.pth"]])
def test_no_weights_that_can_be_read(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=", ".join(names) or "no weights"):
        Checkpoint.open(tmp_path)


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", "vision_tower.a")
    program = (
        "import sys; from ray_ministral.model.checkpoint import Checkpoint; "
        f"print(list(Checkpoint.open({str(tmp_path)!r}).tensors), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "['model.vision_tower.a'] False"
