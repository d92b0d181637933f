"""Schedules: every generator over many sizes, frozen chunks, names, wrong options, and the gradients that come out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import pytest

from ray_ministral.errors import ConfigError
from ray_ministral.pipeline.generators import SCHEDULES, gpipe, interleaved, make_schedule, one_f_one_b
from ray_ministral.pipeline.schedule import COMPUTE, RECEIVES, SENDS, Action, Kind, Schedule, play
from ray_ministral.pipeline.schedule_check import check
from ray_ministral.pipeline.zero_bubble import zero_bubble

MICROBATCHES = range(1, 13)
Make = Callable[[int, int], Schedule]
MAKES: dict[str, Make] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved-1": lambda stages, microbatches: interleaved(stages, microbatches, 1),
    "interleaved-2": lambda stages, microbatches: interleaved(stages, microbatches, 2),
    "interleaved-3": lambda stages, microbatches: interleaved(stages, microbatches, 3),
    "zero-bubble": zero_bubble,
}


def of(text: str) -> tuple[Action, ...]:
    """Actions from words such as `F0.1` or `SEND_F0.1`."""
    actions = []
    for word in text.split():
        name = word.rstrip("0123456789.")
        microbatch, chunk = word.removeprefix(name).split(".")
        actions.append(Action(Kind(name), int(microbatch), int(chunk)))
    return tuple(actions)


def compute(schedule: Schedule, stage: int) -> str:
    return " ".join(f"{action.kind}{action.microbatch}" for action in schedule.compute_of(stage))


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("name", MAKES)
def test_every_size_passes_the_check(name: str, stages: int) -> None:
    for microbatches in MICROBATCHES:
        schedule = MAKES[name](stages, microbatches)
        check(schedule)
        for stage, actions in enumerate(schedule.actions):
            per_chunk = 3 if schedule.splits_backward else 2
            assert len(schedule.compute_of(stage)) == per_chunk * microbatches * schedule.chunks_per_stage
            for place, action in enumerate(actions):
                if action.kind in SENDS:
                    assert str(actions[place - 1]) == str(action).removeprefix("SEND_")
        if stages == 1:
            assert all(action.kind in COMPUTE for action in schedule.actions[0])


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zero-bubble"])
def test_a_receive_stands_directly_before_what_needs_it(name: str) -> None:
    for microbatches in MICROBATCHES:
        for actions in MAKES[name](4, microbatches).actions:
            for place, action in enumerate(actions):
                if action.kind in RECEIVES:
                    assert str(actions[place + 1]) == str(action).removeprefix("RECV_")


def test_messages_are_received_in_the_order_of_their_sends_even_if_they_are_needed_in_another() -> None:
    # Stage 1 makes F1 first, stage 0 wants the gradient of microbatch 0 first.
    rows = [of("F0.0 F1.0 B0.0 B1.0"), of("F1.1 F0.1 B1.1 B0.1")]
    schedule = Schedule.from_compute("mixed", rows, 2, (True, True))
    assert schedule.actions[1][:4] == of("RECV_F0.1 RECV_F1.1 F1.1 F0.1")
    assert schedule.actions[0][-4:] == of("RECV_B1.0 RECV_B0.0 B0.0 B1.0")


def test_the_orders_of_the_papers() -> None:
    assert compute(gpipe(2, 3), 1) == "F0 F1 F2 B0 B1 B2"
    assert compute(one_f_one_b(3, 4), 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert compute(one_f_one_b(3, 4), 2) == "F0 B0 F1 B1 F2 B2 F3 B3"
    # Megatron-LM with four stages of two chunks: ten forwards of warmup on the first stage, four on the last.
    wanted_first = (
        "F0.0 F1.0 F2.0 F3.0 F0.4 F1.4 F2.4 F3.4 F4.0 F5.0 F6.0 B0.4 F7.0 B1.4 F4.4 B2.4 F5.4 B3.4 F6.4 B0.0 F7.4 "
        "B1.0 B2.0 B3.0 B4.4 B5.4 B6.4 B7.4 B4.0 B5.0 B6.0 B7.0"
    )
    wanted_last = (
        "F0.3 F1.3 F2.3 F3.3 F0.7 B0.7 F1.7 B1.7 F2.7 B2.7 F3.7 B3.7 F4.3 B0.3 F5.3 B1.3 F6.3 B2.3 F7.3 B3.3 F4.7 "
        "B4.7 F5.7 B5.7 F6.7 B6.7 F7.7 B7.7 B4.3 B5.3 B6.3 B7.3"
    )
    assert interleaved(4, 8, 2).compute_of(0) == of(wanted_first)
    assert interleaved(4, 8, 2).compute_of(3) == of(wanted_last)
    # ZB-H1 with three stages: the last one lets two W wait, as the first one runs two forwards ahead.
    assert compute(zero_bubble(3, 4), 0) == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert compute(zero_bubble(3, 4), 2) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"


def test_interleaved_with_one_chunk_is_1f1b() -> None:
    for stages in range(1, 6):
        for microbatches in MICROBATCHES:
            assert interleaved(stages, microbatches, 1).actions == one_f_one_b(stages, microbatches).actions


def test_actions_print_pair_and_sort() -> None:
    assert str(Action(Kind.F, 3, 0)) == "F3.0"
    assert [str(action.partner) for action in of("SEND_F3.1 RECV_F3.2 SEND_B3.2 RECV_B3.1")] == [
        "RECV_F3.2", "SEND_F3.1", "RECV_B3.1", "SEND_B3.2"
    ]  # fmt: skip
    assert sorted(of("F1.0 B0.0 F0.1 F0.0")) == list(of("B0.0 F0.0 F0.1 F1.0"))
    with pytest.raises(ValueError, match=r"W2\.1 computes"):
        _ = Action(Kind.W, 2, 1).partner


def test_chunks_go_round_the_stages() -> None:
    schedule = interleaved(3, 2, 2)
    assert [list(schedule.chunks_of(stage)) for stage in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [schedule.stage_of(chunk) for chunk in range(6)] == [0, 1, 2, 0, 1, 2]
    # The last stage sends to the first one, between two chunks.
    assert schedule.peer(Action(Kind.SEND_F, 0, 2)) == 0
    assert schedule.peer(Action(Kind.RECV_B, 0, 2)) == 0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("first", range(5))
def test_chunks_before_the_first_trainable_one_have_no_backward(name: str, first: int) -> None:
    stages, chunks_per_stage = (2, 2) if name == "interleaved" else (4, 1)
    schedule = make_schedule(name, stages, 5, chunks_per_stage, first_trainable_chunk=first)
    actions = [action for row in schedule.actions for action in row]
    assert {a.chunk for a in actions if a.kind is Kind.F} == {0, 1, 2, 3}
    assert {a.chunk for a in actions if a.kind is Kind.B} == set(range(first, 4))
    assert {a.chunk for a in actions if a.kind is Kind.W} == (set(range(first, 4)) if name == "zero-bubble" else set())
    # Nobody sends gradients to a frozen chunk, so the first trainable one sends none.
    assert {a.chunk for a in actions if a.kind is Kind.SEND_B} == set(range(first + 1, 4))
    assert {a.chunk for a in actions if a.kind is Kind.RECV_B} == set(range(first, 3))


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_pass_through_later_frozen_chunks(name: str) -> None:
    stages, chunks_per_stage = (2, 2) if name == "interleaved" else (4, 1)
    schedule = make_schedule(name, stages, 5, chunks_per_stage, frozen_chunks=(0, 2))
    actions = [action for row in schedule.actions for action in row]
    assert {a.chunk for a in actions if a.kind is Kind.B} == {1, 2, 3}
    assert {a.chunk for a in actions if a.kind is Kind.W} == ({1, 3} if name == "zero-bubble" else set())
    assert {a.chunk for a in actions if a.kind is Kind.SEND_B} == {2, 3}


def test_all_frozen_and_later_frozen_pass_the_check_over_many_sizes() -> None:
    for name in SCHEDULES:
        for stages in range(1, 4):
            chunks = 2 if name == "interleaved" else 1
            for microbatches in (1, 2, 5):
                for mask in range(2 ** (stages * chunks)):
                    frozen = [chunk for chunk in range(stages * chunks) if mask >> chunk & 1]
                    # `make_schedule` checks what it makes.
                    made = make_schedule(name, stages, microbatches, chunks, frozen_chunks=frozen)
                    assert made.trainable == tuple(chunk not in frozen for chunk in range(stages * chunks))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: make_schedule("dualpipe", 2, 2), "use one of gpipe, 1f1b, interleaved, zero-bubble"),
        (lambda: make_schedule("1f1b", 0, 2), "--stages"),
        (lambda: make_schedule("1f1b", 2, 0), "microbatches"),
        (lambda: make_schedule("interleaved", 2, 2, 0), "--chunks-per-stage"),
        (lambda: make_schedule("interleaved", 2, 2), "use --chunks-per-stage 2 or --schedule 1f1b"),
        (lambda: make_schedule("1f1b", 2, 2, 2), "use --chunks-per-stage 1 or --schedule interleaved"),
        (lambda: make_schedule("zero-bubble", 2, 2, 2), "use --chunks-per-stage 1 or --schedule interleaved"),
        (lambda: make_schedule("1f1b", 2, 2, first_trainable_chunk=3), "0 to 2, got 3"),
        (lambda: make_schedule("1f1b", 2, 2, first_trainable_chunk=-1), "0 to 2, got -1"),
        (lambda: make_schedule("1f1b", 2, 2, frozen_chunks=(2,)), "0 to 1"),
        (lambda: make_schedule("1f1b", 2, 2, memory_limit=2), "only zero-bubble"),
        (lambda: make_schedule("zero-bubble", 2, 2, memory_limit=0), "at least 1"),
    ],
)
def test_options_that_do_not_fit_say_what_to_change(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)


def run(schedule: Schedule, weights: list[float], inputs: list[float]) -> list[float]:
    """Executes a schedule: chunk c is y = tanh(w_c * x), the loss is the sum of the last outputs. Gradients of all w.

    Values travel only by SEND and RECV, or within a stage where chunks follow one another there.
    """
    saved: dict[tuple[int, int], tuple[float, float]] = {}
    # Per stage, what it has: outputs and gradients by (kind, microbatch, chunk that needs it).
    has: list[dict[Action, float]] = [{} for _ in range(schedule.num_stages)]
    mail: dict[Action, float] = {}
    pending: dict[tuple[int, int], float] = {}
    gradients: dict[int, float] = defaultdict(float)
    last = schedule.num_chunks - 1
    for stage, action in play(schedule):
        m, c = action.microbatch, action.chunk
        match action.kind:
            case Kind.F:
                x = inputs[m] if c == 0 else has[stage].pop(Action(Kind.F, m, c))
                y = math.tanh(weights[c] * x)
                saved[m, c] = (x, y)
                has[stage][Action(Kind.F, m, c + 1)] = y
            case Kind.B:
                above = 1.0 if c == last else has[stage].pop(Action(Kind.B, m, c))
                x, y = saved[m, c]
                inner = above * (1 - y * y)
                has[stage][Action(Kind.B, m, c - 1)] = inner * weights[c]
                pending[m, c] = inner * x
                if not schedule.splits_backward and schedule.trainable[c]:
                    gradients[c] += pending.pop((m, c))
            case Kind.W:
                gradients[c] += pending.pop((m, c))
            case Kind.SEND_F | Kind.SEND_B:
                kind = Kind.F if action.kind is Kind.SEND_F else Kind.B
                mail[action.partner] = has[stage].pop(Action(kind, m, action.partner.chunk))
            case Kind.RECV_F | Kind.RECV_B:
                kind = Kind.F if action.kind is Kind.RECV_F else Kind.B
                has[stage][Action(kind, m, c)] = mail.pop(action)
    return [gradients[chunk] for chunk in range(schedule.num_chunks)]


def test_every_schedule_gives_the_same_bits() -> None:
    weights = [0.3, -1.1, 0.7, 1.9]
    inputs = [0.1 * (7 * m % 11) - 0.4 for m in range(9)]
    plain = run(gpipe(1, 9), weights[:1], inputs)
    assert plain != [0.0]
    wanted = run(gpipe(4, 9), weights, inputs)
    assert all(wanted)
    made = [
        one_f_one_b(4, 9), zero_bubble(4, 9), interleaved(1, 9, 4), interleaved(2, 9, 2), interleaved(4, 9, 1)
    ]  # fmt: skip
    for schedule in made:
        assert run(schedule, weights, inputs) == wanted, schedule.name
    # And the order does matter: the other way round the sums differ in their last bits.
    backwards = run(gpipe(4, 9), weights, inputs[::-1])
    assert backwards != wanted
    assert backwards == pytest.approx(wanted)
    frozen = run(make_schedule("zero-bubble", 4, 9, frozen_chunks=(0, 2)), weights, inputs)
    assert frozen == [0.0, wanted[1], 0.0, wanted[3]]
