"""What it costs a training run that stages come and go: after a death, on purpose, and in every step.

    python benchmarks/elastic.py [--steps N] [--rounds N]

The model and samples of workload 1 of `benchmarks/train.py` (hidden 512, 8 layers, 128 tokens of text, 16 samples a
step), two stages of one thread on a local Ray cluster, AdamW, fp32. There is no peer: none that we know of goes on in
the same processes at the next step. Printed are

- seconds from a SIGKILL in mid-step to the end of the next finished step, less that of a step: with another process,
  with a warm spare, and without copies from a checkpoint;
- seconds of a change on purpose between two steps, to one stage and to two, the newcomer being ready;
- the seconds of a step with copies and without, in rounds that alternate.

Every curve must be that of the first run, or the status is 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from benchmarks.workloads import TRAIN_WORKLOADS, kept, make_model, make_rows  # noqa: E402
from ray_ministral.config import OptimizerConfig, PipelineConfig, SampleConfig, TrainConfig  # noqa: E402
from ray_ministral.driver.trainer import Trainer  # noqa: E402

WARM_STEPS = 3
STRIKE_AT = 5


class Measured(Trainer):
    """Notes when each step ended, its loss and norm; kills a stage in one step if it is told to."""

    def __init__(self, config: TrainConfig, *, kill: int | None = None) -> None:
        super().__init__(config)
        self._kill = kill
        self.ended: list[float] = []
        self.struck_at = 0.0
        self.changes: dict[str, float] = {}
        self.curve: dict[int, tuple[float, float]] = {}

    def _compute(self, step: int, *rest: Any) -> Any:
        if step == STRIKE_AT and self._kill is not None and not self.struck_at:
            pid = self._live.replicas[0].loaded[self._kill].pid
            self.struck_at = time.monotonic() + 0.2
            threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
        return super()._compute(step, *rest)

    def _result(self, *arguments: Any) -> Any:
        result = super()._result(*arguments)
        self.curve[result.step] = result.loss, result.grad_norm
        self.ended.append(time.monotonic())
        return result

    @property
    def step_seconds(self) -> float:
        """Median, without those that warm up."""
        both = zip(self.ended[WARM_STEPS:], self.ended[WARM_STEPS + 1 :], strict=False)
        return median(after - before for before, after in both)

    @property
    def recovery_seconds(self) -> float:
        """From the kill to the end of the next step, less the step itself."""
        return (
            next(moment for moment in self.ended if moment > self.struck_at + 0.5) - self.struck_at - self.step_seconds
        )


class Changing(Measured):
    """Goes from two stages to one and back, when a newcomer is ready."""

    def _grow(self, done: int) -> None:
        if done == 4:
            self._settle()
            self.changes["2 to 1 stages"] = self._timed(lambda: self._live.resize(1, done))
        if done == 6:
            while not self._live.may_grow():
                self._live.grow(done)
                time.sleep(0.05)
            self._settle()
            self.changes["1 to 2 stages"] = self._timed(lambda: self._live.grow(done))

    def _timed(self, work: Any) -> float:
        begun = time.monotonic()
        work()
        self._attach()
        return time.monotonic() - begun


def main() -> int:
    """Run all, print what was measured; 1 where a curve differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/bench-train"), help="where model and rows are kept")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder.resolve()
    workload = TRAIN_WORKLOADS["1"]
    model = kept(folder / "model", "decoder 512 x 8, vision 256 x 4, seed 0", make_model)
    rows = kept(
        folder / "elastic-rows",
        [repr(workload), options.steps],
        lambda path: make_rows(path / "rows.parquet", workload, workload.batch * options.steps),
    )
    output = folder / "elastic"
    config = TrainConfig(
        model=str(model),
        train=(str(rows / "rows.parquet"),),
        output=str(output),
        samples=SampleConfig(messages_column="messages"),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        pipeline=PipelineConfig(stages=2, threads_per_stage=1, dtype="float32"),
        global_batch_size=workload.batch,
        microbatch_size=workload.microbatch,
        steps=options.steps,
        freeze=("vision", "projector"),
        address="local",
    )
    curves: list[dict[int, tuple[float, float]]] = []

    def run(trainer: Any) -> Any:
        shutil.rmtree(output, ignore_errors=True)
        trainer.run()
        curves.append(trainer.curve)
        return trainer

    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(options.rounds):
        for copies, own_seconds in seconds.items():
            own_seconds.append(run(Measured(replace(config, buddy_copies=copies))).step_seconds)
    print(f"step: with copies {_show(seconds[True])} s, without {_show(seconds[False])} s, ", end="")
    print(f"cost {median(seconds[True]) / median(seconds[False]) - 1:.1%}")
    spare = replace(config, pipeline=replace(config.pipeline, spares=1))
    checkpoint = replace(config, buddy_copies=False, checkpoint_every=STRIKE_AT)
    for name, own in (("another process", config), ("a warm spare", spare), ("from a checkpoint", checkpoint)):
        print(f"death to next step, {name}: {run(Measured(own, kill=1)).recovery_seconds:.1f} s")
    for name, took in run(Changing(replace(config, min_stages=1))).changes.items():
        print(f"change on purpose, {name}: {took:.2f} s")
    agree = all(curve == curves[0] for curve in curves)
    print("all curves are equal" if agree else "curves differ")
    return 0 if agree else 1


def _show(values: list[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    sys.exit(main())
