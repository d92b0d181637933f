"""`CaptionStage`: a pipeline stage that prefills, decodes and (the last one) samples. Plain class, no Ray."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from ray_ministral.captioning.kv_cache import CachedAttention, KVCache
from ray_ministral.captioning.plan import StepPlan
from ray_ministral.captioning.request import Pixels
from ray_ministral.captioning.sampling import sample
from ray_ministral.captioning.step_times import StepSpan, StepTimes
from ray_ministral.config import SamplingConfig, StageOptions
from ray_ministral.data.images import ImagePreprocessor
from ray_ministral.errors import StaleStepError
from ray_ministral.model.architecture import Architecture
from ray_ministral.model.packed import PackedBatch
from ray_ministral.pipeline.pixels import PixelTable
from ray_ministral.pipeline.stage import PipelineStage
from ray_ministral.pipeline.wire import from_wire, to_wire


class CaptionStage(PipelineStage):
    """Runs `StepPlan`s; keeps the KV cache of each microbatch. `times` says what its steps took."""

    def __init__(
        self,
        options: StageOptions,
        sampling: SamplingConfig,
        kv_tokens_per_microbatch: int,
        *,
        traced: bool = False,
        generation: int = 0,
    ) -> None:
        super().__init__(options)
        self.generation = generation
        self.sampling = sampling
        self.kv_tokens_per_microbatch = kv_tokens_per_microbatch
        self._caches: dict[int, KVCache] = {}
        self._pixels: PixelTable | None = None
        self.times = StepTimes(traced=traced)

    def restart(self, generation: int) -> None:
        """Another stage was replaced: forget all sequences, and take plans of this generation alone."""
        self._caches.clear()
        self.generation = generation

    def step(self, plan: StepPlan, hidden: np.ndarray | None, *blocks: Pixels) -> np.ndarray:
        """One step: what the next stage takes as `hidden`, or the sampled token ids (int32) on the last stage.

        `blocks` are the pixel blocks that the plan's `Prefill.images` count, for the first stage.
        Raises `StaleStepError` for a plan of another generation.
        """
        if plan.generation != self.generation:
            raise StaleStepError(
                f"step {plan.step} is of generation {plan.generation}, the stage of generation {self.generation}"
            )
        started, begun = time.time(), time.perf_counter()
        cache = self._cache(plan.microbatch)
        cache.prepare(plan)
        batch = PackedBatch(
            positions_T=torch.from_numpy(plan.positions()).to(self.device),
            lengths=plan.lengths(),
            token_ids_T=torch.from_numpy(plan.token_ids).to(self.device, torch.int64) if self.spec.is_first else None,
            images=self._images(plan, blocks) if self.spec.is_first else (),
            prompt_start=plan.num_decode,
            logit_rows=torch.from_numpy(plan.sampled_rows()).to(self.device) if self.spec.is_last else None,
            attention=CachedAttention(cache, plan, self.device),
        )
        received = None if hidden is None else from_wire(hidden, self.dtype, self.device)
        model_begun = time.perf_counter()
        output = self.run(batch, received)
        if self.spec.is_last:
            output = sample(output, self.sampling, plan.sample_keys, plan.sample_positions)
        if self.device.type == "cuda":
            # The copy below waits for the device anyway. What was queued before the model counts to the model.
            torch.cuda.synchronize(self.device)
        model_ended = time.perf_counter()
        result = output.to("cpu", torch.int32).numpy() if self.spec.is_last else to_wire(output)
        self.times.add(
            StepSpan(
                step=plan.step,
                microbatch=plan.microbatch,
                started=started,
                seconds=time.perf_counter() - begun,
                before_seconds=model_begun - begun,
                model_seconds=model_ended - model_begun,
                prefill_tokens=sum(piece.length for piece in plan.prefills),
                decode_tokens=plan.num_decode,
                images=len(batch.images),
            )
        )
        return result

    def _cache(self, microbatch: int) -> KVCache:
        if microbatch not in self._caches:
            arch = Architecture.from_config(self.model.hf_config)
            self._caches[microbatch] = KVCache(
                len(self.spec.layers),
                arch.num_kv_heads,
                arch.head_dim,
                self.dtype,
                self.device,
                token_budget=self.kv_tokens_per_microbatch,
            )
        return self._caches[microbatch]

    def _images(self, plan: StepPlan, blocks: tuple[Pixels, ...]) -> list[Tensor]:
        """The plan's images, normalised."""
        if self._pixels is None:
            table = ImagePreprocessor(self.options.model_dir).normalisation_table()
            self._pixels = PixelTable(table, self.dtype, self.device)
        return [
            self._pixels.normalise(pixels)
            for piece in plan.prefills
            for block, row in piece.images
            for pixels in blocks[block][row]
        ]
