"""Where the driver of a captioning job would saturate: a cluster of 1000 nodes and a million shards, simulated.

    python benchmarks/scale.py [--nodes N] [--shards N] [--seed N] [--no-ray] [--json FILE]

1. The real costs of the driver's own work are measured on this machine: a commit into a real `Ledger`, reading an
   entry back, a step of a real `BatchScheduler`, and with Ray (a local cluster of one small actor) a call, a look at
   all steps in flight, and a pulse as the supervision asks for it.
2. One replica is played step by step with the real `BatchScheduler`: how many rows a step finishes.
3. The cluster is played from failure to failure: nodes die at random, a replica that has lost a stage stands still
   until another node has come and has loaded; the real `FailurePolicy` decides after each death. Between two failures
   rows are finished at an even rate. Deterministic by its seed: no measured time goes into it.
4. The two together: seconds of driver work for each second of the job, and at how many nodes that becomes one.

A replica's step takes `Workload.step_seconds` on its slowest stage: an assumption, and everything is said for two.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402

from ray_ministral.captioning.batching import BatchScheduler, Request  # noqa: E402
from ray_ministral.config import PipelineConfig  # noqa: E402
from ray_ministral.data.entries import Entry  # noqa: E402
from ray_ministral.data.ledger import Ledger  # noqa: E402
from ray_ministral.data.parts import Attempt, PartInfo  # noqa: E402
from ray_ministral.driver.policies import Death, Decision, FailurePolicy  # noqa: E402

HOUR = 3600.0


@dataclass(frozen=True)
class Failures:
    """How nodes are lost. mtbf_s: mean seconds between two failures of one node. source: who has seen that."""

    name: str
    mtbf_s: float
    source: str


FAILURES = (
    Failures("none", float("inf"), "-"),
    Failures(
        "own machines",
        128 * 7.9 * HOUR,
        "a job of 1024 GPUs (128 nodes) ran for 7.9 h between failures: Kokolis et al., HPCA 2025, arXiv:2410.21680",
    ),
    Failures("spot, 10 % an hour", 10 * HOUR, "lowest of the rates of EC2 traces in Bamboo, NSDI 2023 (10, 16, 33 %)"),
    Failures("spot, 33 % an hour", 3 * HOUR, "highest of them"),
)


@dataclass(frozen=True)
class Workload:
    """A job. step_seconds: of one step on the slowest stage. prompt, new: tokens of each row, `new` on average."""

    nodes: int = 1000
    shards: int = 1_000_000
    rows_per_shard: int = 256
    stages: int = 4
    step_seconds: float = 0.25
    prompt: int = 300
    new: int = 64
    replace_s: float = 300.0
    """From the loss of a node until another one is there."""
    load_s: float = 60.0
    """From then on until its stage works."""
    max_restarts: int = PipelineConfig.max_restarts

    @property
    def replicas(self) -> int:
        """One stage on each node."""
        return self.nodes // self.stages


@dataclass(frozen=True)
class Replica:
    """What one replica does when nothing fails."""

    rows_per_step: float

    def rows_per_second(self, workload: Workload) -> float:
        """A step leaves the slowest stage every `step_seconds`."""
        return self.rows_per_step / workload.step_seconds


@dataclass(frozen=True)
class Outcome:
    """Of a simulated job. kept: throughput as a fraction of that without failures. retired: replicas given up."""

    hours: float
    kept: float
    deaths: int
    retired: int
    finished: bool


@dataclass(frozen=True)
class Costs:
    """Seconds of the driver's time. look: at one step in flight, in the two `ray.wait` of a round of its loop."""

    commit: float
    read_entry: float
    entry_bytes: float
    schedule: float
    call: float
    look: float
    pulse: float


def play_replica(workload: Workload, seed: int, steps: int = 600, warmup: int = 200) -> Replica:
    """Steps of one replica that always has rows waiting, through the real scheduler."""
    rng, scheduler = random.Random(seed), _scheduler(workload)
    finished = 0
    for round_ in range(warmup + steps):
        _top_up(scheduler, workload, rng)
        # A step of each microbatch in its turn: so they come back when all stages take the same time.
        for launch in scheduler.launches():
            done = scheduler.complete(launch.plan, np.zeros(launch.plan.num_slots, dtype=np.int64))
            finished += len(done) if round_ >= warmup else 0
    return Replica(finished / (steps * (workload.stages + 1)))


def _scheduler(workload: Workload) -> BatchScheduler:
    config = PipelineConfig(stages=workload.stages)
    return BatchScheduler(
        microbatches=config.microbatches,
        rows_per_microbatch=config.rows_per_microbatch,
        kv_tokens_per_microbatch=config.kv_tokens_per_microbatch,
        tokens_per_step=config.tokens_in_step("cuda"),
        finish_check=lambda _ids: None,
    )


def _top_up(scheduler: BatchScheduler, workload: Workload, rng: random.Random) -> None:
    for _ in range(scheduler.room):
        new = rng.randint(1, 2 * workload.new - 1)
        scheduler.add(Request(None, np.zeros(workload.prompt, dtype=np.int32), new, 0))


def play_cluster(workload: Workload, failures: Failures, replica: Replica, seed: int) -> Outcome:
    """From failure to failure until all rows are done, or no replica is left."""
    rng, policy = random.Random(seed), FailurePolicy(workload.max_restarts)
    rate = replica.rows_per_second(workload)
    count, rows = workload.replicas, float(workload.shards * workload.rows_per_shard)
    mean = failures.mtbf_s / workload.stages  # a replica loses a node as soon as one of its nodes is lost
    deaths: list[list[Death]] = [[] for _ in range(count)]
    since = [0.0] * count  # since when it works
    back = [0.0] * count  # when it works again, while it recovers
    alive = working = count
    # (when, kind, replica, until): a death (0), or a recovery (1) that another death may have overtaken.
    events = [(rng.expovariate(1 / mean), 0, index, 0.0) for index in range(count)] if mean < float("inf") else []
    heapq.heapify(events)
    now = done = 0.0
    number = retired = 0
    recover_s = workload.replace_s + workload.load_s
    while done < rows and alive:
        when, kind, index, until = heapq.heappop(events) if events else (float("inf"), 0, 0, 0.0)
        step = working * rate * (when - now) if working else 0.0
        if done + step >= rows:
            now += (rows - done) / (working * rate)
            done = rows
            break
        done, now = done + step, when
        if kind == 1:
            if back[index] == until:
                working, back[index], since[index] = working + 1, 0.0, now
            continue
        number += 1
        works = back[index] == 0.0
        deaths[index].append(Death("a node is lost", rows=int((now - since[index]) * rate) if works else 0))
        working -= works
        if policy.decide(deaths[index][-64:]) is Decision.GIVE_UP:
            alive, retired = alive - 1, retired + 1
            continue
        back[index] = now + recover_s
        heapq.heappush(events, (back[index], 1, index, back[index]))
        heapq.heappush(events, (now + rng.expovariate(1 / mean), 0, index, 0.0))
    ideal = rows / (count * rate)
    return Outcome(now / HOUR, ideal / now * (done / rows), number, retired, done >= rows)


# What the driver's work costs, for real


def _each(begin: float, count: int) -> float:
    return (time.perf_counter() - begin) / count


def measure_ledger(parts: int) -> tuple[float, float, float]:
    """Seconds of a commit, seconds to read an entry when the folder is opened again, and bytes of an entry."""
    with tempfile.TemporaryDirectory() as folder:
        attempts = []
        ledger = Ledger.open(folder + "/out", {"job": "scale"})
        for index in range(parts):
            info = PartInfo(f"part-{index:05}-00000-00000000.parquet", 256, {"ok": 255, "bad_image": 1}, 1000)
            attempt = Attempt(info, f"_tmp.{index}", f"{index:064x}")
            (Path(folder) / "out" / attempt.name).write_bytes(b"x" * 1000)
            attempts.append(attempt)
        begin = time.perf_counter()
        for attempt in attempts:
            ledger.commit(attempt, generation=1)
        commit = _each(begin, parts)
        begin = time.perf_counter()
        assert len(ledger.committed()) == parts
        read = _each(begin, parts)
        size = len(Entry.of_attempt(attempts[0], generation=1, fingerprint="0" * 64).to_bytes())
        ledger.close()
    return commit, read, float(size)


def measure_schedule(workload: Workload, rounds: int) -> float:
    """Seconds of a step in a full scheduler: what waits is topped up, the step is planned and completed."""
    rng, scheduler, steps = random.Random(0), _scheduler(workload), 0
    begin = time.perf_counter()
    for _ in range(rounds):
        _top_up(scheduler, workload, rng)
        for launch in scheduler.launches():
            scheduler.complete(launch.plan, np.zeros(launch.plan.num_slots, dtype=np.int64))
            steps += 1
    return _each(begin, steps)


def measure_ray(calls: int, waiting: int) -> tuple[float, float, float]:
    """Seconds of a call whose result is fetched, of a look at one of `waiting` results, and of a pulse.

    As in the driver: results are waited for twice a round; a pulse is a call, two looks at it, and its result.
    """
    import ray

    @ray.remote(num_cpus=0, max_concurrency=2)
    class Echo:
        def step(self, plan: object) -> object:
            return plan

        def hang(self, seconds: float) -> None:
            time.sleep(seconds)

    plan = np.zeros(512, dtype=np.int64)
    actor = Echo.remote()
    ray.get(actor.step.remote(plan))
    begin = time.perf_counter()
    for result in [actor.step.remote(plan) for _ in range(calls)]:
        ray.get(result)
    call = _each(begin, calls)
    slow = Echo.remote()
    pending = [slow.hang.remote(0.005) for _ in range(waiting)]
    begin = time.perf_counter()
    for _ in range(3):
        for _ in range(2):
            ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
    look = _each(begin, 3 * waiting)
    begin = time.perf_counter()
    for _ in range(calls // 4):
        pulse = actor.step.remote(None)
        ray.wait([pulse], timeout=0)
        ray.wait([pulse], timeout=0)
        ray.get(pulse)
    return call, look, _each(begin, calls // 4)


def measure(workload: Workload, *, with_ray: bool, parts: int = 300, rounds: int = 60) -> Costs:
    """All of it. Without Ray its three costs are those measured before (docs/scale.md)."""
    commit, read, size = measure_ledger(parts)
    schedule = measure_schedule(workload, rounds)
    call, look, pulse = RAY_COSTS
    if with_ray:
        from ray_ministral.driver.cluster import connected

        os.environ.setdefault("RAY_AUTH_TOKEN", f"{random.SystemRandom().getrandbits(256):064x}")
        with connected("local", PipelineConfig()):
            call, look, pulse = measure_ray(400, 250)
    return Costs(commit, read, size, schedule, call, look, pulse)


RAY_COSTS = (0.00026, 0.0000041, 0.00105)
"""As `measure_ray` had them on two cores of a shared machine, Ray 2.60."""


# Both together

WAKES_PER_S = 20.0
"""Rounds of the driver's loop that are not for a step alone; each looks at every step in flight."""

PULSES_PER_S = 0.5
"""Of each stage; `driver/watch.py` asks every two seconds."""


@dataclass(frozen=True)
class Load:
    """Seconds of work for each second of the job: of the driver's loop by its parts, and of the thread that commits."""

    steps: float
    looks: float
    pulses: float
    commits: float

    @property
    def loop(self) -> float:
        """All that the main loop does; above 1 it cannot keep up."""
        return self.steps + self.looks + self.pulses


def load_of(workload: Workload, replica: Replica, costs: Costs) -> Load:
    """Of a job without failures, when every replica works."""
    steps = workload.replicas / workload.step_seconds
    each = costs.schedule + workload.stages * costs.call
    in_flight = workload.replicas * (workload.stages + 1)
    commits = workload.replicas * replica.rows_per_second(workload) / workload.rows_per_shard
    return Load(
        steps=steps * each,
        looks=WAKES_PER_S * in_flight * costs.look,
        pulses=workload.replicas * workload.stages * PULSES_PER_S * costs.pulse,
        commits=commits * costs.commit,
    )


def saturation(workload: Workload, replica: Replica, costs: Costs) -> int:
    """The most nodes that one driver keeps busy: every part of the load grows with their number."""
    load = load_of(workload, replica, costs)
    return int(workload.nodes / max(load.loop, load.commits))


def report(workload: Workload, costs: Costs, seed: int) -> dict[str, object]:
    """Everything, for people on stdout and as JSON."""
    replica = play_replica(workload, seed)
    print(f"{workload.nodes} nodes, {workload.replicas} replicas of {workload.stages} stages, {workload.shards} shards")
    print("costs: " + ", ".join(f"{name} {value:.3g}" for name, value in asdict(costs).items()))
    print(f"a step finishes {replica.rows_per_step:.2f} rows\n")
    outcomes, loads = {}, {}
    for failures in FAILURES:
        outcome = outcomes[failures.name] = asdict(play_cluster(workload, failures, replica, seed))
        state = "" if outcome["finished"] else ", NOT FINISHED: no replica was left"
        print(
            f"{failures.name:20} {outcome['hours']:7.1f} h, throughput kept {outcome['kept']:6.1%}, "
            f"{outcome['deaths']} nodes lost, {outcome['retired']} replicas given up{state}"
        )
    print("\nstep    nodes   steps  looks  pulses  loop    commits  saturates at")
    for seconds in (workload.step_seconds, 4 * workload.step_seconds):
        case = replace(workload, step_seconds=seconds)
        load, most = load_of(case, replica, costs), saturation(case, replica, costs)
        loads[f"{seconds:g} s"] = asdict(load) | {"loop": load.loop, "saturates_at_nodes": most}
        print(
            f"{seconds:4.2f} s {case.nodes:6}   {load.steps:5.2f}  {load.looks:5.2f}  {load.pulses:5.2f}   "
            f"{load.loop:5.2f}  {load.commits:5.2f}    {most} nodes"
        )
    ledger = {
        "megabytes": workload.shards * costs.entry_bytes / 1e6,
        "files": 2 * workload.shards,
        "minutes_to_open": workload.shards * costs.read_entry / 60,
    }
    print(
        f"\nledger: {ledger['megabytes']:.0f} MB in {ledger['files']} files (entries and parts); a resume reads it in "
        f"{ledger['minutes_to_open']:.1f} minutes"
    )
    return {"costs": asdict(costs), "outcomes": outcomes, "loads": loads, "ledger": ledger}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--nodes", type=int, default=Workload.nodes)
    parser.add_argument("--shards", type=int, default=Workload.shards)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-ray", action="store_true", help="take Ray's costs as they were measured once")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    workload = Workload(nodes=options.nodes, shards=options.shards)
    if workload.replicas < 1:
        parser.error(f"--nodes {options.nodes}: a replica has {workload.stages} stages, give at least so many nodes")
    told = report(workload, measure(workload, with_ray=not options.no_ray), options.seed)
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
