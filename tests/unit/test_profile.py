"""The measurement itself, on small chunks of the quick start's model: what it follows, and that it ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ministral.captioning import profile as profile_module
from ray_ministral.captioning.costs import Profile, Shapes
from ray_ministral.captioning.profile import _Bench, measure
from ray_ministral.config import SamplingConfig, StageOptions, StageSpec

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model"
SHAPES = Shapes(((56, 84), (28, 28)), pixels_per_row=56 * 84, prompt_tokens=20, new_tokens=8, rows=3, prefills=2)


def measured(spec: StageSpec, shapes: Shapes = SHAPES) -> Profile:
    threads = torch.get_num_threads()
    try:
        return measure(StageOptions(str(MODEL), spec, "cpu", "float32", 1), SamplingConfig(), shapes)
    finally:
        torch.set_num_threads(threads)


def test_more_work_takes_longer() -> None:
    small = measured(StageSpec(0, 2, True, False), Shapes(((28, 28),), 28 * 28, 20, 8, 3, 2))
    sizes = ((112, 112),) * 4
    large = measured(StageSpec(0, 2, True, False), Shapes(sizes, 112 * 112, 600, 8, 32, 2))
    assert small.vision is not None
    assert large.vision is not None
    assert large.vision > 2 * small.vision, "sixty-four times the pixels, and what each pass costs"
    assert large.prefill > 4 * small.prefill, "thirty times the tokens"


def test_rows_without_images_have_no_vision() -> None:
    assert measured(StageSpec(0, 1, True, False), Shapes((), 0, 20, 8, 3, 2)).vision == 0


def test_a_measurement_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "LONGEST_S", 0.0)
    with pytest.raises(TimeoutError, match="not measured within 0 s"):
        measured(StageSpec(0, 1, True, False))


def test_the_layers_are_measured_without_what_every_step_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow embedding is a part of its own, and no part of a layer."""
    embed = profile_module.language.embed

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return embed(*arguments)

    monkeypatch.setattr(profile_module.language, "embed", slow)
    found = measured(StageSpec(0, 2, True, False))
    assert found.embedding is not None
    assert found.embedding > 0.2
    assert max(found.prefill, found.decode) < 0.1


@pytest.mark.parametrize(("seconds", "made"), [(0.001, [1, 100]), (0.06, [1, 10, 100])], ids=["short", "long"])
def test_what_is_short_needs_no_smaller_runs(seconds: float, made: list[int]) -> None:
    """Runs of 1, 10 and 100 FLOPs, each of so many seconds for ten of them."""
    runs: list[int] = []
    bench = _Bench.__new__(_Bench)
    bench._time = lambda run: run()  # type: ignore[method-assign,assignment]

    def run_of(work: int) -> Any:
        return lambda: (runs.append(work), work / 10 * seconds)[1]

    found = bench._largest([(float(work), run_of(work)) for work in (1, 10, 100)])
    assert runs == made
    assert found == pytest.approx(10 * seconds)
