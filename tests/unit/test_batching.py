"""The scheduler, driven at random: each request finishes once, slots and moves agree, limits hold, nothing is lost."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from ray_ministral.captioning.batching import WAITING_BYTES, BatchScheduler, Launch, Request, microbatches_for
from ray_ministral.captioning.plan import StepPlan, in_blocks
from ray_ministral.captioning.suspects import Suspects

STOP = 0


def make_scheduler(**changes: int) -> BatchScheduler:
    options = {
        "microbatches": 3,
        "rows_per_microbatch": 4,
        "kv_tokens_per_microbatch": 256,
        "tokens_per_step": 30,
    }
    return BatchScheduler(**{**options, **changes}, finish_check=lambda ids: "stop" if ids[-1] == STOP else None)


def make_request(key: int, length: int = 5, new: int = 4, **options: object) -> Request:
    return Request(key, np.arange(100, 100 + length, dtype=np.int32), new, sample_key=key, **options)  # type: ignore[arg-type]


def finish(scheduler: BatchScheduler, launch: Launch, token: int = 7) -> list[int]:
    """The step gives every sequence `token`; the keys of those that are done."""
    tokens = np.full(len(launch.plan.sample_keys), token, dtype=np.int32)
    return [finished.request.key for finished in scheduler.complete(launch.plan, tokens)]


@dataclass
class Machine:
    """What stages would see: which request lies in which slot, and how many tokens of it."""

    requests: dict[int, Request]
    limits: dict[str, int]
    slots: dict[int, dict[int, int]] = field(default_factory=dict)  # microbatch -> slot -> key
    held: dict[int, int] = field(default_factory=dict)  # key -> tokens in the cache
    said: dict[int, list[int]] = field(default_factory=dict)
    generation: int = 0

    def run(self, launch: Launch, chance: random.Random, stop_rate: float) -> np.ndarray:
        plan = launch.plan
        slots = self.slots.setdefault(plan.microbatch, {})
        before = dict(slots)
        for source, target in plan.moves:
            assert source > target, "moves close holes from the end"
            slots[target] = before[source]
        self.slots[plan.microbatch] = slots = {slot: slots[slot] for slot in range(plan.num_decode)}
        for slot in range(plan.num_decode):
            self._check_decode(plan, slot, slots[slot])
        start = plan.num_decode
        for number, piece in enumerate(plan.prefills):
            assert (piece.slot, piece.start, piece.completes) == (plan.num_decode + number, 0, True)
            key = int(plan.sample_keys[plan.num_decode + number])
            request = self.requests[key]
            np.testing.assert_array_equal(plan.token_ids[start : start + piece.length], request.known_ids)
            assert request.known_ids.tolist() == [*request.token_ids, *self.said.get(key, [])], "it goes on"
            start += piece.length
            if request.pixels is None:
                assert piece.images == ()
            else:
                ((block, row),) = piece.images
                assert (launch.blocks[block], row) == request.pixels
            slots[piece.slot] = key
            self.held[key] = piece.length
            self.said.setdefault(key, [])
        assert start == len(plan.token_ids) == sum(plan.lengths()) == len(plan.positions())
        self._check_limits(launch)
        tokens = [STOP if chance.random() < stop_rate else chance.randint(1, 99) for _ in plan.sample_keys]
        for key, token in zip(plan.sample_keys.tolist(), tokens, strict=True):
            self.said[key].append(token)
        return np.asarray(tokens, dtype=np.int32)

    def _check_decode(self, plan: StepPlan, slot: int, key: int) -> None:
        assert plan.sample_keys[slot] == key, "another sequence lies in this slot"
        assert plan.decode_positions[slot] == self.held[key], "the next free place of its cache"
        assert plan.token_ids[slot] == self.said[key][-1], "what it said last is fed"
        assert plan.sample_positions[slot] == self.held[key] + 1
        self.held[key] += 1

    def _check_limits(self, launch: Launch) -> None:
        plan = launch.plan
        keys = plan.sample_keys.tolist()
        assert len(set(keys)) == len(keys) == plan.num_slots <= self.limits["rows_per_microbatch"]
        reserved = [in_blocks(self.requests[key].kv_tokens) for key in keys]
        assert sum(reserved) <= self.limits["kv_tokens_per_microbatch"] or len(keys) == 1
        assert all(self.held[key] <= self.requests[key].kv_tokens for key in keys)
        assert len(plan.token_ids) <= self.limits["tokens_per_step"] or len(plan.prefills) <= 1
        assert plan.generation == self.generation
        assert len({self.requests[key].group for key in keys}) == 1, "a group is among itself"
        used = {block for piece in plan.prefills for block, _ in piece.images}
        assert used == set(range(len(launch.blocks)))
        assert len(set(launch.blocks)) == len(launch.blocks)


@pytest.mark.parametrize(("fail_rate", "death_rate"), [(0.0, 0.0), (0.1, 0.0), (0.05, 0.05)])
@pytest.mark.parametrize("seed", range(25))
def test_any_order_of_events(seed: int, fail_rate: float, death_rate: float) -> None:
    chance = random.Random(seed)
    limits = {
        "microbatches": chance.randint(1, 5),
        "rows_per_microbatch": chance.randint(1, 6),
        "kv_tokens_per_microbatch": chance.randint(40, 400),
        "tokens_per_step": chance.randint(1, 60),
    }
    stop_rate = chance.choice([0.0, 0.2, 0.9])
    scheduler = make_scheduler(**limits)
    requests = {
        key: make_request(
            key,
            length=chance.randint(1, 30),
            new=chance.randint(1, 11),
            pixels=chance.choice([None, (f"block {key // 3}", key % 3)]),
        )
        for key in range(60)
    }
    machine = Machine(requests, limits)
    coming = list(requests.values())
    in_flight: list[Launch] = []
    reasons: dict[int, str] = {}
    given_up: list[int] = []
    admitted: list[int] = []
    suspects = Suspects()
    while coming or not scheduler.idle:
        for _ in range(chance.randint(0, 5)):
            if coming:
                assert scheduler.fits(coming[0])
                scheduler.add(coming.pop(0))
        in_flight += (launched := scheduler.launches())
        for launch in launched:
            admitted += launch.plan.sample_keys[launch.plan.num_decode :].tolist()
        busy = {launch.plan.microbatch for launch in in_flight}
        assert len(busy) == len(in_flight), "one step of a microbatch at a time"
        rows = scheduler.active + len(scheduler.waiting)
        wanted = microbatches_for(rows, limits["microbatches"], limits["rows_per_microbatch"])
        if not any(request.exclusive for request in requests.values()):
            assert not scheduler.waiting or len(busy) >= wanted, "rows wait beside an idle microbatch"
        if any(requests[key].exclusive for launch in in_flight for key in launch.plan.sample_keys.tolist()):
            assert len(in_flight) == 1, "nothing runs beside it"
        assert not scheduler.launches(), "nothing has changed since"
        if not in_flight:
            continue
        launch = in_flight.pop(chance.randrange(len(in_flight)))
        if chance.random() < fail_rate:
            lost = scheduler.fail(launch.plan)
            assert [request.key for request in lost] == launch.plan.sample_keys.tolist()
            verdict = suspects.after_error(lost)
            scheduler.add_first(verdict.again)
            given_up += [request.key for request in verdict.given_up]
            continue
        if chance.random() < death_rate:
            machine.generation += 1
            held = scheduler.active + len(scheduler.waiting)
            lost, others = scheduler.reset(machine.generation)
            assert len(lost) + len(others) == held
            assert scheduler.idle
            flying = [launch, *in_flight]
            in_flight = []
            assert sorted(r.key for r in lost) == sorted(key for f in flying for key in f.plan.sample_keys.tolist())
            verdict = suspects.after_death(lost, others)
            assert len(verdict.again) + len(verdict.given_up) == held
            scheduler.add_first(verdict.again)
            given_up += [request.key for request in verdict.given_up]
            continue
        tokens = machine.run(launch, chance, stop_rate)
        for finished in scheduler.complete(launch.plan, tokens):
            key = finished.request.key
            assert key not in reasons
            reasons[key] = finished.finish_reason
            assert finished.request.generated == machine.said[key]
    assert not in_flight
    assert scheduler.active == 0
    assert Counter([*reasons, *given_up]) == Counter(requests.keys()), "each once, none missing"
    for key, reason in reasons.items():
        said, most = requests[key].generated, requests[key].max_new_tokens
        assert STOP not in said[:-1]
        assert reason == ("stop" if said[-1] == STOP else "length")
        assert len(said) == most or (reason == "stop" and len(said) < most)
    if not fail_rate and not death_rate:
        assert not given_up
        assert admitted == sorted(admitted), "first come, first served"


def test_rows_are_spread_evenly() -> None:
    scheduler = make_scheduler(tokens_per_step=1000, kv_tokens_per_microbatch=1000)
    for key in range(10):
        scheduler.add(make_request(key))
    assert [launch.plan.num_slots for launch in scheduler.launches()] == [4, 4, 2]
    assert scheduler.active == 10
    assert scheduler.room == 2 * 4 * 3 - 10


@pytest.mark.parametrize(
    ("rows", "microbatches", "expected"),
    [(1, 3, 2), (8, 3, 2), (9, 3, 3), (100, 3, 3), (1, 2, 1), (1, 1, 1), (9, 1, 1)],
)
def test_few_rows_are_spread_over_few_microbatches(rows: int, microbatches: int, expected: int) -> None:
    assert microbatches_for(rows, microbatches, rows_per_microbatch=4) == expected
    scheduler = make_scheduler(microbatches=microbatches, tokens_per_step=1000, kv_tokens_per_microbatch=1000)
    for key in range(rows):
        scheduler.add(make_request(key))
    assert len(scheduler.launches()) == min(rows, expected)


def test_steps_are_filled_to_the_same_number_of_tokens() -> None:
    """Prompts of ten tokens, captions of eight: prompts come all along, beside ever more rows that decode."""
    scheduler = make_scheduler(
        microbatches=2, rows_per_microbatch=24, kv_tokens_per_microbatch=10_000, tokens_per_step=40
    )
    key, tokens, decoding, prompts = 0, [], [], []
    for _ in range(60):
        while scheduler.room:
            scheduler.add(make_request(key, length=10, new=8))
            key += 1
        for launch in scheduler.launches():
            tokens.append(len(launch.plan.token_ids))
            decoding.append(launch.plan.num_decode)
            prompts.append(len(launch.plan.prefills))
            finish(scheduler, launch)
    assert all(30 < filled <= 40 for filled in tokens)
    assert prompts[:2] == [4, 4]
    assert set(prompts[20:]) == {2}, "for ever, not in waves"
    assert set(decoding[40:]) == {2 * 7}


def test_many_rows_that_decode_keep_no_prompt_out() -> None:
    scheduler = make_scheduler(
        microbatches=1, rows_per_microbatch=9, kv_tokens_per_microbatch=10_000, tokens_per_step=6
    )
    for key in range(9):
        scheduler.add(make_request(key, new=30))
    entered = []
    for _ in range(9):
        (launch,) = scheduler.launches()
        entered.append(len(launch.plan.prefills))
        finish(scheduler, launch)
    assert entered == [1] * 9


def test_images_that_wait_have_bounded_bytes() -> None:
    scheduler = make_scheduler()
    assert scheduler.room == 24
    scheduler.add(make_request(0, pixels=("block", 0), pixel_bytes=WAITING_BYTES))
    assert scheduler.room == 0
    scheduler.launches()
    assert scheduler.room == 23


def test_a_step_without_rows_is_no_step() -> None:
    scheduler = make_scheduler()
    assert scheduler.idle
    assert scheduler.launches() == []
    scheduler.add(make_request(1))
    assert not scheduler.idle
    assert len(scheduler.launches()) == 1


def test_what_fits() -> None:
    """The last new token is never fed back, so it needs no place."""
    scheduler = make_scheduler(kv_tokens_per_microbatch=10)
    assert scheduler.fits(make_request(1, length=7, new=4))
    too_long = make_request(2, length=8, new=4)
    assert not scheduler.fits(too_long)
    with pytest.raises(AssertionError, match="row errors"):
        scheduler.add(too_long)


def test_a_prompt_beyond_the_step_limit_enters_beside_rows_that_decode() -> None:
    scheduler = make_scheduler(microbatches=1, tokens_per_step=10)
    scheduler.add(make_request(1))
    finish(scheduler, scheduler.launches()[0])
    scheduler.add(make_request(2, length=20))
    scheduler.add(make_request(3))
    plan = scheduler.launches()[0].plan
    assert plan.sample_keys.tolist() == [1, 2], "but not with others in one step"


def test_the_last_rows_move_into_the_holes() -> None:
    scheduler = make_scheduler(microbatches=1, rows_per_microbatch=6, tokens_per_step=99, kv_tokens_per_microbatch=1000)
    for key in range(6):
        scheduler.add(make_request(key, length=2))
    launch = scheduler.launches()[0]
    done = scheduler.complete(launch.plan, np.asarray([STOP, 5, STOP, 6, 7, STOP], dtype=np.int32))
    assert [finished.request.key for finished in done] == [0, 2, 5]
    scheduler.add(make_request(9, length=3))
    plan = scheduler.launches()[0].plan
    assert plan.moves == ((4, 0), (3, 2))
    assert plan.sample_keys.tolist() == [4, 1, 3, 9]
    assert plan.token_ids.tolist() == [7, 5, 6, 100, 101, 102]
    assert plan.decode_positions.tolist() == [2, 2, 2]
    assert plan.sampled_rows().tolist() == [0, 1, 2, 5]
    assert plan.positions().tolist() == [2, 2, 2, 0, 1, 2]


def test_one_row_alone() -> None:
    scheduler = make_scheduler(microbatches=2)
    for key in range(3):
        scheduler.add(make_request(key, group=1 if key == 0 else None))
    first, second = scheduler.launches()
    assert first.plan.sample_keys.tolist() == [0]
    assert second.plan.sample_keys.tolist() == [1, 2]
    assert finish(scheduler, first) == []
    scheduler.add(make_request(3))
    assert scheduler.launches()[0].plan.sample_keys.tolist() == [0], "nobody joins it"


def test_a_row_alone_waits_for_an_empty_microbatch() -> None:
    scheduler = make_scheduler(microbatches=1)
    scheduler.add(make_request(0, new=2))
    finish(scheduler, scheduler.launches()[0])
    scheduler.add(make_request(1, group=1))
    launch = scheduler.launches()[0]
    assert launch.plan.sample_keys.tolist() == [0]
    assert finish(scheduler, launch) == [0]
    assert scheduler.launches()[0].plan.sample_keys.tolist() == [1]


def test_a_failed_step_gives_its_rows_back() -> None:
    scheduler = make_scheduler(microbatches=1)
    scheduler.add(make_request(0))
    scheduler.add(make_request(1))
    finish(scheduler, scheduler.launches()[0])
    scheduler.add(make_request(2))
    launch = scheduler.launches()[0]
    lost = scheduler.fail(launch.plan)
    assert [(request.key, request.generated) for request in lost] == [(0, [7]), (1, [7]), (2, [])]
    assert scheduler.idle
    scheduler.add_first(lost)
    again = scheduler.launches()[0].plan
    assert [piece.length for piece in again.prefills] == [6, 6, 5], "what was said is fed, and not said again"
    assert again.sample_positions.tolist() == [6, 6, 5]
    with pytest.raises(AssertionError, match="not the one in flight"):
        scheduler.complete(launch.plan, np.zeros(3, np.int32))


def test_a_step_is_completed_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(0))
    launch = scheduler.launches()[0]
    finish(scheduler, launch)
    with pytest.raises(AssertionError, match="not the one in flight"):
        finish(scheduler, launch)


def test_later_stages_get_no_token_ids() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(0))
    plan = scheduler.launches()[0].plan
    later = plan.without_token_ids()
    assert len(later.token_ids) == 0 < len(plan.token_ids)
    assert later.positions().tolist() == plan.positions().tolist()
    assert (later.step, later.prefills, later.lengths()) == (plan.step, plan.prefills, plan.lengths())
