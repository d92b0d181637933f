"""A step over real process groups (gloo on the loopback interface): the bits of the threads' queues, in every dtype."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ray_ministral.pipeline.transport import GroupTransport, GroupTwins, join_store, make_group, serve_store
from tests.parity.test_train_resume import DTYPES, assert_same_bits
from tests.parity.train_runs import FOUR, INTERLEAVED, ONE, TWO, Layout, run, run_replicas

HOST, TIMEOUT_S = "127.0.0.1", 60.0
CPU = torch.device("cpu")


def groups(name: str, size: int) -> list[Any]:
    """One process group of each rank, here all in one process: making them waits for all of them."""
    store = serve_store(HOST, TIMEOUT_S)
    made: dict[int, Any] = {}

    def make(rank: int) -> None:
        own = store if rank == 0 else join_store(HOST, store.port, TIMEOUT_S)
        made[rank] = make_group(own, name, rank, size, device=CPU, host=HOST, timeout_s=TIMEOUT_S)

    in_threads(size, make)
    return [made[rank] for rank in range(size)]


def in_threads(number: int, function: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=function, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)


@pytest.mark.parametrize("layout", [TWO, INTERLEAVED, FOUR], ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_over_gloo(dtype: str, layout: Layout, directory: Any) -> None:
    model_dir = directory(tied=True)
    queues, gloo = (layout.pipeline(model_dir, dtype=DTYPES[dtype]) for _ in range(2))
    for stage, group in zip(gloo.stages, groups(f"{layout.name}-{dtype}", layout.num_stages), strict=True):
        stage.connect(GroupTransport(group, group, group.rank(), CPU))
    assert run(gloo, layout, range(2)) == run(queues, layout, range(2))
    assert_same_bits(gloo.weights(), queues.weights())


def test_three_replicas_over_gloo(directory: Any) -> None:
    """The all-reduce of three may add in another order than ours, but every replica gets the same bits."""
    replicas = ONE.replicas(3, directory())
    expected = run_replicas(replicas, ONE, range(2), 5)
    replicas = ONE.replicas(3, directory())
    for pipeline, group in zip(replicas, groups("twins", 3), strict=True):
        pipeline.stages[0].connect(None, GroupTwins(group))
    curve = run_replicas(replicas, ONE, range(2), 5)
    assert curve[0][0] == expected[0][0]
    assert [value for step in curve for value in step] == pytest.approx(
        [v for step in expected for v in step], rel=1e-4
    )
    first, *others = [pipeline.weights() for pipeline in replicas]
    for other in others:
        assert_same_bits(other, first)


def test_many_messages_wait_for_their_receiver() -> None:
    """Sent long before they are received, of several sizes, and received by tag; nothing is lost or mixed up."""
    first, second = (GroupTransport(group, group, group.rank(), CPU) for group in groups("messages", 2))
    sizes = [1, 1000, 300_000]
    sent = [torch.full((sizes[tag % 3],), float(tag)) for tag in range(30)]

    def send(tags: range) -> None:
        for tag in tags:
            first.send(sent[tag].clone(), 1, tag)
        first.flush()

    sender = threading.Thread(target=send, args=(range(30),))
    sender.start()
    for tag, expected in enumerate(sent):
        assert second.receive(tuple(expected.shape), torch.float32, 0, tag)().equal(expected), tag
    sender.join(TIMEOUT_S)
    assert not sender.is_alive()
