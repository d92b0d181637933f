"""What the captioning benchmark says beside seconds, on numbers that were counted by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.caption_figures import TIE, Agreement, DriverWatch, flops_per_image, partings, read_json
from ray_ministral.model.architecture import Architecture, VisionArchitecture

ARCH = Architecture(
    num_layers=3,
    hidden_size=4,
    ffn_hidden_size=5,
    num_heads=2,
    num_kv_heads=1,
    head_dim=3,
    vocab_size=7,
    max_positions=64,
    tied_embeddings=True,
    vision=VisionArchitecture(
        num_layers=2, hidden_size=6, ffn_hidden_size=8, num_heads=2, patch_size=2, merge_size=2, image_size=8
    ),
)
# Query, key and value, output; gate, up and down; two norms.
LAYER = 4 * 6 + 2 * 4 * 3 + 6 * 4 + 3 * 4 * 5 + 2 * 4
# Two layers of four square matrices, gate, up and down, and two norms; patches of 2 x 2 x 3 and their norm;
# then the projector: norm, merger of four patches, two matrices.
VISION = 2 * (4 * 6 * 6 + 3 * 6 * 8 + 2 * 6) + 12 * 6 + 6 + 6 + 4 * 6 * 6 + 6 * 4 + 4 * 4


@pytest.mark.parametrize(
    ("patches", "prompt", "new", "fed", "vision"),
    [
        # Scores and sums of values: 5 x 5, of 6 numbers, in 2 layers.
        (5, 10, 3, 12, 2 * VISION * 5 + 2 * 2 * 5 * 5 * 6 * 2),
        (0, 10, 3, 12, 0),
        (0, 10, 1, 10, 0),
    ],
)
def test_flops_of_one_row(patches: int, prompt: int, new: int, fed: int, vision: int) -> None:
    attention = 2 * 2 * fed * fed * 6 / 2  # half of scores and sums of values, of 6 numbers in all heads
    expected = vision + 3 * (2 * LAYER * fed + attention) + 2 * 7 * 4 * new
    assert flops_per_image(ARCH, [(patches, prompt, new)]) == expected


def test_flops_of_many_rows_are_a_mean() -> None:
    # 25312 and 12056: the first and the last row of above.
    assert flops_per_image(ARCH, [(5, 10, 3), (0, 10, 1)]) == 18684


@pytest.mark.parametrize(
    ("equal", "gap", "holds", "text"),
    [
        (4, None, True, "4 of 4"),
        (3, 0.0, True, "3 of 4, ties (gap 0.0e+00)"),
        (3, 0.00025, True, "3 of 4, ties (gap 2.5e-04)"),
        (3, TIE, True, "3 of 4, ties (gap 1.0e-03)"),
        (3, 0.0011, False, "3 of 4, NO TIES (gap 1.1e-03)"),
        (2, 3.0, False, "2 of 4, NO TIES (gap 3.0e+00)"),
        (3, math.nan, False, "3 of 4, NO TIES (gap nan)"),
        (0, math.inf, False, "0 of 4, NO TIES (gap inf)"),
    ],
)
def test_agreement_holds_where_nothing_but_ties_differs(equal: int, gap: float | None, holds: bool, text: str) -> None:
    agreement = Agreement(4, equal, gap)
    assert agreement.holds is holds
    assert str(agreement) == text


@pytest.mark.parametrize("ids", [[], [[]], [[1, 2], [3]]])
def test_equal_rows_do_not_part(ids: list[list[int]]) -> None:
    assert partings(ids, [list(row) for row in ids]) == []


def test_rows_part_at_the_first_token_that_differs() -> None:
    expected = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    found = [[1, 2, 30], [4, 5], [60], [7, 80, 9, 100]]
    assert partings(expected, found) == [(0, [1, 2], 3, 30), (2, [], 6, 60), (3, [7], 8, 80)]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([[1, 2], [3, 4]], "row 1 has 2 tokens, wanted 3"),
        ([[1, 2], [3, 4, 5, 6]], "row 1 has 4 tokens, wanted 3"),
        ([[1, 20], []], "row 1 has 0 tokens, wanted 3"),
        ([[1, 2]], "shorter"),
        ([[1, 2], [3, 4, 5], [6]], "longer"),
    ],
)
def test_other_lengths_are_no_partings(found: list[list[int]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        partings([[1, 2], [3, 4, 5]], found)


def table(samples: list[tuple[float, int, int]], rows: int, working_seconds: float) -> list[str]:
    head, rule, *quarters = DriverWatch(Path("unused"), 2, samples).table(rows, working_seconds).splitlines()
    assert head == "| rows | ms per image of the quarter | driver's RSS MB |"
    assert rule == "| --- | --- | --- |"
    return quarters


def test_quarters_of_a_long_job() -> None:
    samples = [
        (1.0, 0, 5_000_000),
        (2.5, 2, 10_000_000),
        (2.75, 2, 99_000_000),
        (3.0, 4, 20_400_000),
        (4.0, 6, 20_600_000),
        (6.0, 8, 30_000_000),
        (9.0, 8, 99_000_000),
    ]
    # The work began 4 seconds before the last commit, at 2.
    assert table(samples, 8, 4.0) == [
        "| 2 | 250.0 | 10 |",
        "| 4 | 250.0 | 20 |",
        "| 6 | 500.0 | 21 |",
        "| 8 | 1000.0 | 30 |",
    ]


def test_quarters_that_end_at_one_sample_are_one() -> None:
    samples = [(1.0, 0, 1_000_000), (3.0, 4, 2_000_000), (5.0, 8, 3_000_000)]
    assert table(samples, 8, 4.0) == [
        "| 2 | 500.0 | 2 |",
        "| 4 | with the one before | 2 |",
        "| 6 | 500.0 | 3 |",
        "| 8 | with the one before | 3 |",
    ]


def test_a_quarter_that_ends_within_a_part_has_the_time_of_whole_parts() -> None:
    samples = [(1.0, 2, 1_000_000), (3.0, 4, 2_000_000), (6.0, 6, 3_000_000)]
    assert table(samples, 6, 6.0) == [
        "| 1 | 500.0 | 1 |",
        "| 3 | 1000.0 | 2 |",
        "| 4 | with the one before | 2 |",
        "| 6 | 1500.0 | 3 |",
    ]


def test_json_is_read_from_a_file(tmp_path: Path) -> None:
    content = {"rows": 3, "stage_busy": [0.5, 1.0], "failed": None}
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(content))
    assert read_json(path) == content
