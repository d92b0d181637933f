"""What a caption costs on each part of the model, out of a short measurement: where to cut the model into stages.

Pure: no torch, no Ray. `profile` measures on a stage, the driver decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ray_ministral.captioning.batching import microbatches_for
from ray_ministral.captioning.plan import in_blocks
from ray_ministral.captioning.request import PreparedRow
from ray_ministral.config import PipelineConfig, SamplingConfig
from ray_ministral.model.architecture import Architecture
from ray_ministral.pipeline.partition import Costs, Workload

SAMPLE_IMAGES = 4
"""Images that the vision tower is measured with at most."""

SAMPLE_PROMPT_TOKENS = 512
"""Tokens of the prompts that are measured together, at most, unless one alone has more."""


@dataclass(frozen=True)
class Shapes:
    """What a job's rows are like, as far as it matters for the time that they take.

    image_sizes: (height, width) of a few typical images after resizing; empty for text-only rows.
    pixels_per_row: of all images of a row, on average.
    prompt_tokens: of a row, images included, on average. new_tokens: expected for a row, at least 1.
    rows: sequences that decode together in a microbatch. prefills: prompts to measure together.
    """

    image_sizes: tuple[tuple[int, int], ...]
    pixels_per_row: float
    prompt_tokens: int
    new_tokens: int
    rows: int
    prefills: int

    @property
    def sample_pixels(self) -> int:
        """Of `image_sizes`."""
        return sum(height * width for height, width in self.image_sizes)

    @property
    def positions(self) -> tuple[int, ...]:
        """Where each of the `rows` is: some have just begun, some are nearly done."""
        return tuple(self.prompt_tokens + index * self.new_tokens // self.rows for index in range(self.rows))

    @classmethod
    def of(
        cls,
        rows: Sequence[PreparedRow],
        job_rows: int,
        arch: Architecture,
        config: PipelineConfig,
        sampling: SamplingConfig,
    ) -> Shapes:
        """Of a job with `job_rows` rows, by the first ones of them; by a usual request where there are no good ones."""
        limit = sampling.max_new_tokens
        prompts = [(len(row.token_ids), row.image_sizes) for row in rows if row.token_ids is not None]
        limits = [min(limit, row.max_new_tokens or limit) for row in rows if row.token_ids is not None]
        if not prompts:
            prompts, limits = [_usual(arch)], [limit]
        images = [size for _, sizes in prompts for size in sizes]
        pixels = sum(height * width for height, width in images)
        prompt_tokens = max(1, round(sum(tokens for tokens, _ in prompts) / len(prompts)))
        # Where an end-of-text token counts, nobody knows how soon it comes.
        expected = sum(limits) / len(limits) * (1.0 if sampling.ignore_eos else 0.5)
        own_rows = -(-job_rows // config.replicas)
        microbatches = microbatches_for(own_rows, config.microbatches, config.rows_per_microbatch)
        held = in_blocks(prompt_tokens + limit)
        return cls(
            image_sizes=tuple(images[index * len(images) // SAMPLE_IMAGES] for index in range(SAMPLE_IMAGES))
            if len(images) > SAMPLE_IMAGES
            else tuple(images),
            pixels_per_row=pixels / len(prompts),
            prompt_tokens=prompt_tokens,
            new_tokens=max(1, round(expected)),
            rows=max(
                1,
                min(config.rows_per_microbatch, config.kv_tokens_per_microbatch // held, -(-own_rows // microbatches)),
            ),
            prefills=max(1, min(4, SAMPLE_PROMPT_TOKENS // prompt_tokens)),
        )


def _usual(arch: Architecture) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Tokens and image of the prompt of a usual request."""
    work, patch = Workload(), arch.vision.merged_patch_size
    side = max(1, min(work.image_side, arch.vision.image_size) // patch)
    return side * side + side + work.text_tokens, ((side * patch, side * patch),)


@dataclass(frozen=True)
class Profile:
    """Seconds that were measured on one stage, at some `Shapes`; None for what this stage will not hold.

    vision: the images of `image_sizes`. embedding: the tokens of one prompt. prefill: one prompt, on one layer.
    decode: a step of `rows` sequences, on one layer. output: logits and sampling for `rows` sequences.
    """

    prefill: float
    decode: float
    vision: float | None = None
    embedding: float | None = None
    output: float | None = None


def costs_of(profiles: Sequence[Profile], shapes: Shapes, num_layers: int) -> Costs:
    """Seconds for each caption. A layer costs what it does on the slowest of the stages.

    Raises ValueError where the profiles of all stages together lack a part, or have something that is no duration.
    """
    for profile in profiles:
        for name, seconds in vars(profile).items():
            if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"{name} was measured as {seconds} seconds")
    vision, embedding, output = (_slowest(profiles, part) for part in ("vision", "embedding", "output"))
    # The prompt gives a caption its first token.
    layer = max(p.prefill + (shapes.new_tokens - 1) * p.decode / shapes.rows for p in profiles)
    if not layer > 0:
        raise ValueError("a decoder layer takes no time at all")
    pixels = shapes.pixels_per_row / shapes.sample_pixels if shapes.sample_pixels else 0.0
    return Costs((layer,) * num_layers, vision * pixels + embedding, output * shapes.new_tokens / shapes.rows)


def _slowest(profiles: Sequence[Profile], part: str) -> float:
    """Of the stages that have measured the part."""
    found: list[float] = [getattr(profile, part) for profile in profiles if getattr(profile, part) is not None]
    if not found:
        raise ValueError(f"nobody has measured the part {part!r}")
    return max(found)
