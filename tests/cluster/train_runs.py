"""What the tests of `jobs/train.py` share: pairs to learn, its command line, its curve, and Hugging Face's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import Mistral3ForConditionalGeneration

from ray_ministral.config import TrainConfig
from ray_ministral.driver.train_job import TrainJob
from ray_ministral.training.packing import build_microbatches
from ray_ministral.training.samples import SamplePreparer
from tests.parity.small_models import Row, quiet_transformers
from tests.parity.train_reference import HuggingFaceLoop
from tests.parity.train_runs import Batch

ROOT = Path(__file__).resolve().parents[2]


def write_pairs(path: Path, rows: int = 70) -> Path:
    """The example pictures with their captions as answers; rows that are broken are skipped in training."""
    table = pq.read_table(ROOT / "examples" / "pictures.parquet").slice(0, rows)
    answers = ["a picture" if text is None else text for text in table["expected"].to_pylist()]
    pq.write_table(table.append_column("response", pa.array(answers)), path, row_group_size=32)
    return path


def train_options(model: Path, pairs: Path, output: Path, *more: Any) -> list[str]:
    """Options of a small job in fp32, with clipping active and checkpoints."""
    options = ["--model", model, "--train", pairs, "--output", output, "--response-column", "response"]
    options += ["--dtype", "float32", "--threads-per-stage", 1, "--global-batch-size", 8, *more]
    return list(map(str, options))


def train_command(*arguments: Any) -> list[str]:
    """`train_options` as a command on a local cluster."""
    return [sys.executable, str(ROOT / "jobs" / "train.py"), *train_options(*arguments), "--address", "local"]


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, and of one that is half-written all but the last."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def curve(lines: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """Step, loss and norm, each with all its digits."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    """Of `final/`, by name."""
    with quiet_transformers():
        model = Mistral3ForConditionalGeneration.from_pretrained(output / "final", dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def hugging_face_loop(config: TrainConfig) -> tuple[HuggingFaceLoop, list[tuple[float, float]]]:
    """A plain loop over the same samples: the loop after the run, and loss and norm of each step.

    Tokens and pixels of samples are ours; that they are Hugging Face's is shown in `tests/parity/test_train_data.py`.
    """
    job = TrainJob.plan_job(config)
    with quiet_transformers():
        model = Mistral3ForConditionalGeneration.from_pretrained(config.model, dtype=torch.float32).eval()
    loop = HuggingFaceLoop(
        model, optimizer=config.optimizer, rate=job.learning_rate, clip_norm=config.optimizer.clip_norm
    )
    preparer = SamplePreparer(job.sample_options)
    steps = []
    for step in range(job.total_steps):
        places = [job.rows.place(number) for number in job.order.step_samples(step, config.global_batch_size)]
        prepared, pixels = preparer.prepare_step(places)
        microbatches = build_microbatches([prepared.samples], 1)
        rows = tuple(
            Row(torch.from_numpy(sample.token_ids).long(), tuple(images))
            for sample, images in zip(prepared.samples, pixels, strict=True)
            if sample is not None
        )
        steps.append(loop.step(Batch(microbatches, (pixels,), (rows,))))
    return loop, steps
