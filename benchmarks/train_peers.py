"""The peers of the training benchmark, each in processes of its own: a plain Hugging Face loop, torch's pipelining.

    python -m benchmarks.train_peers hugging-face|pipelining --model DIR --samples FILE …

Both are given finished token ids and pixels, as this project's job has prepared them, step by step: reading, decoding
and tokenising cost them nothing. Prints a line of JSON: seconds and loss of each step.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy, pad

IGNORED = -100
LEARNING_RATE, CLIP_NORM, WEIGHT_DECAY, BETAS, EPS = 1e-3, 1.0, 0.01, (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Sample:
    """token_ids: int64 [T]. labels: int64 [T], not shifted, as Hugging Face wants them. pixels: float [3, H, W]."""

    token_ids: Tensor
    labels: Tensor
    pixels: Tensor | None


def write_samples(path: Path, steps: Sequence[Sequence[Sample]]) -> None:
    """Write the samples of each step, in order."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for number, samples in enumerate(steps):
        for index, sample in enumerate(samples):
            key = f"{number:05d}.{index:05d}"
            tensors[f"{key}.ids"], tensors[f"{key}.labels"] = sample.token_ids, sample.labels
            if sample.pixels is not None:
                tensors[f"{key}.pixels"] = sample.pixels
    save_file(tensors, path)


def read_samples(path: Path) -> list[list[Sample]]:
    """What `write_samples` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    steps: dict[str, list[Sample]] = {}
    for key in sorted(name.removesuffix(".ids") for name in tensors if name.endswith(".ids")):
        sample = Sample(tensors[f"{key}.ids"], tensors[f"{key}.labels"], tensors.get(f"{key}.pixels"))
        steps.setdefault(key.partition(".")[0], []).append(sample)
    return list(steps.values())


def main() -> None:
    """Run one peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["hugging-face", "pipelining"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--microbatch", type=int, required=True, help="samples of a microbatch")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--layers", type=int, nargs=2, help="pipelining: decoder layers of each of the two stages")
    options = parser.parse_args()
    steps = read_samples(options.samples)
    if options.peer == "hugging-face":
        torch.set_num_threads(options.threads)
        seconds, losses = hugging_face(options.model, steps, options.microbatch)
    else:
        seconds, losses = pipelining(options.model, steps, options.microbatch, options.layers, options.threads)
    tokens = [sum(len(sample.token_ids) for sample in samples) for samples in steps]
    print(json.dumps({"seconds": seconds, "losses": losses, "tokens": tokens}))


def hugging_face(model_dir: str, steps: list[list[Sample]], microbatch: int) -> tuple[list[float], list[float]]:
    """One process; microbatches padded to their longest sample, gradients accumulated, one AdamW step."""
    from transformers import Mistral3ForConditionalGeneration

    model: Any = Mistral3ForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).train()
    with_images = any(sample.pixels is not None for samples in steps for sample in samples)
    if not with_images:
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
    optimizer = adamw(model.named_parameters())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seconds, losses = [], []
    for samples in steps:
        started = time.perf_counter()
        total, step_loss = num_targets(samples), 0.0
        for start in range(0, len(samples), microbatch):
            loss = model(**collate(samples[start : start + microbatch]), num_items_in_batch=total, use_cache=False).loss
            loss.backward()
            step_loss += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(step_loss)
    return seconds, losses


def collate(samples: Sequence[Sample], pad_id: int = 8) -> dict[str, Tensor]:
    """Padded on the right to the longest sample, images to the largest."""
    longest = max(len(sample.token_ids) for sample in samples)
    batch = {
        "input_ids": torch.stack([_padded(sample.token_ids, longest, pad_id) for sample in samples]),
        "labels": torch.stack([_padded(sample.labels, longest, IGNORED) for sample in samples]),
        "attention_mask": torch.stack([_padded(torch.ones_like(sample.token_ids), longest, 0) for sample in samples]),
    }
    images = [sample.pixels for sample in samples if sample.pixels is not None]
    if images:
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        batch["pixel_values"] = torch.stack(
            [pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        )
        batch["image_sizes"] = torch.tensor([image.shape[1:] for image in images])
    return batch


def _padded(values: Tensor, length: int, value: int) -> Tensor:
    return pad(values, (0, length - len(values)), value=value)


def num_targets(samples: Sequence[Sample]) -> int:
    """Labels that count: the first one predicts nothing."""
    return sum(int((sample.labels[1:] != IGNORED).sum()) for sample in samples)


def adamw(named: Iterator[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """No decay on norms and biases."""
    parameters = [parameter for _, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS)


class DecoderStage(nn.Module):
    """Some layers of Hugging Face's decoder: with the embedding if first, norm and output layer if last."""

    def __init__(self, model_dir: str, layers: slice, *, first: bool, last: bool) -> None:
        super().__init__()
        from transformers import Mistral3ForConditionalGeneration

        whole: Any = Mistral3ForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
        self.decoder = whole.model.language_model
        self.decoder.layers = self.decoder.layers[layers]
        self.first, self.last = first, last
        self.lm_head = whole.lm_head if last else None
        if not first:
            self.decoder.embed_tokens = None
        if not last:
            self.decoder.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [B, S] or hidden states [B, S, H] to hidden states, or logits [B, S, V]."""
        given = {"input_ids": x} if self.first else {"inputs_embeds": x}
        hidden: Tensor = self.decoder(**given, use_cache=False).last_hidden_state
        return hidden if self.lm_head is None else self.lm_head(hidden)

    @property
    def tied(self) -> nn.Parameter:
        """The weight that both stages have."""
        module: Any = self.decoder.embed_tokens if self.lm_head is None else self.lm_head
        weight: nn.Parameter = module.weight
        return weight


def pipelining(
    model_dir: str, steps: list[list[Sample]], microbatch: int, layers: Sequence[int], threads: int
) -> tuple[list[float], list[float]]:
    """1F1B of torch.distributed.pipelining on two processes over gloo."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (model_dir, steps, microbatch, tuple(layers), threads, os.getpid(), results)
    workers = [context.Process(target=_pipelining_rank, args=(rank, *arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a rank of torch's pipelining ended with status {worker.exitcode}")
    result: tuple[list[float], list[float]] = results.get()
    return result


def _pipelining_rank(
    rank: int,
    model_dir: str,
    steps: list[list[Sample]],
    microbatch: int,
    layers: tuple[int, int],
    threads: int,
    run: int,
    results: Any,
) -> None:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file:///tmp/pipelining-{run}", rank=rank, world_size=2)
    first, last = rank == 0, rank == 1
    part = slice(0, layers[0]) if first else slice(layers[0], sum(layers))
    module = DecoderStage(model_dir, part, first=first, last=last)
    optimizer = adamw(module.named_parameters())
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    total = num_targets(steps[0])

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / total

    schedule = Schedule1F1B(
        PipelineStage(module, rank, 2, torch.device("cpu")), len(steps[0]) // microbatch, loss_fn, scale_grads=False
    )
    seconds, losses = [], []
    for samples in steps:
        batch = collate(samples)
        distributed.barrier()
        started = time.perf_counter()
        own_losses: list[Tensor] = []
        if first:
            schedule.step(batch["input_ids"])
        else:
            schedule.step(target=batch["labels"], losses=own_losses)
        distributed.all_reduce(module.tied.grad)
        squares = [p.grad.square().sum() for p in parameters if p.grad is not None and (first or p is not module.tied)]
        square = torch.stack(squares).sum()
        distributed.all_reduce(square)
        scale = min(1.0, CLIP_NORM / (float(square.sqrt()) + 1e-6))
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(float(sum(own_losses)) if last else 0.0)
    distributed.barrier()
    if last:
        results.put((seconds, losses))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
