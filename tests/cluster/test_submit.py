"""A cluster from `ray start --head`, and jobs sent to it with `ray job submit`, as the README shows.

The commands are the README's own; what one machine and a test force upon us is changed: ports, folders, a home of its
own. The head runs in the foreground, so that it ends with a process of ours, and nothing is stopped by name.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from ray_ministral.config import OptimizerConfig, SampleConfig, TrainConfig
from tests.cluster.commands import MARK, ROOT, Run, caption_command, started
from tests.cluster.inputs import GOOD_ROWS, rows_of, write_pictures
from tests.cluster.processes import wait_for
from tests.cluster.train_runs import final_weights, hugging_face_loop, metrics, train_options, write_pairs

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = "fedcba9876543210" * 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def readme_commands() -> tuple[str, str]:
    """The commands of the section on clusters that start the head and that submit a job."""
    section = (ROOT / "README.md").read_text().partition("## On a cluster")[2].partition("\n## ")[0]
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    assert "export RAY_AUTH_MODE=token" in blocks
    (start,) = [line for line in blocks.splitlines() if "ray start" in line]
    (submit,) = [line for line in blocks.splitlines() if "ray job submit" in line]
    return start, submit


@dataclass(frozen=True)
class Head:
    run: Run
    dashboard: str
    gcs: str

    @property
    def environment(self) -> dict[str, str]:
        """What a shell on this machine needs to talk to it; its processes are marked as others than the cluster's."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "PYTHONPATH"}
        return kept | {"HOME": str(self.run.folder), "RAY_AUTH_MODE": "token", MARK: "client"}

    def ray(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RAY, *arguments],
            check=False,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
        )

    def jobs(self) -> dict[str, str]:
        """Status of each submitted job."""
        text = self.api("/api/jobs/")
        return {job["submission_id"]: job["status"] for job in json.loads(text) if job["submission_id"]}

    def api(self, path: str) -> str:
        import urllib.request

        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())

    def leftovers(self) -> list[str]:
        """Actors that live, and processes of stages and tasks."""
        found = json.loads(self.api("/api/v0/actors?detail=0"))["data"]["result"]["result"]
        actors = [str(actor["class_name"]) for actor in found if actor["state"] != "DEAD"]
        groups = json.loads(self.api("/api/v0/placement_groups?detail=0"))["data"]["result"]["result"]
        placed = [str(group) for group in groups if group["state"] != "REMOVED"]
        busy = [name for name in self.run.processes().values() if name.startswith("ray::") and "StageActor" in name]
        return [*(actor for actor in actors if actor != "JobSupervisor"), *placed, *busy]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    start, _ = readme_commands()
    dashboard_port, port = free_port(), free_port()
    start = start.replace(".venv/bin/ray", RAY).replace("$PWD/.venv/bin", str(Path(RAY).parent))
    assert RAY in start
    assert str(Path(RAY).parent) + ":$PATH" in start
    start += (
        f" --block --port={port} --dashboard-port={dashboard_port} --dashboard-agent-listen-port={free_port()}"
        " --num-cpus=4 --object-store-memory=200000000 --temp-dir=$RAY_TMPDIR"
    )
    with started(
        ["bash", "-c", f"mkdir -m 700 ~/.ray; echo -n {TOKEN} > ~/.ray/auth_token; exec env {start}"],
        RAY_AUTH_MODE="token",
    ) as run:
        head = Head(run, f"http://127.0.0.1:{dashboard_port}", f"127.0.0.1:{port}")
        wait_for(lambda: answers(head) or run.process.poll() is not None, 120, lambda: run.stdout + run.stderr)
        assert run.process.poll() is None, run.stdout + run.stderr
        yield head
        # Ctrl-C ends at once; on SIGTERM a node is drained first, for half a minute.
        run.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(timeout=20)


def answers(head: Head) -> bool:
    try:
        return bool(head.api("/api/version"))
    except OSError:
        return False


def submit_command(head: Head, model: Path, source: Path, output: Path) -> list[str]:
    """The README's, with other paths and the test's ports."""
    _, submit = readme_commands()
    assert "--working-dir . -- " in submit
    replaced = {
        "http://127.0.0.1:8265": head.dashboard,
        '"$PWD/examples/model"': shlex.quote(str(model)),
        '"$PWD/examples/pictures.parquet"': shlex.quote(str(source)),
        '"$PWD/out/submitted"': shlex.quote(str(output)),
        ".venv/bin/ray": RAY,
    }
    for old, new in replaced.items():
        assert old in submit, f"the README submits without {old}"
        submit = submit.replace(old, new)
    return shlex.split(submit)[1:]


def test_a_submitted_job_succeeds_and_leaves_nothing(head: Head, model: Path, pictures: Path, tmp_path: Path) -> None:
    done = head.ray(*submit_command(head, model, pictures, tmp_path / "out"), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert [row["id"] for row in rows_of(tmp_path / "out")] == list(range(1000, 1045))
    assert sum(row["status"] == "ok" for row in rows_of(tmp_path / "out")) == GOOD_ROWS
    assert (tmp_path / "out" / "_SUCCESS").exists()
    wait_for(lambda: not head.leftovers(), 30, lambda: f"left on the cluster: {head.leftovers()}")


def test_a_stopped_job_leaves_nothing_and_goes_on_when_submitted_again(head: Head, model: Path, tmp_path: Path) -> None:
    rows = 400
    source = write_pictures(tmp_path / "many.parquet", rows, bad=False)
    output = tmp_path / "out"
    command = submit_command(head, model, source, output)
    command += ["--rows-per-shard", "16", "--ignore-eos", "--max-new-tokens", "32"]
    before = set(head.jobs())
    at = command.index("submit") + 1
    begun = head.ray(*command[:at], "--no-wait", *command[at:])
    assert begun.returncode == 0, begun.stdout + begun.stderr
    (job,) = set(head.jobs()) - before
    wait_for(lambda: len(list(output.glob("part-*"))) > 2, 200, lambda: head.api(f"/api/jobs/{job}/logs"))
    stopped = head.ray("job", "stop", "--address", head.dashboard, job)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    wait_for(lambda: head.jobs()[job] == "STOPPED", 60, lambda: head.jobs()[job])
    wait_for(lambda: not head.leftovers(), 30, lambda: f"left on the cluster: {head.leftovers()}")
    logs = json.loads(head.api(f"/api/jobs/{job}/logs"))["logs"]
    assert "stopped: " in logs, "it had the time to unwind"
    assert not (output / "_SUCCESS").exists()
    kept = {part: part.stat().st_mtime_ns for part in output.glob("part-*")}

    done = head.ray(*command, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["id"] for row in rows_of(output)] == list(range(1000, 1000 + rows))
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    wait_for(lambda: not head.leftovers(), 30, lambda: f"left on the cluster: {head.leftovers()}")


def test_a_driver_that_is_killed_leaves_nothing(head: Head, model: Path, tmp_path: Path) -> None:
    """A driver outside the cluster: `python jobs/caption.py --address …`, killed in the middle."""
    source = write_pictures(tmp_path / "many.parquet", 240, bad=False)
    output = tmp_path / "out"
    command = caption_command(model, source, output, "--stages", 2, "--ignore-eos", "--address", head.gcs)
    environment = {"HOME": str(head.run.folder), "RAY_AUTH_MODE": "token"}
    with started(command, **environment) as run:
        wait_for(
            lambda: len(list(output.glob("part-*"))) > 2 or run.process.poll() is not None, 200, lambda: run.stderr
        )
        assert run.process.poll() is None, run.stderr
        assert head.leftovers(), "the instrument sees the stages"
        run.process.send_signal(signal.SIGKILL)
        run.wait(30)
        wait_for(lambda: not head.leftovers(), 30, lambda: f"left on the cluster: {head.leftovers()}")
    with started(command, **environment) as run:
        assert run.wait() == 0, run.stderr
    assert [row["id"] for row in rows_of(output)] == list(range(1000, 1240))


def test_too_many_errors_leave_the_cluster_clean(head: Head, model: Path, pictures: Path, tmp_path: Path) -> None:
    command = submit_command(head, model, pictures, tmp_path / "out")
    done = head.ray(*command, "--max-error-rate", "0", timeout=240)
    assert done.returncode == 1, "the status of `ray job submit`, whatever the job's own was"
    assert "error: 1 of 45 rows failed" in done.stdout
    wait_for(lambda: not head.leftovers(), 30, lambda: f"left on the cluster: {head.leftovers()}")


def test_a_submitted_training_has_hugging_faces_curve(head: Head, model: Path, tmp_path: Path) -> None:
    """Ladder D over the whole road: `ray job submit`, real actors, gloo, metrics.jsonl, and the model in `final/`."""
    pairs = write_pairs(tmp_path / "pairs.parquet")
    output, steps = tmp_path / "out", 20
    command = submit_command(head, model, pairs, output)
    command = [*command[: command.index("--") + 1], "python", "jobs/train.py", *train_options(model, pairs, output)]
    command += ["--stages", "2", "--schedule", "zero-bubble", "--steps", str(steps)]
    options = OptimizerConfig(5e-4, 3, "cosine", weight_decay=0.1, clip_norm=0.1, adam_eps=1e-6)
    for name, value in asdict(options).items():
        option = "optimizer" if name == "name" else name.replace("_", "-")
        command += [f"--{option}", str(value)]
    done = head.ray(*command, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    wait_for(lambda: not head.leftovers(), 30, lambda: f"left on the cluster: {head.leftovers()}")

    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(line["grad_norm"] > 0.1 for line in lines), "clipping is active"
    config = TrainConfig(
        model=str(model),
        train=(str(pairs),),
        output=str(tmp_path / "none"),
        samples=SampleConfig(response_column="response"),
        optimizer=options,
        global_batch_size=8,
        steps=steps,
    )
    loop, expected = hugging_face_loop(config)
    assert [line["loss"] for line in lines] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx([norm for _, norm in expected], rel=1e-4)
    ours, theirs = final_weights(output), loop.weights()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name


@pytest.mark.parametrize("wrong", ["token", "address"])
def test_no_way_into_the_cluster_is_one_line(
    head: Head, model: Path, pictures: Path, tmp_path: Path, wrong: str
) -> None:
    address = head.gcs if wrong == "token" else f"127.0.0.1:{free_port()}"
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64 if wrong == "token" else TOKEN}
    begun = time.monotonic()
    with started(caption_command(model, pictures, tmp_path / "out", "--address", address), **environment) as run:
        assert run.wait(120) == 4, run.stderr
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: no Ray cluster at --address {address}"), run.stderr
        assert "Traceback" not in run.stderr
        run.wait_for_no_process(5)
    assert time.monotonic() - begun < 100
