"""jobs/train.py without Ray: options become a `TrainConfig`, exceptions an exit status and one line on stderr."""

from __future__ import annotations

import logging

import pytest

from jobs import train as cli
from ray_ministral.config import EvalConfig, OptimizerConfig, PipelineConfig, SampleConfig, TrainConfig
from ray_ministral.driver.train_result import TrainSummary
from ray_ministral.errors import InputError, RayMinistralError, StageDiedError

NEEDED = ["--model", "m", "--train", "in.parquet", "--output", "out", "--response-column", "caption"]


@pytest.fixture(autouse=True)
def _untouched_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    logger = logging.getLogger("ray_ministral")
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))


def config_of(*arguments: str) -> TrainConfig:
    seen: list[TrainConfig] = []

    def run(config: TrainConfig) -> TrainSummary:
        seen.append(config)
        return TrainSummary(3, 0, 0.5, 1.0, 100.0, 2, "out")

    assert cli.main([*NEEDED, *arguments], engine=lambda: run) == 0
    return seen[0]


def test_the_defaults_are_those_of_the_config() -> None:
    assert config_of("--steps", "3") == TrainConfig(
        model="m", train=("in.parquet",), output="out", samples=SampleConfig(response_column="caption"), steps=3
    )


def test_every_option_arrives() -> None:
    text = (
        "--train b.parquet --image-column picture --prompt-column question --stages 4 --replicas 2 "
        "--threads-per-stage 3 --device cpu --schedule interleaved --chunks-per-stage 2 --global-batch-size 32 "
        "--microbatch-size 4 --epochs 5 --seed 6 --dtype bfloat16 --learning-rate 0.1 --warmup-steps 7 "
        "--lr-schedule cosine --weight-decay 0.2 --clip-norm 0.3 --adam-beta1 0.4 --adam-beta2 0.5 --adam-eps 0.6 "
        "--freeze vision --freeze projector --lora-rank 8 --recompute --checkpoint-every 9 --keep-checkpoints 10 "
        "--resume never --address local --eval held.parquet --eval-every 11 --eval-limit 12 --eval-captions 13 "
        "--eval-max-new-tokens 14 --system-prompt brief --max-tokens 15 --lora-alpha 16 --merge-lora --min-stages 3 "
        "--max-stages 5 --optimizer muon --no-buddy-copies --max-restarts 17 --spares 18"
    )
    assert config_of(*text.split()) == TrainConfig(
        model="m",
        train=("in.parquet", "b.parquet"),
        output="out",
        samples=SampleConfig(
            image_column="picture", prompt_column="question", response_column="caption", system_prompt="brief"
        ),
        eval=EvalConfig("held.parquet", every=11, limit=12, captions=13, max_new_tokens=14),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.1,
            warmup_steps=7,
            lr_schedule="cosine",
            weight_decay=0.2,
            clip_norm=0.3,
            adam_beta1=0.4,
            adam_beta2=0.5,
            adam_eps=0.6,
        ),
        pipeline=PipelineConfig(
            stages=4, replicas=2, threads_per_stage=3, device="cpu", dtype="bfloat16", max_restarts=17, spares=18
        ),
        schedule="interleaved",
        chunks_per_stage=2,
        global_batch_size=32,
        microbatch_size=4,
        epochs=5,
        seed=6,
        freeze=("vision", "projector"),
        lora_rank=8,
        lora_alpha=16,
        merge_lora=True,
        recompute=True,
        max_tokens=15,
        min_stages=3,
        max_stages=5,
        buddy_copies=False,
        checkpoint_every=9,
        keep_checkpoints=10,
        resume="never",
        address="local",
    )


def test_a_prompt_of_ones_own() -> None:
    samples = config_of("--steps", "1", "--prompt", "What is {name}?").samples
    assert samples == SampleConfig(prompt="What is {name}?", response_column="caption")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--steps"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "1", "--epochs", "1"], "one of --steps and --epochs"),
        (["--steps", "1", "--messages-column", "chat"], "--messages-column excludes --response-column"),
        (["--steps", "1", "--chunks-per-stage", "2"], "needs --schedule interleaved"),
        (["--steps", "1", "--replicas", "9"], "every replica needs one"),
        (["--steps", "1", "--learning-rate", "0"], "--learning-rate must be positive"),
        (["--steps", "1", "--schedule", "wavelike"], "wavelike"),
        (["--steps", "1", "--freeze", "vision", "--freeze", "projector", "--freeze", "language"], "nothing to train"),
        (["--steps", "1", "--no-such-option"], "--no-such-option"),
        (["--steps", "1", "--prompt", "a", "--prompt-column", "b"], "--prompt and --prompt-column exclude each other"),
        (["--steps", "1", "--microbatch-size", "17"], "must not exceed --global-batch-size 16"),
        (["--steps", "1", "--schedule", "interleaved"], "give --chunks-per-stage 2"),
        (["--steps", "1", "--freeze", "language", "--lora-rank", "4"], "leaves --lora-rank nothing to train"),
        (["--steps", "1", "--lora-alpha", "4"], "--lora-alpha needs --lora-rank"),
        (["--steps", "1", "--lora-rank", "4", "--lora-alpha", "-1"], "--lora-alpha must be positive, got -1"),
        (["--steps", "1", "--merge-lora"], "--merge-lora needs --lora-rank"),
        (["--steps", "1", "--eval-every", "5"], "--eval-every needs --eval"),
        (["--steps", "1", "--eval-limit", "5"], "--eval-limit needs --eval"),
        (["--steps", "1", "--eval-captions", "5"], "--eval-captions needs --eval"),
        (["--steps", "1", "--eval-max-new-tokens", "5"], "--eval-max-new-tokens needs --eval"),
        (["--steps", "1", "--eval", "e", "--eval-every", "0"], "--eval-every must be at least 1, got 0"),
        (["--steps", "1", "--eval", "e", "--eval-captions", "-1"], "0 is none"),
        (["--steps", "1", "--eval", ""], "--eval is empty"),
        (["--steps", "5", "--warmup-steps", "6"], "never reach its peak"),
        (["--steps", "1", "--max-tokens", "1"], "--max-tokens must be at least 2"),
        (["--steps", "1", "--clip-norm", "0"], "inf is no clipping"),
        (["--steps", "1", "--weight-decay", "inf"], "--weight-decay must be a number"),
        (["--steps", "1", "--min-stages", "0"], "--min-stages must be at least 1"),
        (["--steps", "1", "--stages", "2", "--min-stages", "3"], "--stages 2 must lie between --min-stages 3 and"),
        (["--steps", "1", "--stages", "2", "--max-stages", "1"], "and --max-stages 1"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    def engine() -> cli.Run:
        pytest.fail("the engine was asked for")

    assert cli.main([*NEEDED, *arguments], engine=engine) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]


@pytest.mark.parametrize("error", [InputError("no such file"), StageDiedError("stage 1 died")])
def test_errors_have_their_status(error: RayMinistralError, capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: TrainConfig) -> TrainSummary:
        raise error

    assert cli.main([*NEEDED, "--steps", "1"], engine=lambda: run) == error.exit_status
    assert capsys.readouterr().err.strip() == f"error: {error}"
