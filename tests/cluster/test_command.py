"""`python jobs/caption.py` from another folder: exit statuses, one readable line, and no process left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ministral.data.columns import output_columns
from tests.cluster.commands import Run, caption_command, started
from tests.cluster.inputs import BAD_PICTURES, GOOD_ROWS, read_output, rows_of, write_pictures
from tests.cluster.processes import listening_addresses, wait_for

LOOPBACK = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")


def test_a_run_succeeds_quietly_on_the_loopback_only(model: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sockets: set[str] = set()
    processes: dict[int, str] = {}
    with started(caption_command(model, pictures, output, "--stages", 2)) as run:
        while run.process.poll() is None:
            current = run.processes()
            processes |= current
            sockets |= listening_addresses(set(current))
            time.sleep(0.3)
        assert run.wait() == 0, run.stderr
        run.wait_for_no_process()
        stdout, stderr = run.stdout, run.stderr
    assert any("gcs_server" in command for command in processes.values()), "the test saw the cluster"
    assert sum("StageActor" in command for command in processes.values()) == 2, processes
    assert len(sockets) > 3
    assert [socket for socket in sockets if not socket.startswith(LOOPBACK)] == []

    rows = rows_of(output)
    assert [row["id"] for row in rows] == list(range(1000, 1000 + len(rows)))
    assert read_output(output).column_names == ["id", "question", "weight", *output_columns(with_token_ids=False)]
    assert Counter(row["status"] for row in rows) == {"ok": GOOD_ROWS, "bad_image": 4, "too_large": 1}
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["rows"], summary["ok"]) == (len(rows), GOOD_ROWS)
    assert f"{len(rows)}: {GOOD_ROWS} ok, {len(BAD_PICTURES)} errors" in stdout
    for word in ("Warning", "WARNING", "ERROR", "Traceback", "deprecated"):
        assert word not in stderr, stderr
    # Every line is of the program: its log, or its progress.
    assert "done after" in stderr


@pytest.fixture(scope="module")
def begun(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder that a job with another prompt has begun."""
    from ray_ministral.driver.job import CaptionJob
    from tests.cluster.inputs import make_config

    output = tmp_path_factory.mktemp("begun")
    CaptionJob.plan_job(make_config(model, pictures, output, prompt="Quite another question.")).ledger.close()
    return output


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("missing model", ["no-such-model"]),
        ("another architecture", ["model_type 'llama'", "'mistral3'"]),
        ("missing column", ["no column 'photo'", "'image'", "--image-column"]),
        ("another job", ["belongs to another job", "prompt", "Quite another question.", "--output"]),
        ("too many stages", ["5 stages", "4 decoder layers", "--stages"]),
        ("unknown option", ["--stagse", "--help"]),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_starts_nothing(
    model: Path, pictures: Path, tmp_path: Path, begun: Path, wrong: str, words: list[str]
) -> None:
    output: Path = tmp_path / "out"
    more: list[str] = []
    if wrong == "missing model":
        model = tmp_path / "no-such-model"
    elif wrong == "another architecture":
        model = Path(shutil.copytree(model, tmp_path / "other"))
        config = json.loads((model / "config.json").read_text())
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        (model / "config.json").write_text(json.dumps(config))
    elif wrong == "missing column":
        more = ["--image-column", "photo"]
    elif wrong == "another job":
        output = begun
    elif wrong == "too many stages":
        more = ["--stages", "5"]
    else:
        more = ["--stagse", "2"]
    with started(caption_command(model, pictures, output, *more)) as run:
        assert run.wait() == 2, run.stderr
        assert run.stderr.startswith("error: ")
        assert len(run.stderr.strip().splitlines()) == 1, run.stderr
        assert all(word in run.stderr for word in words), run.stderr
        assert run.stdout == ""
        assert not (run.folder / "ray").exists(), "no Ray session was begun"
        run.wait_for_no_process(5)
    assert not list(output.glob("part-*"))


@pytest.mark.slow
def test_too_many_errors_and_the_same_command_with_a_higher_rate(model: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with started(caption_command(model, pictures, output, "--max-error-rate", 0)) as run:
        assert run.wait() == 3, run.stderr
        run.wait_for_no_process()
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith("error: 1 of 45 rows failed, more than --max-error-rate 0 allows"), run.stderr
        assert "row 3 of row group 0" in last
        assert "Traceback" not in run.stderr
    assert not (output / "_SUCCESS").exists()
    with started(caption_command(model, pictures, output, "--max-error-rate", 1)) as run:
        assert run.wait() == 0, run.stderr
    assert [row["id"] for row in rows_of(output)] == list(range(1000, 1045))
    assert (output / "_SUCCESS").exists()


def parts_of(output: Path) -> set[str]:
    return {path.name for path in output.glob("part-*.parquet")}


def stop_when(run: Run, moment: Callable[[], object], number: int, *, group: bool = False) -> None:
    """Send a signal when the moment has come; it must come before the run ends."""
    wait_for(lambda: moment() or run.process.poll() is not None, 200, lambda: f"too slow: {run.stderr}")
    assert run.process.poll() is None, f"it ended before it could be stopped: {run.stderr}"
    (os.killpg if group else os.kill)(run.process.pid, number)


@pytest.mark.slow
def test_stopped_by_every_signal_and_finished_by_the_same_command(model: Path, tmp_path: Path) -> None:
    rows = 2000
    source = write_pictures(tmp_path / "many.parquet", rows, bad=False)
    output = tmp_path / "out"
    command = caption_command(model, source, output, "--stages", 2, "--ignore-eos")
    kept: set[str] = set()

    def further() -> bool:
        return len(parts_of(output)) > len(kept) + 3

    # Ctrl-C in a terminal reaches the whole group; a batch system's SIGTERM the one process; SIGKILL cannot be caught.
    for number, group, status in (
        (signal.SIGINT, True, 130),
        (signal.SIGTERM, False, 130),
        (signal.SIGKILL, False, -signal.SIGKILL),
    ):
        with started(command) as run:
            stop_when(run, further, number, group=group)
            assert run.wait(60) == status, run.stderr
            # After SIGKILL nobody stops Ray's two agents: they tell the GCS, which is dead as well, for a minute first.
            run.wait_for_no_process(120 if number == signal.SIGKILL else 30)
            if status == 130:
                assert run.stderr.strip().splitlines()[-1].startswith("stopped: "), run.stderr
                assert "same command goes on" in run.stderr
                assert "Traceback" not in run.stderr
        assert parts_of(output) >= kept
        assert not (output / "_SUCCESS").exists()
        kept = parts_of(output)
    untouched = {name: (output / name).stat().st_mtime_ns for name in kept}
    with started(command) as run:
        assert run.wait() == 0, run.stderr
        run.wait_for_no_process()
    assert [row["id"] for row in rows_of(output)] == list(range(1000, 1000 + rows))
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == untouched
    assert not [path for path in output.iterdir() if path.name.startswith("_tmp")]
    assert (output / "_SUCCESS").exists()


def test_stopped_while_the_stages_start(model: Path, pictures: Path, tmp_path: Path) -> None:
    with started(caption_command(model, pictures, tmp_path / "out", "--stages", 2)) as run:
        stop_when(run, lambda: any("StageActor" in name for name in run.processes().values()), signal.SIGTERM)
        assert run.wait(60) == 130, run.stderr
        run.wait_for_no_process()
        assert "Traceback" not in run.stderr
