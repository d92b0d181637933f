"""Measures how often the small model's captions are right, letter for letter, with Hugging Face's own `generate`.

Two sets of pictures: the bundled ones of `pictures.parquet`, and new ones. None of them was seen in training, nor any
sample of the handwritten digits on them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import torch
from make_pairs import as_a_file
from make_tokenizer import IMG, IMG_BREAK, IMG_END, PAD, PROMPTS, SYSTEM_PROMPTS
from pictures import CELL, Picture, Size, draw_picture, load_digit_samples, model_size_of
from PIL import Image
from transformers import Mistral3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

THREADS = 2
BATCH = 25
# The project's default prompt, another, and another with a system prompt.
ASKED: tuple[tuple[str, str | None], ...] = ((PROMPTS[0], None), (PROMPTS[3], None), (PROMPTS[6], SYSTEM_PROMPTS[1]))


def bundled_pictures() -> list[Picture]:
    """The whole pictures of `pictures.parquet`."""
    rows = pq.read_table(Path(__file__).parent / "pictures.parquet").to_pylist()
    return [
        Picture(Image.open(BytesIO(row["image"]["bytes"])).convert("RGB"), row["expected"])
        for row in rows
        if row["expected"] is not None
    ]


def new_pictures(count: int) -> list[Picture]:
    """`count` pictures as they come out of a file, each drawn from its own number; always the same ones."""
    digits = load_digit_samples("held-out")
    pictures = []
    for number in range(count):
        rng = random.Random(f"held-out {number}")
        picture = draw_picture(rng, None, digits)
        image = Image.open(BytesIO(as_a_file(rng, picture.image))).convert("RGB")
        pictures.append(Picture(image, picture.caption))
    return pictures


def image_tokens(size: Size) -> list[int]:
    """The token ids of an image of (height, width) pixels: a row's [IMG]s end in [IMG_BREAK], the last in [IMG_END]."""
    rows, columns = size[0] // CELL, size[1] // CELL
    tokens = ([IMG] * columns + [IMG_BREAK]) * rows
    return [*tokens[:-1], IMG_END]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, size: Size, text: str, system: str | None) -> list[int]:
    """A prompt about one image, through the chat template, with the image's placeholder expanded."""
    messages: list[dict[str, object]] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    place = ids.index(IMG)
    return [*ids[:place], *image_tokens(size), *ids[place + 1 :]]


def image_processor(directory: Path) -> PixtralImageProcessorPil:
    """The directory's image processor, set to make multiples of a whole image token's side."""
    return PixtralImageProcessorPil.from_pretrained(directory, patch_size=CELL)


def generate_captions(
    model: Mistral3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    processor: PixtralImageProcessorPil,
    images: Sequence[Image.Image],
    prompt: str = PROMPTS[0],
    system: str | None = None,
) -> list[str]:
    """Greedy captions of RGB images by Hugging Face `generate`, in batches of one image size."""
    by_size: dict[Size, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(model_size_of(image.height, image.width), []).append(index)
    captions = [""] * len(images)
    for size, indices in by_size.items():
        for start in range(0, len(indices), BATCH):
            chosen = indices[start : start + BATCH]
            inputs = processor([images[i] for i in chosen], return_tensors="pt")
            ids = torch.tensor([prompt_ids(tokenizer, size, prompt, system)] * len(chosen))
            with torch.inference_mode():
                generated = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=inputs["pixel_values"].float(),
                    image_sizes=inputs["image_sizes"],
                    max_new_tokens=32,
                    do_sample=False,
                    eos_token_id=2,
                    pad_token_id=PAD,
                )
            for index, tokens in zip(chosen, generated[:, ids.shape[1] :].tolist(), strict=True):
                captions[index] = tokenizer.decode(tokens, skip_special_tokens=True)
    return captions


def wrong_captions(
    directory: Path, pictures: Sequence[Picture], prompt: str = PROMPTS[0], system: str | None = None
) -> list[tuple[str, str]]:
    """The right caption and the model's, for each picture where they differ; fp32, greedy."""
    torch.set_num_threads(THREADS)
    captions = generate_captions(
        Mistral3ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval(),
        PreTrainedTokenizerFast.from_pretrained(directory),
        image_processor(directory),
        [picture.image for picture in pictures],
        prompt,
        system,
    )
    return [(p.caption, caption) for p, caption in zip(pictures, captions, strict=True) if p.caption != caption]


def evaluate(directory: Path, count: int, wanted: float = 0.95) -> bool:
    """Whether the model gets at least `wanted` of the bundled pictures and of `count` new ones right, however asked.

    Prints the shares, and the wrong captions of the default prompt.
    """
    good = True
    for name, pictures in (("bundled", bundled_pictures()), ("new", new_pictures(count))):
        for prompt, system in ASKED:
            wrong = wrong_captions(directory, pictures, prompt, system)
            right = 1 - len(wrong) / len(pictures)
            asked = f"prompt {prompt!r}" + ("" if system is None else f", system prompt {system!r}")
            print(f"{right:.1%} of {len(pictures)} {name} pictures right ({asked})", flush=True)
            good = good and right >= wanted
            if (prompt, system) == ASKED[0]:
                for expected, caption in wrong:
                    print(f"  wanted {expected!r}, got {caption!r}")
    return good
