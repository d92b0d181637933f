"""Ladder H: greedy captions, token for token, against Hugging Face's `generate`, whatever the batch and the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_ministral.captioning import plan as plan_module
from ray_ministral.captioning.plan import Prefill, StepPlan
from ray_ministral.captioning.stage import CaptionStage
from ray_ministral.config import SamplingConfig
from tests.parity.caption_runs import Run, caption, generate, make_stages, margins, run_step, until_stop
from tests.parity.small_models import (
    IMAGE_TOKEN,
    YARN,
    Row,
    make_row,
    mixed_rows,
    save_directory,
    small_config,
    small_model,
)

SPLITS = [(4,), (1, 3), (2, 1, 1)]
NEW = 12


def many_rows(seed: int = 1) -> list[Row]:
    """Three times the mixed shapes, shuffled, with other contents each time."""
    rows = [row for turn in range(3) for row in mixed_rows(seed * 10 + turn)]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


@pytest.fixture(scope="module")
def expected(reference: Any) -> list[list[int]]:
    """What Hugging Face generates for `many_rows()`, row by row, with nothing to stop it."""
    captions = generate(reference(), many_rows(), max_new_tokens=NEW)
    assert len({tuple(ids) for ids in captions}) == len(captions), "rows must have captions of their own"
    assert np.mean([len(set(ids)) for ids in captions]) > 4, "captions of one repeated token prove little"
    assert margins(reference(), many_rows(), captions) > 1e-4, "greedy choices closer than rounding"
    return captions


@pytest.fixture(scope="module")
def stop_ids(expected: list[list[int]]) -> list[int]:
    """Ids with which some captions stop early, at different places, and others don't."""
    for stop in sorted({id_ for ids in expected for id_ in ids[2:8]}):
        lengths = [len(until_stop(ids, [stop])) for ids in expected]
        if len(set(lengths)) >= 4 and NEW in lengths:
            return [stop]
    raise AssertionError("no id stops the captions at different places")


def test_hugging_face_agrees_with_itself(expected: list[list[int]], reference: Any) -> None:
    """Left-padded in one batch it gives what it gives row by row: the yardstick is straight."""
    assert generate(reference(), many_rows(), max_new_tokens=NEW, batch=True) == expected


@pytest.mark.parametrize(("rows_per_microbatch", "block_tokens"), [(1, 64), (3, 8), (32, 64), (32, 8)])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_greedy(
    split: tuple[int, ...],
    rows_per_microbatch: int,
    block_tokens: int,
    expected: Any,
    stop_ids: Any,
    directory: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "BLOCK_TOKENS", block_tokens)
    run = caption(
        directory(),
        many_rows(),
        split=split,
        rows_per_microbatch=rows_per_microbatch,
        stop_ids=stop_ids,
        order_seed=rows_per_microbatch,
    )
    assert run.captions == [until_stop(ids, stop_ids) for ids in expected]
    assert run.reasons == ["stop" if ids[-1] in stop_ids else "length" for ids in run.captions]
    assert set(run.reasons) == {"stop", "length"}
    if rows_per_microbatch > 1:
        assert run.moves, "no slot was reused by a move, so none was tested"
        assert any(plan.num_decode and plan.prefills for plan in run.plans), "no step both decoded and took in prompts"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ["yarn", "default"])
def test_greedy_on_other_models(tied: bool, rope: str, reference: Any, directory: Any) -> None:
    rows = mixed_rows(5)
    theirs = generate(reference(tied=tied, rope=rope), rows, max_new_tokens=20)
    assert margins(reference(tied=tied, rope=rope), rows, theirs) > 1e-4
    assert max(len(row.token_ids) for row in rows) + 20 > 3 * 16, "must reach beyond the original positions"
    sampling = SamplingConfig(max_new_tokens=20)
    assert caption(directory(tied=tied, rope=rope), rows, split=(2, 2), sampling=sampling).captions == theirs


def test_one_new_token(reference: Any, directory: Any) -> None:
    rows = mixed_rows()
    run = caption(directory(), rows, split=(2, 2), sampling=SamplingConfig(max_new_tokens=1))
    assert run.captions == generate(reference(), rows, max_new_tokens=1)
    assert not any(plan.num_decode for plan in run.plans)


@pytest.mark.parametrize(("kv_tokens", "tokens_per_step"), [(160, 8192), (4096, 40), (130, 1)])
def test_tight_limits(kv_tokens: int, tokens_per_step: int, expected: Any, directory: Any) -> None:
    """Little room for keys and values, few tokens a step: the cache grows, shrinks and is reused."""
    run = caption(directory(), many_rows(), split=(1, 3), kv_tokens=kv_tokens, tokens_per_step=tokens_per_step)
    assert run.captions == expected


def test_the_cache_stays_within_its_bound(directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short rows, then few long ones: both fit, and the memory for both at once does not."""
    generator = np.random.default_rng(3)
    short = [make_row(generator, 3) for _ in range(24)]
    long = [make_row(generator, 150) for _ in range(2)]
    biggest = 0
    step = CaptionStage.step

    def watch(self: CaptionStage, *arguments: Any) -> np.ndarray:
        nonlocal biggest
        result = step(self, *arguments)
        biggest = max(biggest, *(cache.tokens for cache in self._caches.values()))
        return result

    monkeypatch.setattr(CaptionStage, "step", watch)
    run = caption(directory(), [*short, *long, *short], kv_tokens=512, rows_per_microbatch=16, microbatches=1)
    monkeypatch.undo()
    assert 0 < biggest <= 512
    alone = caption(directory(), [short[0], long[0]], rows_per_microbatch=1)
    assert [run.captions[0], run.captions[24]] == alone.captions


def test_a_generated_image_token_is_just_a_token(tmp_path: Path) -> None:
    """A model may say [IMG] while others bring images into the same step; `generate` embeds it like any other."""
    theirs = small_model(small_config())
    rows = [row for turn in range(4) for row in mixed_rows(turn)]
    directions = []
    hook = theirs.lm_head.register_forward_pre_hook(lambda _, given: directions.append(given[0][0, -1]))
    generate(theirs, rows[:6], max_new_tokens=4)
    hook.remove()
    with torch.no_grad():
        common = torch.stack(directions).mean(0)
        usual_best = torch.stack(directions).matmul(theirs.lm_head.weight.T).max(1).values.mean()
        theirs.lm_head.weight[IMAGE_TOKEN] = common * usual_best / common.dot(torch.stack(directions).mean(0))
    captions = generate(theirs, rows, max_new_tokens=NEW)
    said = sum(IMAGE_TOKEN in ids[:-1] for ids in captions)
    assert 0 < said < len(rows)
    run = caption(save_directory(theirs, tmp_path / "model"), rows, split=(2, 2), rows_per_microbatch=3)
    with_images = [plan for plan in run.plans if any(piece.images for piece in plan.prefills)]
    assert any(IMAGE_TOKEN in plan.token_ids[: plan.num_decode] for plan in with_images), "it never happened"
    assert run.captions == captions


def test_rows_without_an_image_only(reference: Any, directory: Any) -> None:
    generator = np.random.default_rng(9)
    rows = [make_row(generator, text) for text in (1, 30, 2, 2, 11)]
    run = caption(directory(), rows, split=(2, 2), rows_per_microbatch=2)
    assert run.captions == generate(reference(), rows, max_new_tokens=NEW)


def test_far_beyond_the_original_positions(tmp_path: Path) -> None:
    """Two hundred positions with a scale that changes every eight."""
    theirs = small_model(small_config(rope={**YARN, "original_max_position_embeddings": 8}))
    generator = np.random.default_rng(2)
    rows = [make_row(generator, 170, [(2, 2)]), make_row(generator, 6)]
    captions = generate(theirs, rows, max_new_tokens=40)
    assert margins(theirs, rows, captions) > 1e-4
    folder = save_directory(theirs, tmp_path / "model")
    assert caption(folder, rows, split=(1, 3), sampling=SamplingConfig(max_new_tokens=40)).captions == captions


def test_bfloat16_stages_give_the_same_bits(directory: Any) -> None:
    """Rounding may change what bf16 says, cutting may not: same plans, same tokens on one, two and four stages."""
    sampling = SamplingConfig(max_new_tokens=NEW)
    rows = mixed_rows()
    results = []
    for split in ((4,), (1, 3), (1, 1, 1, 1)):
        stages = make_stages(directory(), split, sampling, dtype="bfloat16")
        plan = prompt_plan(rows)
        tokens = run_step(stages, plan, [[list(row.images) for row in rows]])
        said = [tokens.tolist()]
        for step in range(1, 5):
            plan = decode_plan(rows, tokens, step)
            tokens = run_step(stages, plan)
            said.append(tokens.tolist())
        results.append(said)
    assert results[0] == results[1] == results[2]


# Plans made by hand


def prompt_plan(rows: list[Row], **changes: Any) -> StepPlan:
    """Whole prompts of all rows in one step."""
    lengths = [len(row.token_ids) for row in rows]
    values: dict[str, Any] = {
        "step": 0,
        "microbatch": 0,
        "moves": (),
        "token_ids": np.concatenate([row.token_ids.numpy() for row in rows]).astype(np.int32),
        "decode_positions": np.empty(0, np.int32),
        "prefills": tuple(
            Prefill(slot, 0, length, True, ((0, slot),) if rows[slot].images else ())
            for slot, length in enumerate(lengths)
        ),
        "sample_keys": np.zeros(len(rows), np.uint64),
        "sample_positions": np.asarray(lengths, np.int64),
    }
    return StepPlan(**(values | changes))


def decode_plan(rows: list[Row], tokens: np.ndarray, step: int) -> StepPlan:
    """The next token of all rows; `step` is 1 for the token after the prompt's first."""
    positions = np.asarray([len(row.token_ids) + step - 1 for row in rows])
    return StepPlan(
        step=step,
        microbatch=0,
        moves=(),
        token_ids=tokens.astype(np.int32),
        decode_positions=positions.astype(np.int32),
        prefills=(),
        sample_keys=np.zeros(len(rows), np.uint64),
        sample_positions=positions + 1,
    )


def cut_points(row: Row, pieces: int) -> list[int]:
    """Where a prompt may be cut: anywhere but inside an image."""
    ids = row.token_ids.numpy()
    inside = np.isin(ids, (IMAGE_TOKEN, 6))
    allowed = [place for place in range(1, len(ids)) if not inside[place - 1]]
    chosen = [allowed[piece * len(allowed) // pieces] for piece in range(1, pieces)]
    assert len(set(chosen)) == pieces - 1
    return [0, *chosen, len(ids)]


@pytest.mark.parametrize("split", [(4,), (1, 3)], ids=str)
@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_prefill_in_pieces(pieces: int, split: tuple[int, ...], directory: Any, reference: Any) -> None:
    """Prompts in pieces beside a row that decodes: the same keys, values and tokens as whole prompts."""
    sampling = SamplingConfig(max_new_tokens=NEW)
    rows = mixed_rows()
    decoding, prompts = rows[1], [rows[0], rows[2], rows[4]]
    expected = generate(reference(), [decoding, *prompts], max_new_tokens=pieces + 3)
    stages = make_stages(directory(), split, sampling)
    said: list[list[int]] = [[], [], [], []]
    said[0].append(int(run_step(stages, prompt_plan([decoding]))[0]))
    cuts = [cut_points(row, pieces) for row in prompts]
    for turn in range(pieces):
        prefills, ids, blocks, sampled = [], [np.asarray([said[0][-1]])], [], [0]
        for slot, (row, points) in enumerate(zip(prompts, cuts, strict=True), start=1):
            start, stop = points[turn], points[turn + 1]
            ends = np.flatnonzero(row.token_ids.numpy() == 7)
            here = [n for n, end in enumerate(ends) if start <= end < stop]
            images = ((len(blocks), 0),) if here else ()
            if here:
                blocks.append([[row.images[n] for n in here]])
            complete = stop == len(row.token_ids)
            prefills.append(Prefill(slot, start, stop - start, complete, images))
            ids.append(row.token_ids.numpy()[start:stop])
            if complete:
                sampled.append(slot)
        position = len(decoding.token_ids) + turn
        plan = StepPlan(
            step=turn + 1,
            microbatch=0,
            moves=(),
            token_ids=np.concatenate(ids).astype(np.int32),
            decode_positions=np.asarray([position], np.int32),
            prefills=tuple(prefills),
            sample_keys=np.zeros(len(sampled), np.uint64),
            sample_positions=np.zeros(len(sampled), np.int64),
        )
        for slot, token in zip(sampled, run_step(stages, plan, blocks).tolist(), strict=True):
            said[slot].append(token)
    assert [len(ids) for ids in said] == [pieces + 1, 1, 1, 1]
    for _ in range(2):
        positions = [len(row.token_ids) + len(ids) - 1 for row, ids in zip([decoding, *prompts], said, strict=True)]
        plan = StepPlan(
            step=99,
            microbatch=0,
            moves=(),
            token_ids=np.asarray([ids[-1] for ids in said], np.int32),
            decode_positions=np.asarray(positions, np.int32),
            prefills=(),
            sample_keys=np.zeros(4, np.uint64),
            sample_positions=np.asarray(positions) + 1,
        )
        for ids, token in zip(said, run_step(stages, plan).tolist(), strict=True):
            ids.append(token)
    assert said == [ids[: len(mine)] for ids, mine in zip(expected, said, strict=True)]


# Sampling


SAMPLED = SamplingConfig(max_new_tokens=NEW, temperature=1.3, top_k=40, top_p=0.9, seed=7)


def keys_of(rows: list[Row]) -> list[int]:
    """As large as hashes are."""
    return [2**64 - 1 - 977 * index for index in range(len(rows))]


@pytest.fixture(scope="module")
def sampled(directory: Any) -> Run:
    run = caption(directory(), many_rows(), sampling=SAMPLED, keys=keys_of(many_rows()), rows_per_microbatch=1)
    assert len({tuple(ids) for ids in run.captions}) == len(run.captions)
    return run


@pytest.mark.parametrize(
    "shape",
    [
        {"split": (4,), "rows_per_microbatch": 32},
        {"split": (1, 3), "rows_per_microbatch": 3},
        {"split": (2, 1, 1), "rows_per_microbatch": 5, "microbatches": 7, "order_seed": 3},
    ],
    ids=str,
)
def test_a_sampled_caption_is_its_rows_own(shape: dict[str, Any], sampled: Run, directory: Any) -> None:
    run = caption(directory(), many_rows(), sampling=SAMPLED, keys=keys_of(many_rows()), **shape)
    assert run.captions == sampled.captions


def test_a_sampled_caption_does_not_depend_on_other_rows(sampled: Run, directory: Any) -> None:
    rows, keys = many_rows(), keys_of(many_rows())
    some = [11, 2, 16, 7]
    run = caption(
        directory(), [rows[i] for i in some], sampling=SAMPLED, keys=[keys[i] for i in some], rows_per_microbatch=3
    )
    assert run.captions == [sampled.captions[i] for i in some]


def test_seed_and_key_matter(sampled: Run, directory: Any) -> None:
    rows, keys = many_rows()[:4], keys_of(many_rows())[:4]
    usual = sampled.captions[:4]
    reseeded = SamplingConfig(max_new_tokens=NEW, temperature=1.3, top_k=40, top_p=0.9, seed=8)
    assert all(
        a != b for a, b in zip(caption(directory(), rows, sampling=reseeded, keys=keys).captions, usual, strict=True)
    )
    other = [key - 1 for key in keys]
    assert all(
        a != b for a, b in zip(caption(directory(), rows, sampling=SAMPLED, keys=other).captions, usual, strict=True)
    )


def test_top_k_of_one_is_greedy(expected: Any, directory: Any) -> None:
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=2.0, top_k=1)
    assert caption(directory(), many_rows(), sampling=sampling).captions == expected
