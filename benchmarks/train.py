"""Training on two stages against torch's pipelining and a plain Hugging Face loop, on the same samples.

    python benchmarks/train.py [--workload 1 2] [--rounds N] [--steps N]

Workload 1 is the decoder alone: 16 samples of 128 tokens a step, in 8 microbatches. Workload 2 is the whole model with
images of 112 to 448 pixels a side and answers of 5 to 97 tokens. Hidden 512, 8 layers, 8 heads on 2 KV heads, ffn 1536,
vocabulary 8192, tied; vision 256 x 4 layers; fp32, AdamW, random weights. All use two cores: this project two stages of
one thread, run as a whole job by jobs/train.py on a local Ray cluster, without copies of the state, which no peer keeps
either; torch's pipelining two processes of one thread, with the layers cut in half, as is usual, and where this project
cuts them (its last stage has the output layer to do); the Hugging Face loop one process of two threads, in microbatches
of 2 and with the whole batch at once.

Rounds are interleaved. Every loss curve must be that of the first contestant, or the status is 1. Then the simulator's
step against the measured one, and the peak memory of each stage against the activations that the simulator counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from benchmarks import train_figures as figures  # noqa: E402
from benchmarks.workloads import TRAIN_WORKLOADS, TrainWorkload, kept, make_model, make_rows  # noqa: E402
from ray_ministral.config import STAGE_ENVIRONMENT  # noqa: E402

WARM_STEPS = 5
"""Steps of each run that are not counted."""

SEED = 0
LOSS_TOLERANCE = 2e-4
SCHEDULES = ("1f1b", "zero-bubble")


@dataclass
class Contestant:
    """What one of them did: seconds of each counted step, tokens of it, and the losses of a run."""

    name: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def speeds(self) -> list[float]:
        """Tokens (without padding) a second, of each counted step."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    def add(self, seconds: Sequence[float], tokens: Sequence[int], losses: Sequence[float]) -> None:
        """A run."""
        self.seconds += seconds[WARM_STEPS:]
        self.tokens += tokens[WARM_STEPS:]
        self.losses = list(losses)


def main() -> int:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/bench-train"), help="where model and rows are kept")
    parser.add_argument("--workload", choices=sorted(TRAIN_WORKLOADS), nargs="+", default=sorted(TRAIN_WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    folder = options.folder.resolve()
    model = kept(folder / "model", "decoder 512 x 8, vision 256 x 4, seed 0", make_model)
    agreed = [run_workload(number, folder, model, options.rounds, options.steps) for number in options.workload]
    return 0 if all(agreed) else 1


def run_workload(number: str, folder: Path, model: Path, rounds: int, steps: int) -> bool:
    """One workload; whether all loss curves agree."""
    workload = TRAIN_WORKLOADS[number]
    rows = folder / f"rows-{number}" / "rows.parquet"
    kept(
        rows.parent, [repr(workload), steps], lambda path: make_rows(path / rows.name, workload, workload.batch * steps)
    )
    samples = folder / f"samples-{number}.safetensors"
    layers = prepare(model, rows, workload, steps, samples)
    commands = {f"this project, {name}": _our_command(model, rows, workload, name, steps) for name in SCHEDULES}
    if workload.image_sides is None:
        for one, other in dict.fromkeys([(4, 4), layers]):
            cut = ("--layers", str(one), str(other))
            name = f"torch pipelining, 1F1B, layers {one} and {other}"
            commands[name] = _peer_command("pipelining", model, samples, workload.microbatch, 1, *cut)
    for microbatch in (workload.microbatch, workload.batch):
        name = f"Hugging Face loop, batches of {microbatch}"
        commands[name] = _peer_command("hugging-face", model, samples, microbatch, 2)

    contestants = {name: Contestant(name) for name in commands}
    reports: dict[str, figures.OurRun] = {}
    for turn in range(rounds):
        for name, command in commands.items():
            print(f"workload {number}, round {turn + 1} of {rounds}: {name}", file=sys.stderr)
            if command[1].endswith("train.py"):
                output = folder / f"run-{number}"
                result, reports[name] = _run_ours(command, output)
            else:
                result = _run(command)
            contestants[name].add(result["seconds"], result["tokens"], result["losses"])

    print(f"\n## Workload {number} ({workload.name}), {steps - WARM_STEPS} steps x {rounds} rounds\n")
    print("| | tokens/s | spread | step s |\n| --- | --- | --- | --- |")
    for contestant in contestants.values():
        speeds = contestant.speeds
        print(
            f"| {contestant.name} | {median(speeds):.0f} | {min(speeds):.0f} to {max(speeds):.0f} | "
            f"{median(contestant.seconds):.2f} |"
        )
    print(f"\nlayers of the two stages: {layers[0]} and {layers[1]}")
    for name, report in reports.items():
        print(f"\n{name}\n{report.table()}")
    return _same_losses(list(contestants.values()))


def prepare(model: Path, rows: Path, workload: TrainWorkload, steps: int, samples: Path) -> tuple[int, int]:
    """Write what the peers train on: the samples of our job's own order; returns where our job cuts the decoder."""
    import torch

    from benchmarks.train_peers import IGNORED, Sample, write_samples
    from ray_ministral.config import PromptConfig
    from ray_ministral.data.images import ImagePreprocessor
    from ray_ministral.model.architecture import Architecture, load_config
    from ray_ministral.pipeline.partition import Partition
    from ray_ministral.pipeline.pixels import PixelTable
    from ray_ministral.training.costs import training_costs
    from ray_ministral.training.order import SampleOrder
    from ray_ministral.training.samples import SampleOptions, SamplePreparer, plan_samples

    text_alone = workload.image_sides is None
    options = SampleOptions(
        str(model),
        4096,
        prompt=PromptConfig(prompt_column=None if text_alone else "prompt"),
        response_column=None if text_alone else "response",
        messages_column="messages" if text_alone else None,
    )
    index = plan_samples([str(rows)], options)
    preparer = SamplePreparer(options)
    table = PixelTable(ImagePreprocessor(str(model)).normalisation_table(), torch.float32, torch.device("cpu"))
    order = SampleOrder(len(index), SEED)
    written, first = [], []
    for step in range(steps):
        places = [index.place(number) for number in order.step_samples(step, workload.batch)]
        prepared, pixels = preparer.prepare_step(places)
        assert not prepared.skipped, prepared.skipped
        own = []
        for sample, images in zip(prepared.samples, pixels, strict=True):
            assert sample is not None
            first += [sample] if step == 0 else []
            labels = torch.full((sample.num_tokens,), IGNORED)
            labels[1:] = torch.from_numpy(sample.targets[:-1])
            image = table.normalise(images[0]).contiguous() if images else None
            own.append(Sample(torch.from_numpy(sample.token_ids).long(), labels, image))
        written.append(own)
    write_samples(samples, written)
    costs = training_costs(Architecture.from_config(load_config(str(model))), first)
    one, other = Partition.balanced(costs, 2).layers_per_stage
    return one, other


def _our_command(model: Path, rows: Path, workload: TrainWorkload, schedule: str, steps: int) -> list[str]:
    from benchmarks.train_peers import BETAS, CLIP_NORM, EPS, LEARNING_RATE, WEIGHT_DECAY

    if workload.image_sides is None:  # the peers' decoders have no vision tower either
        columns = ["--messages-column", "messages", "--freeze", "vision", "--freeze", "projector"]
    else:
        columns = ["--prompt-column", "prompt", "--response-column", "response"]
    rates = ["--learning-rate", LEARNING_RATE, "--weight-decay", WEIGHT_DECAY, "--clip-norm", CLIP_NORM]
    betas = ["--adam-beta1", BETAS[0], "--adam-beta2", BETAS[1], "--adam-eps", EPS]
    sizes = ["--steps", steps, "--global-batch-size", workload.batch, "--microbatch-size", workload.microbatch]
    layout = ["--stages", 2, "--threads-per-stage", 1, "--schedule", schedule, "--dtype", "float32", "--seed", SEED]
    layout.append("--no-buddy-copies")  # no peer keeps any
    arguments = ["--model", model, "--train", rows, *columns, *sizes, *layout, *rates, *betas]
    command = [sys.executable, str(Path(ROOT) / "jobs" / "train.py"), *arguments, "--address", "local"]
    return [str(argument) for argument in command]


def _peer_command(peer: str, model: Path, samples: Path, microbatch: int, threads: int, *more: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.train_peers", peer, "--model", model, "--samples", samples]
    return [str(argument) for argument in [*command, "--microbatch", microbatch, "--threads", threads, *more]]


def _run(command: list[str]) -> dict[str, Any]:
    """A peer; it is given the environment that makes it fastest here."""
    threads = command[command.index("--threads") + 1]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"} | STAGE_ENVIRONMENT
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _run_ours(command: list[str], output: Path) -> tuple[dict[str, Any], figures.OurRun]:
    """Our whole job; its own metrics and timeline."""
    shutil.rmtree(output, ignore_errors=True)
    trace = output.with_suffix(".trace.json")
    command = [*command, "--output", str(output), "--trace", str(trace)]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    result = {key: [line[name] for line in lines] for key, name in (("seconds", "seconds"), ("losses", "loss"))}
    schedule = command[command.index("--schedule") + 1]
    return result | {"tokens": [line["tokens"] for line in lines]}, figures.read_run(trace, schedule, WARM_STEPS)


def _same_losses(contestants: Sequence[Contestant]) -> bool:
    first, *others = contestants
    agreed = True
    for other in others:
        worst = max(abs(a - b) / abs(a) for a, b in zip(first.losses, other.losses, strict=True))
        if worst > LOSS_TOLERANCE:
            print(f"the loss of {other.name} is off that of {first.name} by {worst:.1e}", file=sys.stderr)
            agreed = False
    ends = f"step 1: {first.losses[0]:.5f}, last: {first.losses[-1]:.5f}"
    print(f"\nloss curves agree: {'yes' if agreed else 'NO'} ({ends})")
    return agreed


if __name__ == "__main__":
    sys.exit(main())
