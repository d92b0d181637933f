"""What the benchmarks run on: random models of a stated shape with a tokenizer of words, and rows in parquet.

Every word is one token, so that a row has exactly as many tokens as its workload says.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>")
VOCABULARY = 8192
FIRST_WORD = len(SPECIAL) + 1  # before it an "a", which stands for any text where a chat template is tried out
PATCH, MERGE = 14, 2
TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- '[INST]' }}
        {%- if message['content'] is string %}{{- ' ' + message['content'] }}{%- else %}
            {%- for block in message['content'] %}
                {%- if block['type'] == 'text' %}{{- ' ' + block['text'] }}{%- else %}{{- '[IMG]' }}{%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '[/INST]' }}
    {%- endif %}
{%- endfor %}"""


@dataclass(frozen=True)
class TrainWorkload:
    """Samples of a training benchmark, `batch` a step in microbatches of `microbatch`.

    answer_words: least and most of an answer. image_sides: least and most pixels a side; None: text alone.
    """

    name: str
    batch: int
    microbatch: int
    prompt_words: int
    answer_words: tuple[int, int]
    image_sides: tuple[int, int] | None = None


@dataclass(frozen=True)
class CaptionWorkload:
    """Rows of a captioning benchmark: `prompt_words` beside each image, `image_sides` and `new_tokens` least and most.

    A row's sides are drawn apart from each other, in steps that the model takes as they are; its new tokens are the end
    of its caption, whatever the model says.
    """

    name: str
    rows: int
    prompt_words: int
    image_sides: tuple[int, int]
    new_tokens: tuple[int, int]


CAPTION_WORKLOADS = {
    # <s> [INST], 64 image tokens with 8 breaks, 12 words, [/INST]: 87 tokens each
    "1": CaptionWorkload("224 x 224, 32 new tokens", 64, 12, (224, 224), (32, 32)),
    "2": CaptionWorkload("112 to 448 a side, 4 to 96 new tokens", 64, 12, (112, 448), (4, 96)),
    "3": CaptionWorkload("2000 images of workload 2", 2000, 12, (112, 448), (4, 96)),
}

TRAIN_WORKLOADS = {
    # <s> [INST] w [/INST] 123 words </s>: 128 tokens each
    "1": TrainWorkload("text", 16, 2, 1, (123, 123)),
    "2": TrainWorkload("images", 16, 2, 8, (4, 96), (112, 448)),
}


def make_model(folder: Path, gain: float = 1.0) -> None:
    """The benchmarks' Ministral 3, random: hidden 512, 8 layers, 8 heads on 2 KV heads of 64, ffn 1536, tied; fp32.

    Matrices of the layers are `gain` times as large as Hugging Face makes them. As it makes them, the embedding
    outweighs all layers, and every caption is the last word of its prompt over and over, whatever the image.
    """
    import torch
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={
            "model_type": "ministral3",
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1_000_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "head_dim": 64,
            "image_size": 448,
            "patch_size": PATCH,
            "hidden_act": "silu",
        },
        image_token_index=SPECIAL.index("[IMG]"),
        spatial_merge_size=MERGE,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = Mistral3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(gain)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    _write_processor(folder)


def make_rows(path: Path, workload: TrainWorkload, rows: int, seed: int = 0) -> None:
    """A parquet file of pairs: `prompt`, `response` and, where the workload has images, `image`; else `messages`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)

    low, high = workload.answer_words
    prompts = [_words(rng, workload.prompt_words) for _ in range(rows)]
    answers = [_words(rng, int(rng.integers(low, high + 1))) for _ in range(rows)]
    columns: dict[str, Any]
    if workload.image_sides is None:
        columns = {
            "image": pa.nulls(rows, pa.binary()),
            "messages": [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for prompt, answer in zip(prompts, answers, strict=True)
            ],
        }
    else:
        images = [_random_png(rng, workload.image_sides) for _ in range(rows)]
        columns = {"image": images, "prompt": prompts, "response": answers}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def make_caption_rows(path: Path, workload: CaptionWorkload, rows: int, seed: int = 0) -> None:
    """A parquet file of `index`, `image`, `prompt` and `max_new_tokens`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    low, high = workload.new_tokens
    columns: dict[str, list[Any]] = {"index": list(range(rows)), "image": [], "prompt": [], "max_new_tokens": []}
    for _ in range(rows):
        columns["image"].append(_random_png(rng, workload.image_sides))
        columns["prompt"].append(_words(rng, workload.prompt_words))
        columns["max_new_tokens"].append(int(rng.integers(low, high + 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def kept(folder: Path, made_with: Any, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make` unless an earlier run has made it with the same arguments."""
    stamp, wanted = folder / "made_with.json", json.dumps(made_with, sort_keys=True)
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        stamp.write_text(wanted)
    return folder


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in rng.integers(FIRST_WORD, VOCABULARY, count))


def _random_png(rng: np.random.Generator, sides: tuple[int, int]) -> bytes:
    from PIL import Image

    steps = np.arange(sides[0], sides[1] + 1, PATCH * MERGE)
    height, width = (int(side) for side in rng.choice(steps, 2))
    file = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: Sequence[str] = [*SPECIAL, "a", *(f"w{number}" for number in range(FIRST_WORD, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({token: id_ for id_, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    _write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 8})


def _write_processor(folder: Path) -> None:
    image_processor = {
        "image_processor_type": "PixtralImageProcessorFast",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": PATCH,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 448},
    }
    processor = {"image_processor": image_processor, "patch_size": PATCH, "spatial_merge_size": MERGE}
    _write_json(folder / "processor_config.json", processor | {"processor_class": "PixtralProcessor"})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
