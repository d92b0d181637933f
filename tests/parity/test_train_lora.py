"""LoRA: gradients against Hugging Face with adapters written by hand, the same bits on every layout, `peft`'s files."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Mistral3ForConditionalGeneration

from ray_ministral.config import OptimizerConfig
from ray_ministral.errors import ConfigError, ModelError
from ray_ministral.model.low_rank import adapter_names, adapters_of
from ray_ministral.model.weights import all_slots, load_chunk, read_tensors
from ray_ministral.training.lora import TARGETS, LoraOptions, load_adapters, merge_adapters
from ray_ministral.training.plan import IGNORED
from tests.parity.small_models import mixed_rows, pad_images, pad_rows, quiet_transformers
from tests.parity.test_train_resume import assert_same_bits, save
from tests.parity.train_harness import Pipeline
from tests.parity.train_runs import CLIP_NORM, FOUR, INTERLEAVED, ONE, RATE, THREE, TWO, Batch, Layout, make_batch, run

LORA = LoraOptions(3, alpha=12)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class HandWritten(nn.Module):
    """A linear layer of Hugging Face's with A and B beside it."""

    def __init__(self, base: nn.Linear, options: LoraOptions) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.zeros(options.rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, options.rank))
        self.scale = options.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


class Reference:
    """Hugging Face's model with adapters on the decoder's projections, and a plain loop."""

    def __init__(self, model: Mistral3ForConditionalGeneration, options: LoraOptions) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, module in list(self.model.named_modules()):
            parent, _, last = name.rpartition(".")
            if name.startswith("model.language_model.layers.") and last in PROJECTIONS:
                adapted = HandWritten(module, options)
                setattr(self.model.get_submodule(parent), last, adapted)
                self.parameters |= dict(zip(adapter_names(name), (adapted.a, adapted.b), strict=True))

    def loss(self, batch: Batch) -> torch.Tensor:
        total: Any = 0.0
        for microbatch, rows in zip(batch.microbatches, batch.rows, strict=True):
            start = 0
            for row in rows:
                pixels, sizes = pad_images(row.pixels)
                logits = self.model(row.token_ids[None], pixel_values=pixels, image_sizes=sizes).logits[0]
                targets = torch.from_numpy(microbatch.targets[start : start + len(row.token_ids)]).long()
                total = total + cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
                start += len(row.token_ids)
        return total / sum(microbatch.num_targets for microbatch in batch.microbatches)


def adapters(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """Every A and B of all stages."""
    return {
        name: slot.read(slot.parameter.detach()).clone()
        for stage in pipeline.stages
        for chunk in stage.chunks.values()
        for name, slot in all_slots(chunk).items()
        if name.startswith("base_model.")
    }


def randomize(pipeline: Pipeline, seed: int = 5) -> dict[str, torch.Tensor]:
    """A B of zero has A's gradient zero: random ones say more. Returns all adapters."""
    for stage in pipeline.stages:
        for chunk in stage.chunks.values():
            for name, slot in sorted(all_slots(chunk).items()):
                if ".lora_B." in name:
                    generator = torch.Generator().manual_seed(seed + sum(name.encode()))
                    slot.write(0.05 * torch.randn(slot.shape, generator=generator))
    return adapters(pipeline)


@pytest.fixture
def hand_written(reference: Any) -> Any:
    def make(values: dict[str, torch.Tensor], **arguments: Any) -> Reference:
        made = Reference(reference(**arguments), LORA)
        assert made.parameters.keys() == values.keys()
        with torch.no_grad():
            for name, parameter in made.parameters.items():
                parameter.copy_(values[name])
        return made

    return make


@pytest.mark.parametrize("layout", [ONE, FOUR], ids=["one", "zero-bubble"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_are_hugging_faces(tied: bool, layout: Layout, directory: Any, hand_written: Any) -> None:
    pipeline = layout.pipeline(directory(tied=tied), lora=LORA)
    theirs = hand_written(randomize(pipeline), tied=tied)
    batch = make_batch(0)
    reports = pipeline.compute(layout.make_schedule(pipeline), batch.microbatches, *batch.blocks)
    loss = theirs.loss(batch)
    loss.backward()
    total = sum(microbatch.num_targets for microbatch in batch.microbatches)
    assert sum(x for report in reports for x in report.losses) / total == pytest.approx(loss.item(), rel=1e-5)
    ours = pipeline.gradients()
    assert ours.keys() == theirs.parameters.keys()
    assert len(ours) == 4 * len(PROJECTIONS) * 2
    for name, parameter in theirs.parameters.items():
        scale = float(parameter.grad.abs().max())
        assert scale > 0, f"{name} has a gradient of zero, so this proves nothing"
        torch.testing.assert_close(
            ours[name], parameter.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_curve_is_hugging_faces(directory: Any, hand_written: Any) -> None:
    """AdamW with decay, warmup and clipping, from B = 0 as training begins."""
    options = OptimizerConfig(weight_decay=0.1)
    pipeline = THREE.pipeline(directory(), lora=LORA, optimizer=options)
    theirs = hand_written(adapters(pipeline))
    parameters = list(theirs.parameters.values())
    adamw = torch.optim.AdamW(parameters, lr=0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    curve = run(pipeline, THREE, range(8))
    assert min(norm for _, norm in curve) > CLIP_NORM
    assert curve[-1][0] < curve[0][0]
    for step, (loss, norm) in enumerate(curve):
        their_loss = theirs.loss(make_batch(step))
        their_loss.backward()
        their_norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        adamw.param_groups[0]["lr"] = RATE.at(step)
        adamw.step()
        adamw.zero_grad()
        assert (loss, norm) == pytest.approx((their_loss.item(), their_norm.item()), rel=1e-4), step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_bits_on_every_layout(dtype: torch.dtype, directory: Any) -> None:
    model_dir = directory(tied=True)
    before = {name: slot.parameter.detach().clone() for name, slot in all_slots(load_chunk(model_dir)).items()}
    runs = {}
    for layout, recompute in ((ONE, False), (TWO, False), (THREE, False), (INTERLEAVED, False), (FOUR, True)):
        pipeline = layout.pipeline(model_dir, lora=LORA, dtype=dtype, recompute=recompute)
        runs[layout, recompute] = run(pipeline, layout, range(4)), adapters(pipeline)
        # What is frozen is still what it was, and nobody spends memory on its gradients.
        for stage in pipeline.stages:
            for chunk in stage.chunks.values():
                for name, slot in all_slots(chunk).items():
                    if not name.startswith("base_model.") and name in before:
                        assert not slot.parameter.requires_grad
                        assert not hasattr(slot.parameter, "main_grad")
                        assert slot.parameter.equal(before[name].to(dtype)), name
    curve, weights = runs[ONE, False]
    assert all(weights[name].any() for name in weights), "every adapter must have learned something"
    for other, others_weights in runs.values():
        assert other == curve
        assert_same_bits(others_weights, weights)


def test_a_new_adapter_changes_nothing(directory: Any) -> None:
    plain, adapted = (TWO.pipeline(directory(), lora=lora) for lora in (None, LORA))
    batch = make_batch(0)
    losses = [p.compute(TWO.make_schedule(p), batch.microbatches, *batch.blocks)[-1].losses for p in (plain, adapted)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == len(batch.microbatches)


def test_initial_values_depend_on_seed_and_name_alone(directory: Any) -> None:
    first, same, other = (
        adapters(layout.pipeline(directory(), lora=LORA, seed=seed))
        for layout, seed in ((ONE, 1), (FOUR, 1), (FOUR, 2))
    )
    assert_same_bits(same, first)
    drawn = [name for name in first if ".lora_A." in name]
    assert not any(first[name].equal(other[name]) for name in drawn)
    assert len({first[name].flatten()[0].item() for name in drawn}) == len(drawn)
    for name in drawn:  # uniform up to 1 / sqrt(inputs), as torch and peft draw a linear layer
        bound = first[name].shape[1] ** -0.5
        assert 0.9 * bound < first[name].abs().max() <= bound
    assert not any(first[name].any() for name in first if ".lora_B." in name)


@pytest.fixture
def trained(directory: Any, tmp_path: Path) -> tuple[Pipeline, Path, Path]:
    """A pipeline with trained adapters, their directory, and the model's."""
    model_dir = directory(tied=True)
    pipeline = TWO.pipeline(model_dir, lora=LORA)
    run(pipeline, TWO, range(3))
    checkpoint = save(pipeline, tmp_path, 3, model_dir, lora=LORA)
    return pipeline, checkpoint / "model", model_dir


def test_the_file_is_pefts(trained: tuple[Pipeline, Path, Path], reference: Any) -> None:
    pipeline, adapter_dir, model_dir = trained
    assert_same_bits(load_file(adapter_dir / "adapter_model.safetensors"), adapters(pipeline))
    assert not list(adapter_dir.glob("model-*"))
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 12)
    assert config["base_model_name_or_path"] == str(model_dir)
    # peft adapts the modules whose whole name matches: those that we adapted, and none of the vision tower.
    linears = [name for name, module in reference(tied=True).named_modules() if isinstance(module, nn.Linear)]
    matching = {name for name in linears if re.fullmatch(config["target_modules"], name)}
    assert matching == {
        name for name in linears if name.startswith("model.language_model.layers.") and name.endswith(PROJECTIONS)
    }
    ours = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in adapters(pipeline)}
    assert ours == matching
    assert config["target_modules"] == TARGETS


def logits_of(model: Any) -> torch.Tensor:
    """Logits `[B, S, V]` for rows with and without images."""
    batch = pad_rows(mixed_rows())
    with torch.no_grad():
        output = model(**batch.arguments)
    logits: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return logits[batch.attention_mask.bool()]


def test_merged_weights(trained: tuple[Pipeline, Path, Path], reference: Any, tmp_path: Path) -> None:
    pipeline, adapter_dir, model_dir = trained
    merge_adapters(model_dir, adapter_dir, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "step-00000003"]
    with quiet_transformers():
        merged, report = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    values = adapters(pipeline)
    changed = 0
    for name, parameter in merged.named_parameters():
        expected = reference(tied=True).get_parameter(name).data
        name_a, name_b = adapter_names(name.removesuffix(".weight"))
        if name_a in values:
            expected = expected + LORA.scale * values[name_b] @ values[name_a]
            changed += 1
        torch.testing.assert_close(parameter.data, expected, rtol=1e-6, atol=1e-7)
    assert changed == 4 * len(PROJECTIONS)
    # One forward pass says the same with adapters beside the weights and in them.
    chunk = load_chunk(model_dir)
    without = logits_of(chunk)
    load_adapters(chunk, adapter_dir)
    beside = logits_of(chunk)
    assert (beside - without).abs().max() > 0.01
    torch.testing.assert_close(logits_of(merged), beside, rtol=1e-4, atol=2e-5)
    # The merged directory is a model as any other.
    names = dict(read_tensors(load_chunk(tmp_path / "merged"), lambda p: p.data))
    assert_same_bits(names, {name: p.data for name, p in merged.named_parameters()})
    with pytest.raises(ConfigError, match="there already"):
        merge_adapters(model_dir, adapter_dir, tmp_path / "merged")


def test_merging_keeps_the_models_dtype(trained: tuple[Pipeline, Path, Path], tmp_path: Path) -> None:
    _, adapter_dir, model_dir = trained
    source = tmp_path / "bf16"
    source.mkdir()
    for path in model_dir.iterdir():
        if path.suffix == ".safetensors":
            save_file({k: v.bfloat16() for k, v in load_file(path).items()}, source / path.name, {"format": "pt"})
        else:
            (source / path.name).write_bytes(path.read_bytes())
    merge_adapters(source, adapter_dir, tmp_path / "merged")
    tensors = {k: v for path in (tmp_path / "merged").glob("*.safetensors") for k, v in load_file(path).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_foreign_adapters_are_refused(trained: tuple[Pipeline, Path, Path], tmp_path: Path) -> None:
    _, adapter_dir, model_dir = trained
    config_file, weights = adapter_dir / "adapter_config.json", adapter_dir / "adapter_model.safetensors"
    config, tensors = json.loads(config_file.read_text()), load_file(weights)

    def refused(match: str, **changes: Any) -> None:
        config_file.write_text(json.dumps({**config, **changes}))
        with pytest.raises(ModelError, match=match):
            merge_adapters(model_dir, adapter_dir, tmp_path / "merged")
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"], "nothing half-made is left"

    refused("type 'IA3': only LORA", peft_type="IA3")
    refused("use_dora True.*merge with peft", use_dora=True)
    refused("use_rslora True, ", use_rslora=True, bias="all")
    refused("r and lora_alpha must be numbers, got None", r=None)
    refused(r"is \[3, \d+\], the model has room for \[5, \d+\]", r=5)
    some = next(iter(tensors))
    save_file({name: tensor for name, tensor in tensors.items() if name != some}, weights)
    refused("A and B of every attention and MLP projection")
    weights.unlink()
    refused("cannot read the adapters")
    config_file.unlink()
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        merge_adapters(model_dir, adapter_dir, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore")  # peft's own, about names that transformers deprecates
def test_peft_opens_and_merges_it(trained: tuple[Pipeline, Path, Path], reference: Any, tmp_path: Path) -> None:
    """The real thing."""
    import peft

    _, adapter_dir, model_dir = trained
    chunk = load_chunk(model_dir)
    load_adapters(chunk, adapter_dir)
    ours = logits_of(chunk)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(reference(tied=True)), adapter_dir).eval()
    ranks = [layer.rank for layer in adapters_of(chunk)]
    assert len([name for name, _ in model.named_parameters() if ".lora_" in name]) == 4 * len(PROJECTIONS) * 2
    assert set(ranks) == {3}
    torch.testing.assert_close(logits_of(model), ours, rtol=1e-4, atol=2e-5)
    merge_adapters(model_dir, adapter_dir, tmp_path / "merged")
    with quiet_transformers():
        merged = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "merged")
        direct = Mistral3ForConditionalGeneration.from_pretrained(adapter_dir).eval()
    torch.testing.assert_close(logits_of(direct), ours, rtol=1e-4, atol=2e-5)
    theirs = dict(model.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter.data, theirs[name].data, rtol=1e-6, atol=1e-7)


def test_options_are_checked() -> None:
    assert LoraOptions(4).scale == 1
    assert LoraOptions(4, alpha=16).scale == 4
    with pytest.raises(ConfigError, match="--lora-rank must be at least 1, got 0"):
        LoraOptions(0)
    with pytest.raises(ConfigError, match="alpha"):
        LoraOptions(1, alpha=0)
