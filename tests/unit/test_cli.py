"""jobs/caption.py without Ray: options become a config, exceptions an exit status and one line on stderr.

The engine behind it is a fake that notes what it was given.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import caption as cli
from ray_ministral.config import CaptionConfig, ImageLimits, PipelineConfig, PromptConfig, SamplingConfig
from ray_ministral.driver.summary import CaptionSummary
from ray_ministral.errors import (
    ConfigError,
    InputError,
    ModelError,
    PlacementError,
    RayMinistralError,
    StageDiedError,
    TooManyErrorsError,
)

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["--model", "m", "--input", "in.parquet", "--output", "out"]


def summary() -> CaptionSummary:
    return CaptionSummary(
        rows=10,
        ok=8,
        errors=2,
        seconds=12.5,
        startup_seconds=4.25,
        images_per_second=1.5,
        generated_tokens_per_second=30.0,
        stages=2,
        replicas=1,
        stage_busy=[0.5, 0.75],
        recoveries=0,
        output="out/[caption]",
        status_counts={"ok": 8, "bad_image": 2},
        startup={"ray": 1.5, "load": 2.75},
    )


@pytest.fixture(autouse=True)
def _untouched_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # The command puts the project on PYTHONPATH for the workers to come, and sets up logging: it owns its process.
    # Here it does not, and no other test shall inherit that.
    monkeypatch.setenv("PYTHONPATH", "")
    logger = logging.getLogger("ray_ministral")
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))


class FakeEngine:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.configs: list[CaptionConfig] = []
        self.made = 0

    def __call__(self) -> cli.Engine:
        self.made += 1
        return cli.Engine(run=self.run, describe=self.describe)

    def run(self, config: CaptionConfig) -> CaptionSummary:
        self.configs.append(config)
        if self.error is not None:
            raise self.error
        return summary()

    def describe(self, config: CaptionConfig) -> str:
        return f"the plan for {config.output}"


def config_of(*arguments: str) -> CaptionConfig:
    engine = FakeEngine()
    assert cli.main([*NEEDED, *arguments], engine=engine) == 0
    (config,) = engine.configs
    return config


def test_the_defaults_are_those_of_the_dataclasses() -> None:
    assert config_of() == CaptionConfig(model="m", inputs=("in.parquet",), output="out")


def test_every_option_reaches_its_field() -> None:
    config = config_of(
        *["--input", "more/*.parquet", "--image-column", "picture", "--prompt", "What is {name}?"],
        *["--system-prompt", "Be short.", "--stages", "3", "--replicas", "2", "--threads-per-stage", "4"],
        *["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "7", "--temperature", "0.5", "--top-k", "9"],
        *["--top-p", "0.9", "--seed", "11", "--stop", "a", "--stop", "b", "--ignore-eos", "--rows-per-shard", "13"],
        *["--limit", "17", "--columns", "id", "--columns", "name", "--with-token-ids", "--max-image-pixels", "19"],
        *["--max-error-rate", "0.25", "--retry-failed", "--trace", "t.json", "--address", "local"],
    )
    assert config == CaptionConfig(
        model="m",
        inputs=("in.parquet", "more/*.parquet"),
        output="out",
        prompt=PromptConfig(image_column="picture", prompt="What is {name}?", system_prompt="Be short."),
        sampling=SamplingConfig(
            max_new_tokens=7, temperature=0.5, top_k=9, top_p=0.9, seed=11, stop=("a", "b"), ignore_eos=True
        ),
        pipeline=PipelineConfig(stages=3, replicas=2, threads_per_stage=4, device="cpu", dtype="float32"),
        images=ImageLimits(max_pixels=19),
        rows_per_shard=13,
        limit=17,
        columns=("id", "name"),
        with_token_ids=True,
        max_error_rate=0.25,
        retry_failed=True,
        trace="t.json",
        address="local",
    )
    # Nothing above happens to be the default: otherwise a swapped or lost option would go unnoticed.
    plain = CaptionConfig(model="x", inputs=("x",), output="x")
    for field in dataclasses.fields(CaptionConfig):
        assert getattr(config, field.name) != getattr(plain, field.name), field.name
    assert config_of("--prompt-column", "question").prompt == PromptConfig(prompt_column="question")
    assert config_of("--max-new-tokens-column", "most").sampling == SamplingConfig(max_new_tokens_column="most")


def test_the_summary_goes_to_stdout_and_nothing_else_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(NEEDED, engine=FakeEngine()) == 0
    out, err = capsys.readouterr()
    for part in ["10: 8 ok, 2 errors", "bad_image 2", "12.5 s", "start-up 4.2 s", "1.50 images/s", "out/[caption]"]:
        assert part in out
    assert err == ""


def test_logs_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    class Talkative(FakeEngine):
        def run(self, config: CaptionConfig) -> CaptionSummary:
            logging.getLogger("ray_ministral.driver").info("rebuilt the pipeline")
            return super().run(config)

    assert cli.main(NEEDED, engine=Talkative()) == 0
    out, err = capsys.readouterr()
    assert "rebuilt the pipeline" in err
    assert "rebuilt the pipeline" not in out


def test_a_dry_run_prints_the_plan_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    assert cli.main([*NEEDED, "--dry-run"], engine=engine) == 0
    assert capsys.readouterr().out == "the plan for out\n"
    assert not engine.configs


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*NEEDED, "--modle", "x"], "--modle"),
        ([*NEEDED, "--stages", "two"], "--stages"),
        ([*NEEDED, "--stages", "0"], "--stages must be at least 1, got 0"),
        ([*NEEDED, "--device", "tpu"], "tpu"),
        ([*NEEDED, "--prompt", "a", "--prompt-column", "b"], "exclude each other"),
        ([*NEEDED, "--model", ""], "--model is missing"),
        ([*NEEDED, "stray"], "stray"),
        (NEEDED[:-2], "--output"),
        (NEEDED[2:], "--model"),
        ([], "--model"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    assert cli.main(arguments, engine=engine) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    # The engine imports Ray: it is not even made.
    assert engine.made == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("the output folder belongs to another job"), 2),
        (ModelError("no config.json"), 2),
        (InputError("no such file"), 2),
        (TooManyErrorsError("7 of 10 rows"), 3),
        (PlacementError("2 stages need 2 GPUs"), 4),
        (StageDiedError("stage 1 died"), 4),
        (RayMinistralError("something else"), 1),
    ],
)
def test_an_error_of_ours_is_one_line_and_its_status(
    error: RayMinistralError, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(NEEDED, engine=FakeEngine(error)) == status
    assert capsys.readouterr().err == f"error: {error}\n"


# `ray.init` replaces the SIGTERM handler by one that leaves through `sys.exit(SIGTERM)`.
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(int(signal.SIGTERM))])
def test_an_interruption_is_130(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(NEEDED, engine=FakeEngine(error)) == 130
    assert "goes on where this one stopped" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), SystemExit(7)])
def test_what_is_not_ours_is_not_swallowed(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        cli.main(NEEDED, engine=FakeEngine(error))
    assert caught.value is error


PROGRAM = """
import sys, time
from jobs import caption as cli

def run(config):
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

sys.exit(cli.main(engine=lambda: cli.Engine(run=run, describe=str)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_job_clean_up_and_ends_it_with_130(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *NEEDED], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert out == "cleaned up\n"
    # Click ends the line on which the terminal showed ^C.
    assert err.lstrip("\n").startswith("stopped: ")
    assert err.strip().count("\n") == 0


def test_the_signal_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cli.main(NEEDED, engine=FakeEngine())
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_starts_from_any_folder_and_finds_the_project(tmp_path: Path) -> None:
    """`python jobs/caption.py` from elsewhere, with nothing installed: the path is made from the script's place."""
    result = subprocess.run(
        [sys.executable, "-P", str(ROOT / "jobs" / "caption.py"), *NEEDED, "--stages", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (2, "error: --stages must be at least 1, got 0\n")


def test_workers_of_a_local_cluster_are_told_where_the_project_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    cli.main(NEEDED, engine=FakeEngine())
    cli.main(NEEDED, engine=FakeEngine())
    assert os.environ["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/somewhere"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from ray_ministral import __version__

    assert cli.main(["--version"], engine=FakeEngine()) == 0
    assert capsys.readouterr().out.strip().endswith(__version__)
