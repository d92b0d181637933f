"""What a training job refuses before a cluster is touched: options against the model, the data, the output folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_ministral.config import EvalConfig, OptimizerConfig, PipelineConfig, SampleConfig, TrainConfig
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.driver.train_resume import CHECKPOINTS
from ray_ministral.errors import ConfigError, InputError, UsageError
from ray_ministral.training.checkpoint import MARKER, STATE_FILE, TrainState, checkpoint_name
from ray_ministral.training.files import record, write_json

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "model"
ROWS = 10


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = pq.read_table(ROOT / "examples" / "pictures.parquet").slice(0, ROWS)
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(table.append_column("response", pa.array(["a"] * ROWS)), path)
    return path


@pytest.fixture
def config(pairs: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(MODEL),
        train=(str(pairs),),
        output=str(tmp_path / "run"),
        samples=SampleConfig(response_column="response"),
        global_batch_size=4,
        steps=8,
    )


def save(config: TrainConfig, step: int, output: Path | None = None) -> Path:
    """A checkpoint without tensors, as a run of this config would have committed it."""
    output = output or Path(config.output)
    job = TrainJob.plan_job(replace(config, resume="never", output=str(output.with_name("planned"))))
    folder = output / CHECKPOINTS / checkpoint_name(step)
    folder.mkdir(parents=True)
    state = job.state(step)
    write_json(folder / STATE_FILE, {"format": 1, **vars(state)})
    written = record(folder, STATE_FILE)
    write_json(folder / MARKER, {"format": 1, "step": step, "files": [vars(written)]})
    return folder


def test_a_job_that_can_run(config: TrainConfig, pairs: Path) -> None:
    job = TrainJob.plan_job(replace(config, eval=EvalConfig(str(pairs)), steps=None, epochs=3))
    assert (job.total_steps, job.first_step, job.resume_from) == (8, 0, None)
    assert job.eval_rows is not None
    assert len(job.eval_rows) == ROWS
    assert [len(job.chunks(stages, []).stages) for stages in (1, 2, 4)] == [1, 2, 4]
    assert TrainJob.plan_job(config).eval_rows is None


Change = Callable[[TrainConfig], TrainConfig]


def changed(**changes: Any) -> Change:
    return lambda config: replace(config, **changes)


def cut(**changes: Any) -> Change:
    return lambda config: replace(config, pipeline=PipelineConfig(**changes))


def asked(**changes: Any) -> Change:
    return lambda config: replace(config, samples=SampleConfig(response_column="response", **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut(stages=5), "--stages 5 with 1 chunks a stage for 4 decoder layers.* at most 4 stages"),
        (
            lambda config: replace(
                config, pipeline=PipelineConfig(stages=2), schedule="interleaved", chunks_per_stage=3
            ),
            "--stages 2 with 3 chunks a stage for 4 decoder layers.* at most 1 stages",
        ),
        (changed(max_stages=5), "--max-stages 5 with 1 chunks a stage for 4 decoder layers"),
        (
            lambda config: replace(config, steps=None, epochs=1, optimizer=OptimizerConfig(warmup_steps=4)),
            "--warmup-steps 4 is more than all 3 steps",
        ),
        (changed(eval=EvalConfig("no-such-file.parquet")), "--eval.*no-such-file.parquet"),
        (changed(eval=EvalConfig(str(ROOT / "examples" / "pictures.parquet"))), "no column 'response'"),
        (changed(train=("no-such-file.parquet",)), "--train.*no-such-file.parquet"),
        (asked(prompt="What is {nothing}?"), "nothing"),
        (asked(prompt="What [INST] is it?"), r"\[INST\]"),
        (asked(system_prompt="Say [/INST]"), r"\[/INST\]"),
        (changed(resume="no-such-folder"), "--resume no-such-folder is no folder"),
        (changed(resume=str(ROOT / "docs")), "is no checkpoint that can be used: it has no COMMITTED"),
        (changed(model="no-such-model"), "no-such-model"),
        (changed(output="s3://bucket/run"), "--output s3://bucket/run is an address: give a folder"),
        (changed(output=str(ROOT / "README.md" / "run")), "--output .*README.md/run cannot be used"),
    ],
)
def test_options_that_do_not_fit_the_model_or_the_data(change: Change, message: str, config: TrainConfig) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        TrainJob.plan_job(change(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(global_batch_size=2), "global_batch_size: 4 -> 2"),
        (asked(prompt="What is it?"), r"samples.prompt: None -> What is it\?"),
        (changed(seed=1), "seed: 0 -> 1"),
        (changed(max_tokens=100), "max_tokens: 8192 -> 100"),
        (changed(freeze=("vision",)), r"freeze: \[\] -> \['vision'\]"),
        (changed(lora_rank=4), "lora_rank: None -> 4"),
        (changed(steps=5), "has done 6 steps, more than the 5 of this run: raise --steps"),
        (changed(resume="never"), "would begin from the start, but .*step-00000006 is there from another"),
    ],
)
def test_options_that_do_not_fit_what_is_there(change: Change, message: str, config: TrainConfig) -> None:
    save(config, 6)
    with pytest.raises(ConfigError, match=message):
        TrainJob.plan_job(change(config))


def test_more_rows_than_the_run_began_with(config: TrainConfig, pairs: Path, tmp_path: Path) -> None:
    """The order of the samples would be another."""
    folder = tmp_path / "rows"
    folder.mkdir()
    shutil.copy(pairs, folder / "a.parquet")
    config = replace(config, train=(str(folder),))
    save(config, 6)
    shutil.copy(pairs, folder / "b.parquet")
    with pytest.raises(ConfigError, match="rows: 10 -> 20, row_groups: 1 -> 2"):
        TrainJob.plan_job(config)


def test_what_may_change_when_a_run_goes_on(config: TrainConfig, pairs: Path) -> None:
    checkpoint = save(config, 6)
    job = TrainJob.plan_job(
        replace(
            config,
            pipeline=PipelineConfig(stages=2, replicas=2, dtype="bfloat16"),
            schedule="zero-bubble",
            microbatch_size=1,
            optimizer=OptimizerConfig(learning_rate=1.0),
            steps=20,
            eval=EvalConfig(str(pairs)),
        )
    )
    assert (job.first_step, job.resume_from) == (6, checkpoint)


def test_a_checkpoint_of_elsewhere(config: TrainConfig, tmp_path: Path) -> None:
    elsewhere = save(config, 5, tmp_path / "elsewhere")
    assert TrainJob.plan_job(replace(config, resume=str(elsewhere))).first_step == 5
    save(config, 3)  # it will be superseded
    assert TrainJob.plan_job(replace(config, resume=str(elsewhere))).first_step == 5
    save(config, 6)  # the next resume would take this one
    with pytest.raises(ConfigError, match=r"would begin at step 5.*step-00000006 is there from another"):
        TrainJob.plan_job(replace(config, resume=str(elsewhere)))


def test_adapters_go_on_with_the_model_that_they_began_with(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, lora_rank=4, lora_alpha=8.0)
    save(config, 6)
    with pytest.raises(ConfigError, match=r"lora_alpha: 8.0 -> None"):
        TrainJob.plan_job(replace(config, lora_alpha=None))

    moved = shutil.copytree(MODEL, tmp_path / "moved")
    assert TrainJob.plan_job(replace(config, model=str(moved))).first_step == 6
    weights = bytearray((moved / "model.safetensors").read_bytes())
    half = len(weights) // 2
    weights[half:] = bytes(len(weights) - half)
    (moved / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=r"model.weights: "):
        TrainJob.plan_job(replace(config, model=str(moved)))


def test_a_checkpoint_of_an_earlier_version_is_compared_in_what_it_knows(config: TrainConfig) -> None:
    folder = save(config, 6)
    state = TrainJob.plan_job(config).state(6)
    known = {name: value for name, value in state.config.items() if name not in {"lora_alpha", "model"}}
    known["samples"] = {"image_column": "image", "response_column": "response"}
    write_json(folder / STATE_FILE, {"format": 1, **vars(TrainState(6, 0, state.cursor, known))})
    write_json(folder / MARKER, {"format": 1, "step": 6, "files": [vars(record(folder, STATE_FILE))]})
    assert TrainJob.plan_job(config).first_step == 6
    with pytest.raises(ConfigError, match=r"samples.response_column: response -> expected"):
        TrainJob.plan_job(replace(config, samples=SampleConfig(response_column="expected")))


def test_no_rows_to_evaluate_on(config: TrainConfig, pairs: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(pairs).slice(0, 0), empty)
    with pytest.raises(InputError, match="--eval has no rows"):
        TrainJob.plan_job(replace(config, eval=EvalConfig(str(empty))))
