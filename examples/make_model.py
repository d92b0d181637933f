"""Trains the quick start's small Ministral 3 from nothing and measures how often its captions are right.

    python examples/make_model.py --output examples/model --seed 0      makes model, tokenizer and processor files
    python examples/make_model.py --evaluate examples/model             exit status 1 if fewer than 95 in 100 are right

A plain loop on Hugging Face's `Mistral3ForConditionalGeneration`: AdamW, the loss on the answer's tokens through </s>.
Every step sees new pictures, drawn from (seed, step); the pictures that measure accuracy come from other seeds, and
their handwritten digits from samples that the training never sees.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from make_tokenizer import IMG, IMG_BREAK, IMG_END, PAD, PROMPTS, SYSTEM_PROMPTS, VOCABULARY, write_tokenizer
from pictures import (
    KINDS,
    LONGEST_EDGE,
    MODEL_SIZES,
    DigitSample,
    Picture,
    Size,
    draw_picture,
    load_digit_samples,
    model_size_of,
)
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

log = logging.getLogger("make_model")

PATCH, MERGE = 14, 2
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as every Pixtral has them
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
IGNORED = -100  # a label that takes no part in Hugging Face's loss


@dataclass(frozen=True)
class Cycle:
    """One run of the learning rate: a linear warm-up to `learning_rate`, then a cosine down to zero."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 150
    kinds: Mapping[str, int] = field(default_factory=lambda: KINDS)  # of scenes, with how often each is drawn

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0 within the cycle."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; the defaults made the model in the repository.

    Each cycle but the first starts from the files that the one before it left.
    """

    cycles: tuple[Cycle, ...] = (Cycle(steps=5000, batch=32, learning_rate=3e-3),)
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    validate_every: int = 500
    threads: int = 2


def model_config() -> Mistral3Config:
    """About 2.5 million parameters: the architecture of the 3B (tied embeddings, grouped queries, YaRN), made small.

    `original_max_position_embeddings` is so low that a caption's own tokens lie beyond it: the quick start goes wrong
    if YaRN or the query scale by position do.
    """
    return Mistral3Config(
        text_config={
            "model_type": "ministral3",
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": PAD,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 32,
                "max_position_embeddings": 1024,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "head_dim": 32,
            "image_size": LONGEST_EDGE,
            "patch_size": PATCH,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        },
        image_token_index=IMG,
        spatial_merge_size=MERGE,
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD,
    )


# --- pictures to tensors ---------------------------------------------------------------------------------------------


def through_a_file(rng: random.Random, image: Image.Image) -> Image.Image:
    """What is left of an image once it was saved: two in five go through JPEG or WEBP, as the users' pictures do."""
    kind = rng.choice(("png", "png", "png", "jpeg", "webp"))
    if kind == "png":
        return image
    file = BytesIO()
    image.save(file, kind, quality=rng.randint(85, 97), **({"method": 0} if kind == "webp" else {}))
    return Image.open(file).convert("RGB")


def pixels_of(image: Image.Image) -> np.ndarray:
    """uint8 [3, height, width] in the model's size: resized as `PixtralImageProcessorPil` does it."""
    height, width = model_size_of(image.height, image.width)
    resized = image if (image.height, image.width) == (height, width) else image.resize((width, height), Image.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


def normalise(pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to the float32 that the vision tower wants."""
    mean = torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD).view(1, 3, 1, 1)
    return (pixels_NCHW.float() / 255 - mean) / std


def image_tokens(size: Size) -> list[int]:
    """The token ids of an image of (height, width) pixels: a row's [IMG]s end in [IMG_BREAK], the last in [IMG_END]."""
    rows, columns = size[0] // (PATCH * MERGE), size[1] // (PATCH * MERGE)
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


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Pictures of one size under one prompt. `pixels` uint8 [N, 3, H, W]; `ids`, `labels` int64 [N, T]."""

    pixels: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor


class TrainingBatches(Dataset[Batch]):
    """The batches of a cycle, each drawn from the seed and its step alone: the same whatever was drawn before it.

    `steps_before` is how many steps earlier cycles had.
    """

    def __init__(
        self,
        cycle: Cycle,
        seed: int,
        steps_before: int,
        tokenizer: PreTrainedTokenizerFast,
        digits: Sequence[DigitSample],
    ):
        self.cycle, self.seed, self.steps_before = cycle, seed, steps_before
        self.tokenizer, self.digits = tokenizer, digits

    def __len__(self) -> int:
        return self.cycle.steps

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"train {self.seed} {self.steps_before + step}")
        size = rng.choices(list(MODEL_SIZES), list(MODEL_SIZES.values()))[0]
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.25 else None
        # The project's default prompt is what most users will send.
        text = PROMPTS[0] if rng.random() < 0.3 else rng.choice(PROMPTS)
        prompt = prompt_ids(self.tokenizer, size, text, system)
        pictures = [draw_picture(rng, size, self.digits, self.cycle.kinds) for _ in range(self.cycle.batch)]
        answers = [[*self.tokenizer.encode(p.caption, add_special_tokens=False), 2] for p in pictures]
        longest = max(map(len, answers))
        return Batch(
            pixels=torch.from_numpy(np.stack([pixels_of(through_a_file(rng, p.image)) for p in pictures])),
            # Padded on the right: under the causal mask nothing looks at it, so no attention mask is needed.
            ids=torch.tensor([prompt + a + [PAD] * (longest - len(a)) for a in answers]),
            labels=torch.tensor([[IGNORED] * len(prompt) + a + [IGNORED] * (longest - len(a)) for a in answers]),
        )


def encode_images(model: Mistral3ForConditionalGeneration, pixels_NCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The projected features of N images of one size, a tensor [image tokens, hidden] each.

    The vision tower's own forward joins all images into one sequence under a dense mask, which costs the square of the
    batch; images of one size can go through its layers as a batch instead. A test compares the two.
    """
    tower = model.model.vision_tower
    count, _, height, width = pixels_NCHW.shape
    patches = tower.patch_conv(pixels_NCHW)
    rows, columns = patches.shape[-2:]
    hidden = tower.ln_pre(patches.flatten(2).transpose(1, 2))
    positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    embeddings = tower.patch_positional_embedding(hidden, positions)
    hidden = tower.transformer(hidden, None, embeddings).last_hidden_state
    sizes = [(height, width)] * count
    features = model.model.multi_modal_projector(hidden.flatten(0, 1), sizes)
    return features.split((rows // MERGE) * (columns // MERGE))


def orthogonalise(matrices_NRC: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """About the nearest matrices with equal singular values, by a quintic Newton-Schulz iteration; [N, R, C], R <= C.

    The coefficients are those of K. Jordan's Muon (2024): singular values end between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices_NRC / (matrices_NRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised: on this model it needs about half of AdamW's steps.

    K. Jordan's Muon (2024), its step scaled by 0.2 * sqrt(longer side) so that AdamW's learning rates fit (J. Liu et
    al., "Muon is scalable for LLM training", 2025). torch's own works in bfloat16, which is slow on most CPUs.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            momentum = group["momentum"]
            # Matrices of one shape go through the iteration as one batch.
            updates: dict[tuple[int, ...], list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(average, momentum)
                update = update.mT if update.shape[0] > update.shape[1] else update
                updates.setdefault(tuple(update.shape), []).append((parameter, update))
            for shape, entries in updates.items():
                steps = orthogonalise(torch.stack([update for _, update in entries]))
                for (parameter, _), step in zip(entries, steps, strict=True):
                    step = step if parameter.shape == step.shape else step.mT
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(step, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def answer_loss(model: Mistral3ForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the answers' tokens."""
    features = encode_images(model, normalise(batch.pixels))
    images = BaseModelOutputWithPooling(pooler_output=features)
    return model(input_ids=batch.ids, labels=batch.labels, mm_encoder_outputs={"image": images}, use_cache=False).loss


def train(output: Path, seed: int, recipe: Recipe, first_cycle: int = 0) -> None:
    """Trains the recipe's cycles from `first_cycle` on and leaves the model, bf16 and with all its files, in `output`.

    Cycle 0 starts from random weights. A later one starts from the weights in `output`, so a training that was
    interrupted between cycles can go on there.
    """
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(output)
    write_processor(output)
    digits = load_digit_samples("train")
    for number in range(first_cycle, len(recipe.cycles)):
        if number == 0:
            model = Mistral3ForConditionalGeneration(model_config())
        else:
            model = Mistral3ForConditionalGeneration.from_pretrained(output, dtype=torch.float32)
        log.info("cycle %d, %.2f million parameters", number, sum(p.numel() for p in model.parameters()) / 1e6)
        steps_before = sum(cycle.steps for cycle in recipe.cycles[:number])  # no picture is drawn in two cycles
        batches = TrainingBatches(recipe.cycles[number], seed, steps_before, tokenizer, digits)
        train_cycle(model.train(), recipe, number, batches, output)


def train_cycle(
    model: Mistral3ForConditionalGeneration, recipe: Recipe, number: int, batches: TrainingBatches, output: Path
) -> None:
    """One cycle of the recipe; saves the weights that did best on validation pictures."""
    cycle = recipe.cycles[number]
    # Muon for what multiplies hidden states; the embedding, the patches' convolution and the norms are not such.
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.dim() != 2 or p is embedding]
    optimizers = (
        Muon(matrices, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    )
    # Validation pictures are new, but their digits are the training's: the held-out ones stay untouched until the end.
    validation = list(draw_pictures(f"validation {batches.seed}", 200, batches.digits))
    # Nothing that is worse than what the cycle started from replaces it.
    best = accuracy(rounded_copy(model), batches.tokenizer, image_processor(output), validation) if number else -1.0
    started, losses = time.monotonic(), []
    for step, batch in enumerate(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=8)):
        loss = answer_loss(model, batch)
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cycle.learning_rate_at(step)
            optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            mean, seconds = sum(losses[-50:]) / 50, time.monotonic() - started
            log.info("step %d loss %.4f norm %.2f, %.0f s", step + 1, mean, norm.item(), seconds)
        if (step + 1) % recipe.validate_every == 0 or step + 1 == cycle.steps:
            right = accuracy(rounded_copy(model), batches.tokenizer, image_processor(output), validation)
            log.info("step %d: %.1f%% of %d validation pictures right", step + 1, right * 100, len(validation))
            if right >= best:
                best = right
                save_weights(model, output)
    log.info("cycle %d done in %.0f s, best %.1f%%", number, time.monotonic() - started, best * 100)


def rounded_copy(model: Mistral3ForConditionalGeneration) -> Mistral3ForConditionalGeneration:
    """The model with its weights rounded to bf16, in float32: what a user of the saved files runs."""
    copy = Mistral3ForConditionalGeneration(model.config)
    copy.load_state_dict({name: t.bfloat16().float() for name, t in model.state_dict().items()})
    return copy.eval()


def save_weights(model: Mistral3ForConditionalGeneration, output: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bf16)."""
    saved = Mistral3ForConditionalGeneration(model.config)
    saved.load_state_dict(model.state_dict())
    saved.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    saved.to(torch.bfloat16).save_pretrained(output)


def write_processor(output: Path) -> None:
    """Writes processor_config.json as `PixtralProcessor.save_pretrained` does for Ministral 3.

    Written by hand, since that class cannot be made without torchvision. `patch_size` is the tower's, and
    `spatial_merge_size` stands beside it: `PixtralProcessor` resizes images to multiples of their product, and whoever
    calls the image processor on its own has to pass it that product.
    """
    config = {
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "image_processor": {
            "data_format": "channels_first",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(IMAGE_MEAN),
            "image_processor_type": "PixtralImageProcessor",
            "image_std": list(IMAGE_STD),
            "patch_size": PATCH,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": LONGEST_EDGE},
        },
        "image_token": "[IMG]",
        "patch_size": PATCH,
        "processor_class": "PixtralProcessor",
        "spatial_merge_size": MERGE,
    }
    (output / "processor_config.json").write_text(json.dumps(config, indent=2) + "\n")


# --- measuring -------------------------------------------------------------------------------------------------------


def image_processor(directory: Path) -> PixtralImageProcessorPil:
    """The directory's image processor, set to make multiples of a whole image token's side."""
    return PixtralImageProcessorPil.from_pretrained(directory, patch_size=PATCH * MERGE)


def draw_pictures(seed: str, count: int, digits: Sequence[DigitSample]) -> Iterator[Picture]:
    """`count` pictures as they come out of a file, each from its own (seed, number)."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        picture = draw_picture(rng, None, digits)
        yield Picture(through_a_file(rng, picture.image), picture.caption)


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
        for start in range(0, len(indices), 25):
            chosen = indices[start : start + 25]
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


def accuracy(
    model: Mistral3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    processor: PixtralImageProcessorPil,
    pictures: Sequence[Picture],
    prompt: str = PROMPTS[0],
    system: str | None = None,
) -> float:
    """The share of pictures whose greedy caption is right to the letter. Logs the first wrong ones."""
    captions = generate_captions(model, tokenizer, processor, [p.image for p in pictures], prompt, system)
    wrong = [(p.caption, c) for p, c in zip(pictures, captions, strict=True) if p.caption != c]
    for expected, caption in wrong[:5]:
        log.info("  wanted %r, got %r", expected, caption)
    return 1 - len(wrong) / len(pictures)


def evaluate(directory: Path, count: int, wanted: float = 0.95) -> bool:
    """Whether the model of `directory` gets at least `wanted` of `count` held-out pictures right, with each prompt."""
    torch.set_num_threads(Recipe.threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = Mistral3ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    processor = image_processor(directory)
    pictures = list(draw_pictures("held-out", count, load_digit_samples("held-out")))
    good = True
    for prompt, system in ((PROMPTS[0], None), (PROMPTS[3], None), (PROMPTS[6], SYSTEM_PROMPTS[1])):
        right = accuracy(model, tokenizer, processor, pictures, prompt, system)
        print(f"{right:.1%} of {count} held-out pictures right (prompt {prompt!r}, system prompt {system!r})")
        good = good and right >= wanted
    return good


def main() -> int:
    """Reads the options; 0, or 1 if too few captions are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="train, and write the model directory here")
    parser.add_argument("--evaluate", type=Path, help="measure the model of this directory")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the training's pictures")
    parser.add_argument("--from-cycle", type=int, default=0, help="go on with this cycle, from the weights in --output")
    parser.add_argument("--pictures", type=int, default=500, help="how many held-out pictures to measure on")
    options = parser.parse_args()
    if options.output is None and options.evaluate is None:
        parser.error("nothing to do: give --output DIR, --evaluate DIR or both")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    if options.output is not None:
        train(options.output, options.seed, Recipe(), options.from_cycle)
    if options.evaluate is not None:
        return 0 if evaluate(options.evaluate, options.pictures) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
