"""What the death of a stage costs a captioning job: seconds to the next token, tokens fed again, throughput lost.

    python benchmarks/recovery.py [--rows N] [--many N] [--stages 2 3]

Model and images as in workload 1 of `benchmarks/caption.py`. The last stage is killed by its pid once half of the rows
are done, without and with a spare; then a job in which a stage, drawn at random, is killed every 30 s, with a spare,
against one that is left alone. Every run must give the same captions, or the status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from benchmarks.workloads import CAPTION_WORKLOADS, kept, make_caption_rows, make_model  # noqa: E402

NEW_TOKENS = 32
EVERY_S = 30.0
NEVER, ONCE, OFTEN = "never", "once", "often"
"""When a stage is killed: once half of the rows are done, or every `EVERY_S`."""


@dataclass
class Measured:
    """Of one job: seconds from each kill to the next token, and what `summary.json` says."""

    name: str
    summary: Any
    captions: list[tuple[Any, ...]]
    next_token: list[float] = field(default_factory=list)
    killed: int = 0


def main() -> int:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/bench-recovery"))
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--many", type=int, default=1500, help="rows of the jobs that are killed every 30 s")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--one", help="(for this program) run one job with these options, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_run(**json.loads(options.one))))
        return 0
    folder = options.folder.resolve()
    model = kept(folder / "model", "decoder 512 x 8, vision 256 x 4, seed 0", make_model)
    results: list[tuple[int, Measured]] = []
    for stages in options.stages:
        for name, when, spares in (("undisturbed", NEVER, 0), ("killed", ONCE, 0), ("killed, a spare", ONCE, 1)):
            results.append((stages, _job(folder, model, name, options.rows, stages, when, spares)))
    for name, when, spares in (("long, undisturbed", NEVER, 0), ("long, killed every 30 s, a spare", OFTEN, 1)):
        results.append((2, _job(folder, model, name, options.many, 2, when, spares)))
    print("| stages | job | kills | next token after, s | recovered in, s | tokens fed again | images/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    agreed = True
    for stages, run in results:
        whole = next(r for s, r in results if s == stages and len(r.captions) == len(run.captions))
        agreed &= run.captions == whole.captions
        after = ", ".join(f"{seconds:.1f}" for seconds in run.next_token) or "-"
        each = run.summary["recovery_seconds"] / max(1, run.summary["recoveries"])
        print(
            f"| {stages} | {run.name} | {run.killed} | {after} | {each:.1f} | {run.summary['recomputed_tokens']} | "
            f"{run.summary['images_per_second']:.1f} |"
        )
    print(f"\nall captions agree: {'yes' if agreed else 'NO'}")
    return 0 if agreed else 1


def _job(folder: Path, model: Path, name: str, rows: int, stages: int, when: str, spares: int) -> Measured:
    print(f"{stages} stages, {rows} rows: {name}", file=sys.stderr)
    source = folder / f"rows-{rows}" / "rows.parquet"
    workload = CAPTION_WORKLOADS["1"]
    kept(source.parent, [repr(workload), rows], lambda path: make_caption_rows(path / source.name, workload, rows))
    output = folder / "run"
    one = {
        "model": str(model),
        "source": str(source),
        "output": str(output),
        "stages": stages,
        "when": when,
        "spares": spares,
    }
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(one)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    told = json.loads(done.stdout.splitlines()[-1])
    return Measured(name, told["summary"], _captions(output), told["next_token"], told["killed"])


def _captions(output: Path) -> list[tuple[Any, ...]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([pq.read_table(part) for part in sorted(output.glob("part-*.parquet"))])
    return [(row["source_row"], row["status"], tuple(row["token_ids"] or ())) for row in table.to_pylist()]


def _run(*, model: str, source: str, output: str, stages: int, when: str, spares: int) -> dict[str, Any]:
    """One job, in this process."""
    from ray_ministral.config import CaptionConfig, PipelineConfig, PromptConfig, SamplingConfig
    from ray_ministral.driver.captioner import Captioner

    config = CaptionConfig(
        model=model,
        inputs=(source,),
        output=output,
        prompt=PromptConfig(prompt_column="prompt"),
        sampling=SamplingConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True),
        pipeline=PipelineConfig(stages=stages, spares=spares, threads_per_stage=1),
        rows_per_shard=50,
        with_token_ids=True,
        address="local",
    )
    chance = random.Random(0)
    times: list[tuple[float, float]] = []
    waiting: list[float] = []

    class Timed(Captioner):
        def _step_done(self, replica: Any, reference: Any) -> None:
            steps = len(replica.deaths), replica.rows
            super()._step_done(replica, reference)
            if waiting and replica.recovery is None and steps[0] == len(replica.deaths) > len(times):
                times.append((waiting.pop(), time.monotonic()))

    captioner = Timed(config)

    def kill(stage: int) -> None:
        (replica,) = captioner._replicas
        waiting.append(time.monotonic())
        os.kill(replica.pipeline.loaded[stage].pid, signal.SIGKILL)

    def wait_until_it_works() -> None:
        while not captioner._replicas or captioner._replicas[0].recovery is not None:
            time.sleep(0.1)

    def strike() -> None:
        wait_until_it_works()
        if when == ONCE:
            while captioner._tracker.totals.rows * 2 < captioner._job.plan.rows:
                time.sleep(0.05)
            kill(stages - 1)
            return
        while True:
            time.sleep(EVERY_S)
            wait_until_it_works()
            kill(chance.randrange(stages))

    if when != NEVER:
        threading.Thread(target=strike, daemon=True).start()
    summary = captioner.run()
    after = [round(done - struck, 2) for struck, done in times]
    return {"summary": summary.to_json(), "next_token": after, "killed": len(times) + len(waiting)}


if __name__ == "__main__":
    sys.exit(main())
