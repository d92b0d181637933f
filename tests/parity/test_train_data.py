"""From parquet to the loss: samples, microbatches, stages against Hugging Face's template, tokenizer and model."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

from ray_ministral.config import PromptConfig
from ray_ministral.data.images import ImagePreprocessor
from ray_ministral.pipeline.generators import make_schedule
from ray_ministral.training.order import SampleOrder
from ray_ministral.training.packing import build_microbatches
from ray_ministral.training.samples import SampleOptions, SamplePreparer, plan_samples
from tests.parity.train_harness import Pipeline

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model"
PATCH = 28
PART = pa.struct([("type", pa.string()), ("text", pa.string())])
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))]))
IGNORED = -100


def picture(generator: np.random.Generator) -> bytes:
    height, width = (PATCH * int(n) for n in generator.integers(1, 4, 2))
    stream = BytesIO()
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def make_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns, with an image in some of them."""
    generator = np.random.default_rng(4)
    rows = []
    for number in range(count):
        messages: list[dict[str, Any]] = []
        images: list[bytes] = []
        for turn in range(1 + number % 3):
            shown = (number + turn) % 4 != 0
            images += [picture(generator)] * shown
            question = [{"type": "image", "text": None}] * shown + [{"type": "text", "text": f"what is {turn}?"}]
            messages.append({"role": "user", "content": question})
            answer = " ".join(generator.choice(["two", "red", "circles", "above", "a", "square"], 1 + number % 5))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        rows.append({"image": images, "messages": messages})
    return rows


def expand(ids: list[int], labels: list[int], tokenizer: Any, images: list[np.ndarray]) -> tuple[list[int], list[int]]:
    """Placeholders as the model's documentation has them: a row of patches and its break, the last one an end."""
    image, row_end, end = tokenizer.convert_tokens_to_ids(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    expanded: list[int] = []
    expanded_labels: list[int] = []
    left = list(images)
    for id_, label in zip(ids, labels, strict=True):
        grid = [id_]
        if id_ == image:
            _, height, width = left.pop(0).shape
            grid = ([image] * (width // PATCH) + [row_end]) * (height // PATCH)
            grid[-1] = end
        expanded += grid
        expanded_labels += [label] * len(grid)
    assert not left
    return expanded, expanded_labels


def reference_loss(rows: list[dict[str, Any]]) -> tuple[float, int]:
    """The mean over all answers' tokens, a row at a time, and how many they are."""
    model = Mistral3ForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    preprocessor = ImagePreprocessor(MODEL)
    table = torch.from_numpy(preprocessor.normalisation_table())
    total, count = 0.0, 0
    for row in rows:
        images = [preprocessor.resize(Image.open(BytesIO(data))) for data in row["image"]]
        ids: list[int] = []
        labels: list[int] = []
        for stop in range(1, len(row["messages"]) + 1):
            so_far = tokenizer.apply_chat_template(row["messages"][:stop], tokenize=True, return_dict=True)["input_ids"]
            new = so_far[len(ids) :]
            labels += new if row["messages"][stop - 1]["role"] == "assistant" else [IGNORED] * len(new)
            ids = so_far
        expanded, labels = expand(ids, labels, tokenizer, images)
        size = max((max(image.shape[1:]) for image in images), default=0)
        padded = torch.zeros(len(images), 3, size, size)
        for index, image in enumerate(images):
            pixels = torch.from_numpy(image.astype(np.int64))
            for channel in range(3):
                padded[index, channel, : image.shape[1], : image.shape[2]] = table[channel][pixels[channel]]
        shown = {"pixel_values": padded, "image_sizes": torch.tensor([image.shape[1:] for image in images])}
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([expanded]), **(shown if images else {})).logits[0]
        wanted = torch.tensor(labels[1:])
        loss = torch.nn.functional.cross_entropy(logits[:-1], wanted, ignore_index=IGNORED, reduction="sum")
        total += float(loss)
        count += int((wanted != IGNORED).sum())
    return total / count, count


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_the_loss_is_hugging_faces(tmp_path: Path, num_microbatches: int) -> None:
    rows = make_rows(9)
    table = pa.table(
        {
            "image": pa.array([row["image"] for row in rows], pa.list_(pa.binary())),
            "messages": pa.array([row["messages"] for row in rows], MESSAGES),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    options = SampleOptions(
        model_dir=str(MODEL), max_tokens=1000, prompt=PromptConfig(), response_column=None, messages_column="messages"
    )
    index = plan_samples([str(tmp_path)], options)
    preparer = SamplePreparer(options)
    places = [index.place(number) for number in SampleOrder(len(index), 0).step_samples(0, 9)]
    # two blocks, as two readers would give them
    first, second = preparer.prepare_step(places[:4]), preparer.prepare_step(places[4:])
    microbatches = build_microbatches([first[0].samples, second[0].samples], num_microbatches)
    assert not first[0].skipped
    assert not second[0].skipped

    expected, count = reference_loss(rows)
    assert sum(microbatch.num_targets for microbatch in microbatches) == count
    pipeline = Pipeline(MODEL, [2, 2], 2, pixel_table=ImagePreprocessor(MODEL).normalisation_table())
    reports = pipeline.compute(make_schedule("1f1b", 2, num_microbatches), microbatches, first[1], second[1])
    ours = sum(loss for report in reports for loss in report.losses) / count
    assert ours == pytest.approx(expected, rel=1e-5)
