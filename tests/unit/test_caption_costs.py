"""What a caption costs by what was measured, in numbers; and a measurement of the real parts of the small model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ray_ministral.captioning.costs import SAMPLE_IMAGES, Profile, Shapes, costs_of
from ray_ministral.captioning.request import PreparedRow, RowFailure
from ray_ministral.config import PipelineConfig, SamplingConfig, StageOptions, StageSpec
from ray_ministral.model.architecture import Architecture, load_config

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model"
ARCH = Architecture.from_config(load_config(MODEL))
FIRST = Profile(prefill=0.01, decode=0.04, vision=0.5, embedding=0.002)
LAST = Profile(prefill=0.02, decode=0.04, output=0.3)


def shapes(**changes: object) -> Shapes:
    fields: dict[str, object] = {
        "image_sizes": ((28, 56), (56, 56)),
        "pixels_per_row": 1176.0,  # a quarter of what the sample has
        "prompt_tokens": 20,
        "new_tokens": 11,
        "rows": 4,
        "prefills": 2,
    }
    return Shapes(**fields | changes)  # type: ignore[arg-type]


def test_costs_are_seconds_for_each_caption() -> None:
    costs = costs_of([FIRST, Profile(0.01, 0.04), LAST], shapes(), 6)
    # The slowest prefill, and ten more steps that four rows share.
    assert costs.layers == pytest.approx((0.02 + 10 * 0.04 / 4,) * 6)
    assert costs.first == pytest.approx(0.5 / 4 + 0.002)
    assert costs.last == pytest.approx(11 * 0.3 / 4)


def test_a_layer_costs_what_it_does_on_the_slowest_stage_alone() -> None:
    other = Profile(prefill=0.0, decode=0.4)
    assert costs_of([FIRST, other, LAST], shapes(), 1).layers == pytest.approx((10 * 0.4 / 4,))


def test_rows_without_images_cost_no_vision() -> None:
    text = shapes(image_sizes=(), pixels_per_row=0.0)
    costs = costs_of([Profile(0.01, 0.04, vision=0.0, embedding=0.002), LAST], text, 2)
    assert costs.first == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("profiles", "says"),
    [
        ([], "nobody has measured"),
        ([FIRST], "nobody has measured"),
        ([LAST], "nobody has measured"),
        ([FIRST, Profile(math.nan, 0.04, output=0.3)], "prefill was measured as nan seconds"),
        ([FIRST, Profile(0.01, -1.0, output=0.3)], r"decode was measured as -1\.0 seconds"),
        ([FIRST, Profile(0.01, 0.04, output=math.inf)], "output was measured as inf seconds"),
        ([Profile(0, 0, 0.5, 0.1), Profile(0, 0, output=0.3)], "no time at all"),
    ],
)
def test_what_is_no_measurement(profiles: list[Profile], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        costs_of(profiles, shapes(), 2)


def row(tokens: int, *sizes: tuple[int, int], limit: int | None = None) -> PreparedRow:
    return PreparedRow(0, np.zeros(tokens, np.int32), sizes, None, limit)


FAILED = PreparedRow(1, None, (), RowFailure("bad_image", "no image", "decode"))


def test_shapes_are_those_of_the_first_good_rows() -> None:
    rows = [row(30, (28, 28), (56, 28)), FAILED, row(50)]
    found = Shapes.of(rows, 1000, ARCH, PipelineConfig(stages=2), SamplingConfig(max_new_tokens=20))
    assert found == Shapes(
        image_sizes=((28, 28), (56, 28)),
        pixels_per_row=(28 * 28 + 56 * 28) / 2,
        prompt_tokens=40,
        new_tokens=10,
        rows=128,
        prefills=4,
    )
    assert found.positions[0] == 40
    assert max(found.positions) < 50


def test_of_many_images_some_are_taken_from_all_over() -> None:
    rows = [row(30, (28, 28 * (index + 1))) for index in range(16)]
    found = Shapes.of(rows, 1000, ARCH, PipelineConfig(stages=2), SamplingConfig())
    assert found.image_sizes == ((28, 28), (28, 140), (28, 252), (28, 364))
    assert len(found.image_sizes) == SAMPLE_IMAGES
    assert found.pixels_per_row == 28 * 28 * 8.5


@pytest.mark.parametrize(
    ("sampling", "limits", "expected"),
    [
        ({"max_new_tokens": 40}, (None, None), 20),
        ({"max_new_tokens": 40, "ignore_eos": True}, (None, None), 40),
        ({"max_new_tokens": 40, "ignore_eos": True}, (10, None), 25),
        ({"max_new_tokens": 40, "ignore_eos": True}, (10, 100), 25),
        ({"max_new_tokens": 1}, (None, None), 1),
    ],
)
def test_expected_new_tokens(sampling: dict[str, object], limits: tuple[int | None, ...], expected: int) -> None:
    rows = [row(30, limit=limit) for limit in limits]
    found = Shapes.of(rows, 9, ARCH, PipelineConfig(stages=2), SamplingConfig(**sampling))  # type: ignore[arg-type]
    assert found.new_tokens == expected


@pytest.mark.parametrize(
    ("job_rows", "options", "expected"),
    [
        (1000, {}, 128),
        (1000, {"rows_per_microbatch": 5}, 5),
        (20, {}, 10),
        (20, {"replicas": 2}, 5),
        (300, {}, 100),
        (1000, {"kv_tokens_per_microbatch": 640}, 5),  # 30 + 64 tokens are two blocks of 64
        (1, {"kv_tokens_per_microbatch": 94}, 1),
    ],
)
def test_rows_that_decode_together(job_rows: int, options: dict[str, int], expected: int) -> None:
    config = PipelineConfig(stages=2, **options)  # type: ignore[arg-type]
    assert Shapes.of([row(30)], job_rows, ARCH, config, SamplingConfig()).rows == expected


def test_without_good_rows_a_usual_request_is_taken() -> None:
    found = Shapes.of([FAILED], 1000, ARCH, PipelineConfig(stages=2), SamplingConfig())
    assert found == Shapes.of([], 1000, ARCH, PipelineConfig(stages=2), SamplingConfig())
    assert found.image_sizes == ((112, 112),), "the largest image of this model is smaller than a usual one"
    assert found.prompt_tokens == 16 + 4 + 32


def test_times_are_reckoned_on_a_line() -> None:
    from ray_ministral.captioning.profile import reckoned

    assert reckoned([(10.0, 2.0)], 10.0) == 2.0
    assert reckoned([(10.0, 2.0)], 30.0) == 6.0
    assert reckoned([(5.0, 9.0), (10.0, 2.0), (20.0, 3.0)], 40.0) == pytest.approx(5.0)
    # The larger run was faster, which nothing but a disturbance can be.
    assert reckoned([(10.0, 4.0), (20.0, 2.0)], 40.0) == pytest.approx(2.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stages_measure_what_they_will_hold(dtype: str) -> None:
    from ray_ministral.captioning.profile import measure

    rows = [row(60, (56, 56)), row(40, (28, 84)), row(35)]
    config, sampling = PipelineConfig(stages=3), SamplingConfig(max_new_tokens=8, temperature=1.0, top_p=0.9)
    found = Shapes.of(rows, 40, ARCH, config, sampling)
    profiles = []
    for spec in (StageSpec(0, 1, True, False), StageSpec(1, 3, False, False), StageSpec(3, 4, False, True)):
        options = StageOptions(str(MODEL), spec, "cpu", dtype)  # type: ignore[arg-type]
        profiles.append(measure(options, sampling, found))
    for profile in profiles:
        assert 0 < profile.prefill < 10
        assert 0 < profile.decode < 10
    assert [(p.vision is None, p.embedding is None, p.output is None) for p in profiles] == [
        (False, False, True),
        (True, True, True),
        (True, True, False),
    ]
    costs = costs_of(profiles, found, ARCH.num_layers)
    assert min(costs.first, costs.last, *costs.layers) > 0


def test_no_weight_is_zero_or_no_number() -> None:
    import torch

    from ray_ministral.captioning.profile import PATTERN, fill

    small = torch.nn.Linear(3, 5)
    large = torch.nn.Linear(1, PATTERN + 7, bias=False)
    for parameter in (small.weight, small.bias, large.weight):
        parameter.data.fill_(math.nan)
    fill(small)
    fill(large)
    assert (small.bias == 1).all()
    for weight in (small.weight, large.weight):
        assert weight.isfinite().all()
        assert 0.005 < weight.std() < 0.04
