"""The Hugging Face peers of the captioning benchmark: `generate`, and Ray Data with an actor pool of models.

    python -m benchmarks.caption_peers hugging-face|ray-data|gaps --model DIR --rows FILE --result FILE …

Both take rows of the parquet file in order, in batches of 16, padded on the left. A batch goes on until its longest
caption is done, as it does where captions end by themselves; what the others have too much is cut off. Weights are
loaded and one other batch is captioned before the clock starts. Decoding and preparing images is part of what the clock
sees.

`gaps` says how far apart two tokens are that two contestants have taken after the same ones.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 16
WARM_TOKENS = 4
PATCH, MERGE, PAD_ID = 14, 2, 8


@dataclass(frozen=True)
class Row:
    """A row of the parquet file."""

    image: bytes
    prompt: str
    max_new_tokens: int


class HuggingFaceCaptioner:
    """Hugging Face's model, tokenizer, chat template and image processor."""

    def __init__(self, model_dir: str, threads: int) -> None:
        import torch
        from transformers import Mistral3ForConditionalGeneration
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
        from transformers.utils import logging

        from ray_ministral.captioning.prompts import PromptTokenizer

        torch.set_num_threads(threads)
        logging.set_verbosity_error()  # it says for every batch that it leaves out what sampling would need
        logging.disable_progress_bar()
        # `PixtralProcessor` would put both together, but needs torchvision; it resizes to multiples of this.
        self._processor = PixtralImageProcessorPil.from_pretrained(model_dir, patch_size=PATCH * MERGE)
        self._tokenizer = PromptTokenizer(model_dir)
        self.model: Any = Mistral3ForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def inputs(self, rows: Sequence[Row], generated: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
        """What the model takes for a batch, with token ids that follow the prompts where they are given."""
        import torch
        from PIL import Image

        images = [Image.open(io.BytesIO(row.image)).convert("RGB") for row in rows]
        found = self._processor(images, return_tensors="pt")
        sizes = torch.as_tensor(found["image_sizes"])
        ids = [
            [*self._tokenizer.render(row.prompt, [(int(size[0]), int(size[1]))]).tolist(), *more]
            for row, size, more in zip(rows, sizes, generated or [()] * len(rows), strict=True)
        ]
        longest = max(map(len, ids))
        return {
            "input_ids": torch.tensor([[PAD_ID] * (longest - len(one)) + one for one in ids]),
            "attention_mask": torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids]),
            "pixel_values": torch.as_tensor(found["pixel_values"]).float(),
            "image_sizes": sizes,
        }

    def caption(self, rows: Sequence[Row]) -> list[list[int]]:
        """Greedy captions of one batch, each of the row's own length."""
        import torch

        inputs = self.inputs(rows)
        most = max(row.max_new_tokens for row in rows)
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=most, do_sample=False, pad_token_id=PAD_ID)
        generated = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [ids[: row.max_new_tokens] for ids, row in zip(generated, rows, strict=True)]

    def warm_up(self, rows: Sequence[Row]) -> None:
        """A few tokens of another batch."""
        self.caption([Row(row.image, row.prompt, WARM_TOKENS) for row in rows])


def main() -> None:
    """Run one peer and write its result: seconds of the counted part, and token ids of each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["hugging-face", "ray-data", "gaps"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--warm-rows", type=Path, help="other rows, captioned before the clock starts")
    parser.add_argument("--pairs", type=Path, help="gaps: [row, token ids that agree, one token, another] of each")
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    if options.peer == "gaps":
        result: Any = gaps(options.model, read_rows(options.rows), json.loads(options.pairs.read_text()))
    else:
        run = hugging_face if options.peer == "hugging-face" else ray_data
        seconds, token_ids = run(options.model, options.rows, options.warm_rows)
        result = {"seconds": seconds, "token_ids": token_ids}
    options.result.write_text(json.dumps(result))


def hugging_face(model_dir: str, rows: Path, warm_rows: Path) -> tuple[float, list[list[int]]]:
    """One process with all cores."""
    captioner = HuggingFaceCaptioner(model_dir, threads=len(os.sched_getaffinity(0)))
    captioner.warm_up(read_rows(warm_rows))
    started = time.perf_counter()
    todo, captions = read_rows(rows), []
    for start in range(0, len(todo), BATCH):
        captions += captioner.caption(todo[start : start + BATCH])
    return time.perf_counter() - started, captions


def ray_data(model_dir: str, rows: Path, warm_rows: Path) -> tuple[float, list[list[int]]]:
    """`map_batches` over one actor of one thread a core; from the first batch's start to the last one's end."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    cores = len(os.sched_getaffinity(0))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # One CPU more than there are cores, so that reading finds room beside the actors.
    ray.init(address="local", num_cpus=cores + 1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    DataContext.get_current().enable_progress_bars = False

    class Captioner:
        def __init__(self) -> None:
            self._captioner = HuggingFaceCaptioner(model_dir, threads=1)
            self._captioner.warm_up(read_rows(warm_rows))

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            started = time.time()
            columns = zip(batch["image"], batch["prompt"], batch["max_new_tokens"], strict=True)
            captions = self._captioner.caption([Row(image, str(prompt), int(most)) for image, prompt, most in columns])
            return {
                "index": batch["index"],
                "token_ids": [json.dumps(ids) for ids in captions],
                "started": [started] * len(captions),
                "ended": [time.time()] * len(captions),
            }

    data = ray.data.read_parquet(str(rows))
    blocks = -(-data.count() // BATCH)
    found = (
        data.repartition(blocks)
        .map_batches(Captioner, batch_size=BATCH, compute=ActorPoolStrategy(size=cores), num_cpus=1)
        .take_all()
    )
    ray.shutdown()
    found.sort(key=lambda row: row["index"])
    seconds = max(row["ended"] for row in found) - min(row["started"] for row in found)
    return seconds, [json.loads(row["token_ids"]) for row in found]


def gaps(model_dir: str, rows: Sequence[Row], pairs: Sequence[Sequence[Any]]) -> list[float]:
    """For each of (row, token ids that agree, one token, another): how much further up the best logit is, at most."""
    import torch

    captioner = HuggingFaceCaptioner(model_dir, threads=len(os.sched_getaffinity(0)))
    found = []
    for index, agreed, one, other in pairs:
        with torch.inference_mode():
            logits = captioner.model(**captioner.inputs([rows[index]], [agreed])).logits[0, -1]
        found.append(float(logits.max() - torch.minimum(logits[one], logits[other])))
    return found


def read_rows(path: Path) -> list[Row]:
    """All rows of a parquet file."""
    import pyarrow.parquet as pq

    found = pq.read_table(path, columns=["image", "prompt", "max_new_tokens"]).to_pylist()
    return [Row(**row) for row in found]


if __name__ == "__main__":
    main()
