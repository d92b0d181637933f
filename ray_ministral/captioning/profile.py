"""How long the parts of a model take on this device, measured on a small chunk with made-up weights.

A stage measures only what it will hold in any case: a layer or two, the first stage vision tower and embedding, the
last one the output layer. So a profile needs no more memory than the stage does afterwards, and nothing is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_ministral.captioning.costs import Profile, Shapes
from ray_ministral.captioning.kv_cache import CachedAttention, KVCache
from ray_ministral.captioning.plan import Prefill, StepPlan
from ray_ministral.captioning.sampling import sample
from ray_ministral.config import SamplingConfig, StageOptions, StageSpec
from ray_ministral.data.images import ImagePreprocessor
from ray_ministral.model import language
from ray_ministral.model.architecture import Architecture, load_config
from ray_ministral.model.attention import PackedAttentionParams
from ray_ministral.model.ministral3 import Ministral3Model
from ray_ministral.model.rope import Rotary
from ray_ministral.pipeline.partition import layer_flops, tower_flops
from ray_ministral.pipeline.pixels import PixelTable
from ray_ministral.pipeline.stage import PipelineStage

LONG_S = 1.5
"""A run that would take longer is not made: its time is reckoned from those of smaller ones."""

ENOUGH_S, ONCE_S = 0.1, 0.4
"""Short runs are repeated for at least the one, long ones only until the other is used up."""

LONGEST_S = 25.0
"""For all runs together: then it is given up, with TimeoutError."""

LEAST_REPEATS, MOST_REPEATS = 3, 50

LARGE_LAYER = 20_000_000
"""Parameters of a layer above which one is measured alone; a smaller one could stay in the cache of the processor."""

SMALL_TOKENS, SMALL_PATCHES = (32, 128), (4, 8)
"""Smaller runs: tokens of a prompt, and image tokens along the sides of an image."""

PATTERN = 1 << 20
"""Random numbers that are drawn; weights have them again and again."""


def measure(options: StageOptions, sampling: SamplingConfig, shapes: Shapes) -> Profile:
    """What a stage that will be first, last or neither, as `options.spec` says, takes for its parts."""
    bench = _Bench(options, sampling, shapes)
    # The ends first, so that all stages run their layers at about the same time, and share the cores as they will.
    vision = bench.vision() if options.spec.is_first else None
    embedding = bench.embedding() if options.spec.is_first else None
    output = bench.output() if options.spec.is_last else None
    profile = Profile(bench.prefill(), bench.decode(), vision, embedding, output)
    if bench.device.type == "cuda":
        del bench
        torch.cuda.empty_cache()  # the weights need the room next
    return profile


class _Bench:
    """A small chunk, and the parts that are timed on it."""

    def __init__(self, options: StageOptions, sampling: SamplingConfig, shapes: Shapes) -> None:
        config = load_config(options.model_dir)
        self.shapes, self.sampling = shapes, sampling
        self.arch = arch = Architecture.from_config(config)
        self.layers = min(1 if arch.layer_parameters > LARGE_LAYER else 2, arch.num_layers)
        self.first, self.last = options.spec.is_first, options.spec.is_last
        self.model_dir = options.model_dir
        stage = PipelineStage(options)  # for its checks and its number of threads
        self.device, self.dtype = stage.device, stage.dtype
        self._warm = False
        self._deadline = time.perf_counter() + LONGEST_S
        self.random = np.random.default_rng(0)
        spec = StageSpec(0, self.layers, self.first, self.last)
        model = Ministral3Model(config, stage=spec, dtype=self.dtype, device=self.device, initialize=False)
        fill(model)
        model.requires_grad_(False)
        model.eval()
        model.pack()
        self.model: Any = model
        self.rotary = Rotary(config)

    # Parts

    def vision(self) -> float:
        """The images, from their bytes to what stands for them in the prompt."""
        sizes, patch = self.shapes.image_sizes, self.arch.vision.merged_patch_size
        if not sizes:
            return 0.0
        table = PixelTable(ImagePreprocessor(self.model_dir).normalisation_table(), self.dtype, self.device)

        def run_on(some: Sequence[tuple[int, int]]) -> Callable[[], object]:
            images = [self.random.integers(0, 256, (3, *size), dtype=np.uint8) for size in some]
            return lambda: self.model.get_image_features([table.normalise(image) for image in images])

        def work(some: Sequence[tuple[int, int]]) -> float:
            area = self.arch.vision.patch_size**2
            return sum(tower_flops(self.arch, height * width // area) for height, width in some)

        smaller = [[(min(sizes[0][0], side * patch), min(sizes[0][1], side * patch))] for side in SMALL_PATCHES]
        return self._largest([(work(some), run_on(some)) for some in (*smaller, sizes[:1], sizes)])

    def embedding(self) -> float:
        """The tokens of a prompt."""
        ids = self._tokens(self.shapes.prompt_tokens)
        return self._time(lambda: language.embed(self.model.language_model, ids))

    def prefill(self) -> float:
        """A prompt, on one layer."""
        tokens, many = self.shapes.prompt_tokens, self.shapes.prefills

        def run_on(lengths: Sequence[int]) -> Callable[[], object]:
            pieces = tuple(Prefill(slot, 0, length, completes=True) for slot, length in enumerate(lengths))
            return self._step(self._cache(), _plan([], pieces))

        rungs = [*((min(tokens, small), 1) for small in SMALL_TOKENS), (tokens, 1), (tokens, many)]
        seconds = self._largest(
            [(count * layer_flops(self.arch, length), run_on([length] * count)) for length, count in rungs]
        )
        return seconds / self.layers / many

    def decode(self) -> float:
        """One token of each sequence, on one layer; the cache holds made-up keys and values."""
        cache, positions = self._cache(), self.shapes.positions
        pieces = tuple(Prefill(slot, 0, position, completes=True) for slot, position in enumerate(positions))
        cache.prepare(_plan([], pieces))
        run = self._step(cache, _plan(positions, ()))
        for bank in cache.banks.values():
            for layer in bank.layers:
                layer.normal_()
        return self._time(run) / self.layers

    def output(self) -> float:
        """Logits and the next token of each sequence."""
        rows = self.shapes.rows
        hidden_R1H = torch.randn(rows, 1, self.arch.hidden_size).to(self.device, self.dtype)
        keys, positions = np.arange(rows, dtype=np.uint64), np.asarray(self.shapes.positions, dtype=np.int64)

        def run() -> Tensor:
            logits = language.logits(self.model.language_model, hidden_R1H, None)
            return sample(logits, self.sampling, keys, positions).to("cpu")

        return self._time(run)

    # What they are made of

    def _cache(self) -> KVCache:
        heads, dim = self.arch.num_kv_heads, self.arch.head_dim
        budget = (self.shapes.rows + 1) * (self.shapes.prompt_tokens + self.shapes.new_tokens)
        return KVCache(self.layers, heads, dim, self.dtype, self.device, token_budget=budget)

    def _step(self, cache: KVCache, plan: StepPlan) -> Callable[[], object]:
        """The decoder layers alone: what a step costs besides, every stage has alike, whatever the split."""
        cache.prepare(plan)
        positions_T = torch.from_numpy(plan.positions()).to(self.device)
        params = PackedAttentionParams(
            rotary=self.rotary.tables(positions_T, self.dtype), context=CachedAttention(cache, plan, self.device)
        )
        hidden_T1H = torch.randn(len(positions_T), 1, self.arch.hidden_size).to(self.device, self.dtype)

        def run() -> Tensor:
            if not self.first:
                self.model.set_input_tensor(hidden_T1H)
            return language.run_layers(self.model.language_model, hidden_T1H if self.first else None, params)

        return run

    def _tokens(self, count: int) -> Tensor:
        return torch.from_numpy(self.random.integers(0, self.arch.vocab_size, count)).to(self.device)

    # Time

    def _largest(self, runs: Sequence[tuple[float, Callable[[], object]]]) -> float:
        """Seconds of the last of some ever larger runs, each with its FLOPs; of one that is too long see `reckoned`."""
        points: list[tuple[float, float]] = []
        largest = runs[-1][0]
        for work, run in runs:
            if points and (work <= points[-1][0] or (work < largest and reckoned(points, largest) < ENOUGH_S)):
                continue  # what is short anyway needs no smaller runs
            if len(points) > 1 and reckoned(points, work) > LONG_S:
                break
            points.append((work, self._time(run)))
        return reckoned(points, largest)

    def _time(self, run: Callable[[], object]) -> float:
        """The shortest of some runs, as others may use the cores, too.

        The first one does not count, unless it is so long that it hardly matters.
        """
        first = self._once(run)
        times = [first] if first > ONCE_S and self._warm else []
        while len(times) < MOST_REPEATS and sum(times) < (ENOUGH_S if len(times) >= LEAST_REPEATS else ONCE_S):
            times.append(self._once(run))
        self._warm = True
        return min(times)

    def _once(self, run: Callable[[], object]) -> float:
        started = time.perf_counter()
        if started > self._deadline:
            raise TimeoutError(f"the parts of the model were not measured within {LONGEST_S:.0f} s")
        with torch.inference_mode():
            run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def reckoned(points: Sequence[tuple[float, float]], work: float) -> float:
    """Seconds for so much `work`, on the line through the last two measured (work, seconds), or through 0 and one.

    A step has costs that do not grow with its work; most of all in bf16 on CPU, where weights are laid out anew.
    """
    (work_0, seconds_0), (work_1, seconds_1) = ((0.0, 0.0), *points)[-2:]
    slope = (seconds_1 - seconds_0) / (work_1 - work_0)
    # Two runs that others have disturbed can lie on any line: never less than a quarter of what proportion would say.
    return seconds_1 + max(slope, seconds_1 / work_1 / 4) * (work - work_1)


def fill(model: torch.nn.Module) -> None:
    """Small random weights, fast: one pattern again and again. (Zeros or denormal numbers would take other times.)"""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.empty(PATTERN).normal_(0, 0.02, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            values, copies = parameter.view(-1), pattern.to(parameter.device, parameter.dtype)
            for start in range(0, values.numel(), PATTERN):
                piece = values[start : start + PATTERN]
                piece.copy_(copies[: piece.numel()])
            if parameter.ndim == 1:
                parameter.fill_(1)


def _plan(decode_positions: Sequence[int], prefills: tuple[Prefill, ...]) -> StepPlan:
    """Of which nobody reads token ids or what to sample."""
    nothing = np.empty(0, dtype=np.int64)
    return StepPlan(
        step=0,
        microbatch=0,
        moves=(),
        token_ids=nothing.astype(np.int32),
        decode_positions=np.asarray(decode_positions, dtype=np.int32),
        prefills=prefills,
        sample_keys=nothing.astype(np.uint64),
        sample_positions=nothing,
    )
