"""Captioning against peers, on one checkpoint and the same rows; all must generate the same token ids.

    python benchmarks/caption.py [--workload 1|2|3] [--rounds N] [--peers hugging-face,ray-data,vllm,vllm-stages]

Workload 1: 64 images of 224 x 224, prompts of 87 tokens, 32 new tokens. Workload 2: images of 112 to 448 pixels a
side, captions of 4 to 96 tokens, each row's length drawn beforehand and given to all. Workload 3: 2000 rows of workload
2 with this project alone: whether time per image and the driver's memory stay flat. Hidden 512, 8 layers, 8 heads on 2
KV heads, ffn 1536, vocabulary 8192; vision 256 x 4 layers; fp32, greedy, random weights, two cores.

Contestants: this project, by jobs/caption.py on a local Ray cluster, with two stages of one thread and with one stage
of two; Hugging Face `generate` in batches of 16; Ray Data with a pool of two Hugging Face models; vLLM with two threads
in one process, compiled, and with two pipeline stages (see `make venv-vllm`). Rounds are interleaved. Images/s is of
the steady state: from the first admission to the last commit for this project, after warming up for the others. The
wall is the rate of matrix products, measured in every round, over the FLOPs of an image. Status 1 when ids differ by
more than ties, or a peer fails.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from benchmarks import caption_figures as figures  # noqa: E402
from benchmarks.workloads import CAPTION_WORKLOADS, CaptionWorkload, kept, make_caption_rows, make_model  # noqa: E402
from ray_ministral.config import STAGE_ENVIRONMENT  # noqa: E402

OURS = {"2 stages of 1 thread": (2, 1), "1 stage of 2 threads": (1, 2)}
PEERS = {
    "hugging-face": "Hugging Face generate, batches of 16",
    "ray-data": "Ray Data, 2 Hugging Face models",
    "vllm": "vLLM, 2 threads",
    "vllm-stages": "vLLM, 2 pipeline stages",
}
GAIN = 5.0
WARM_ROWS = 16
LONG_SHARD_ROWS = 50
TIMEOUT_S = 3600


class PeerFailedError(Exception):
    """A contestant's process has failed."""


@dataclass(frozen=True)
class Files:
    """What a workload lies in; `requests` are the rows for vLLM, which expands the image token itself."""

    model: Path
    rows: Path
    warm_rows: Path
    requests: Path
    scratch: Path


@dataclass
class Contestant:
    """What one of them did, by round; token ids of the last one."""

    name: str
    speeds: list[float] = field(default_factory=list)
    whole_seconds: list[float] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    busy: list[list[float]] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)


def main() -> int:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/bench-caption"), help="where model and rows are kept")
    parser.add_argument("--workload", choices=sorted(CAPTION_WORKLOADS), nargs="+", default=sorted(CAPTION_WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS), help="some of them, or nothing, with commas between")
    parser.add_argument("--rows", type=int, help="fewer, for a quick try")
    parser.add_argument("--vllm-python", type=Path, default=Path(ROOT) / ".venv-vllm" / "bin" / "python")
    options = parser.parse_args()
    peers = [peer for peer in options.peers.split(",") if peer]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers has {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    present = [peer for peer in peers if _is_present(peer, options.vllm_python)]
    good = True
    for number in options.workload:
        workload = CAPTION_WORKLOADS[number]
        rows = options.rows or workload.rows
        files = prepare(options.folder.resolve(), number, workload, rows)
        if number == "3":
            run_long(files, workload, rows)
        else:
            good &= run_workload(number, files, rows, options.rounds, present, options.vllm_python)
    return 0 if good else 1


def prepare(folder: Path, number: str, workload: CaptionWorkload, rows: int) -> Files:
    """Make model and rows, unless they are there."""
    what = f"decoder 512 x 8, vision 256 x 4, seed 0, gain {GAIN}"
    model = kept(folder / "model", what, lambda path: make_model(path, GAIN))
    place = folder / f"rows-{number}"
    files = Files(model, place / "rows.parquet", place / "warm.parquet", place / "requests.json", folder / "run")

    def make(path: Path) -> None:
        make_caption_rows(path / files.rows.name, workload, rows)
        make_caption_rows(path / files.warm_rows.name, workload, WARM_ROWS, seed=1)
        requests = {"rows": _requests(model, files.rows), "warm_up": _requests(model, files.warm_rows)}
        (path / files.requests.name).write_text(json.dumps(requests))

    kept(place, [repr(workload), rows, what], make)
    files.scratch.mkdir(exist_ok=True)
    return files


def _requests(model: Path, rows: Path) -> list[dict[str, Any]]:
    """For each row: ids with one image token, how many with all of them, the limit, patches, the image as base64."""
    import io

    from PIL import Image

    from benchmarks.caption_peers import PATCH, read_rows
    from ray_ministral.captioning.prompts import PromptTokenizer

    tokenizer = PromptTokenizer(model)
    found = []
    for row in read_rows(rows):
        width, height = Image.open(io.BytesIO(row.image)).size
        ids = tokenizer.render(row.prompt, [(height, width)]).tolist()
        start = ids.index(tokenizer.image_token_id)
        found.append(
            {
                "token_ids": [*ids[: start + 1], *ids[start + tokenizer.image_tokens(height, width) :]],
                "prompt_tokens": len(ids),
                "max_new_tokens": row.max_new_tokens,
                "patches": (height // PATCH) * (width // PATCH),
                "image": base64.b64encode(row.image).decode(),
            }
        )
    return found


def run_workload(number: str, files: Files, rows: int, rounds: int, peers: Sequence[str], vllm_python: Path) -> bool:
    """Workload 1 or 2; whether all went well and all ids agree."""
    from ray_ministral.model.architecture import Architecture, load_config

    arch = Architecture.from_config(load_config(files.model))
    shapes = [
        (row["patches"], row["prompt_tokens"], row["max_new_tokens"])
        for row in figures.read_json(files.requests)["rows"]
    ]
    flops = figures.flops_per_image(arch, shapes)
    contestants = {name: Contestant(f"this project, {name}") for name in OURS}
    contestants |= {peer: Contestant(PEERS[peer]) for peer in peers}
    rates, failed = [], set()
    for turn in range(rounds):
        rates.append(figures.matrix_rate(arch.hidden_size, 2 * arch.ffn_hidden_size))
        for key, contestant in contestants.items():
            if key in failed:
                continue
            print(f"workload {number}, round {turn + 1} of {rounds}: {contestant.name}", file=sys.stderr)
            try:
                result = run_ours(files, rows, *OURS[key]) if key in OURS else run_peer(key, files, vllm_python)
            except PeerFailedError as error:
                print(f"failed: {contestant.name}: {error}", file=sys.stderr)
                failed.add(key)
                continue
            contestant.speeds.append(rows / result["seconds"])
            contestant.whole_seconds.append(result["whole_seconds"])
            contestant.walls.append(contestant.speeds[-1] * flops / rates[-1])
            contestant.busy += [result["busy"]] if "busy" in result else []
            contestant.token_ids = result["token_ids"]
    done = [contestant for key, contestant in contestants.items() if key not in failed]
    print(f"\n## Workload {number} ({CAPTION_WORKLOADS[number].name}), {rows} images x {rounds} rounds\n")
    print(
        f"{flops / 1e9:.2f} GFLOP an image; matrix products {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s\n"
    )
    agreed = print_table(done, files)
    return agreed and not failed


def print_table(contestants: Sequence[Contestant], files: Files) -> bool:
    """A line for each; whether all ids agree. Ratios are medians over rounds."""
    ours = contestants[0]
    print("| | images/s | spread | whole job s | this project's 2 stages against it | of the wall | same ids |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    agreed = True
    for contestant in contestants:
        agreement = _agreement(ours, contestant, files)
        agreed &= agreement.holds
        ratio = median(one / other for one, other in zip(ours.speeds, contestant.speeds, strict=True))
        print(
            f"| {contestant.name} | {median(contestant.speeds):.2f} | {min(contestant.speeds):.2f} to "
            f"{max(contestant.speeds):.2f} | {median(contestant.whole_seconds):.1f} | {ratio:.2f} | "
            f"{median(contestant.walls):.0%} | {agreement} |"
        )
    different = len({tuple(ids) for ids in ours.token_ids})
    tokens = len({token for ids in ours.token_ids for token in ids})
    print(f"\n{different} different captions of {len(ours.token_ids)}, {tokens} different tokens")
    for contestant in contestants:
        if contestant.busy:
            stages = ", ".join(f"{median(stage):.0%}" for stage in zip(*contestant.busy, strict=True))
            print(f"{contestant.name}: stages busy {stages}")
    return agreed


def _agreement(ours: Contestant, other: Contestant, files: Files) -> figures.Agreement:
    rows = len(ours.token_ids)
    try:
        parted = figures.partings(ours.token_ids, other.token_ids)
    except ValueError as error:
        print(f"{other.name}: {error}", file=sys.stderr)
        return figures.Agreement(rows, 0, float("inf"))
    if not parted:
        return figures.Agreement(rows, rows, None)
    pairs = files.scratch / "pairs.json"
    pairs.write_text(json.dumps(parted))
    gaps = _run_peers("gaps", files, "--pairs", str(pairs))
    return figures.Agreement(rows, rows - len(parted), max(gaps))


def run_ours(files: Files, rows: int, stages: int, threads: int) -> dict[str, Any]:
    """Our whole job, and what its summary and its output say."""
    import pyarrow.parquet as pq

    output = files.scratch / "ours"
    started = time.perf_counter()
    process = _start(_our_command(files, output, stages, threads, rows))
    _finish(process)
    whole = time.perf_counter() - started
    found: dict[int, list[int]] = {}
    for part in output.glob("part-*.parquet"):
        for row in pq.read_table(part, columns=["index", "token_ids"]).to_pylist():
            found[row["index"]] = row["token_ids"]
    summary = figures.read_json(output / "summary.json")
    seconds = summary["rows"] / summary["images_per_second"]
    ids = [found[index] for index in range(rows)]
    return {"seconds": seconds, "whole_seconds": whole, "busy": summary["stage_busy"], "token_ids": ids}


def run_long(files: Files, workload: CaptionWorkload, rows: int) -> None:
    """Workload 3, with one watcher outside."""
    output = files.scratch / "long"
    process = _start(_our_command(files, output, 2, 1, LONG_SHARD_ROWS))
    watch = figures.DriverWatch(output, LONG_SHARD_ROWS)
    watch.run(process)
    _finish(process)
    summary = figures.read_json(output / "summary.json")
    print(f"\n## Workload 3 ({workload.name}), {rows} run: this project, 2 stages of 1 thread\n")
    print(watch.table(rows, summary["rows"] / summary["images_per_second"]))
    busy = ", ".join(f"{stage:.0%}" for stage in summary["stage_busy"])
    print(f"\n{summary['images_per_second']:.2f} images/s; stages busy {busy}")


def _our_command(files: Files, output: Path, stages: int, threads: int, rows_per_shard: int) -> list[str]:
    shutil.rmtree(output, ignore_errors=True)
    most = max(workload.new_tokens[1] for workload in CAPTION_WORKLOADS.values())
    arguments = ["--model", files.model, "--input", files.rows, "--output", output, "--prompt-column", "prompt"]
    arguments += ["--max-new-tokens", most, "--max-new-tokens-column", "max_new_tokens", "--ignore-eos"]
    arguments += ["--columns", "index", "--with-token-ids", "--rows-per-shard", rows_per_shard, "--dtype", "float32"]
    arguments += ["--stages", stages, "--threads-per-stage", threads, "--address", "local"]
    return [sys.executable, str(Path(ROOT) / "jobs" / "caption.py"), *map(str, arguments)]


def run_peer(peer: str, files: Files, vllm_python: Path) -> dict[str, Any]:
    """One run of a peer, in the environment that makes it fastest here."""
    started = time.perf_counter()
    if peer.startswith("vllm"):
        result: dict[str, Any] = _run_vllm(files, 2 if peer == "vllm-stages" else 1, vllm_python)
    else:
        result = _run_peers(peer, files, "--warm-rows", str(files.warm_rows))
    return result | {"whole_seconds": time.perf_counter() - started}


def _run_vllm(files: Files, stages: int, python: Path) -> Any:
    result = files.scratch / "vllm.json"
    script = str(Path(ROOT) / "benchmarks" / "caption_vllm.py")
    command = [str(python), script, "--model", str(files.model), "--requests", str(files.requests)]
    site = str(Path(ROOT) / "benchmarks" / "vllm_site")
    _finish(_start([*command, "--result", str(result), "--stages", str(stages)], {"PYTHONPATH": site}))
    return figures.read_json(result)


def _run_peers(what: str, files: Files, *more: str) -> Any:
    result = files.scratch / f"{what}.json"
    command = [sys.executable, "-m", "benchmarks.caption_peers", what, "--model", str(files.model)]
    command += ["--rows", str(files.rows), "--result", str(result), *more]
    paths = os.pathsep.join(path for path in (ROOT, os.environ.get("PYTHONPATH", "")) if path)
    _finish(_start(command, STAGE_ENVIRONMENT | {"PYTHONPATH": paths}))
    return figures.read_json(result)


def _start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """In a session of its own, so that what it leaves behind can be ended; it says to a file what it has to say."""
    with Path(_log_of(command)).open("w") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONWARNINGS": "ignore"} | (environment or {}),
            start_new_session=True,
        )


def _finish(process: subprocess.Popen[str]) -> None:
    """Wait. Raises PeerFailedError with the last line that it has said."""
    try:
        status = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        raise PeerFailedError(f"it has run for more than {TIMEOUT_S} s") from error
    if status:
        assert not isinstance(process.args, str | bytes | os.PathLike)
        log = Path(_log_of([str(argument) for argument in process.args]))
        said = [line for line in log.read_text().splitlines() if line.strip()]
        raise PeerFailedError(f"status {status}: {said[-1] if said else 'it said nothing'} (all of it: {log})")


def _log_of(command: Sequence[str]) -> str:
    """Beside the run's result."""
    option = "--result" if "--result" in command else "--output"
    return str(Path(command[command.index(option) + 1]).with_suffix(".log"))


def _is_present(peer: str, vllm_python: Path) -> bool:
    if peer.startswith("vllm") and not vllm_python.exists():
        print(f"absent: {PEERS[peer]}: no {vllm_python} (make venv-vllm)")
    elif peer == "ray-data" and find_spec("pandas") is None:
        print(f"absent: {PEERS[peer]}: it needs pandas (pip install pandas)")
    else:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
