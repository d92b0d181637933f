"""Draws the pictures of the quick start and says what is on them.

Who is here: a `Scene` (what is on a picture, as data), `caption_of` (the scene in words), `draw_scene` (the scene in
pixels) and `draw_picture`, which rolls a scene and does both. All randomness comes from the `random.Random` that the
caller gives, so the same seed draws the same pictures. This file knows nothing of models, tokenizers or torch;
scikit-learn, a development dependency that brings the handwritten digits, is imported only by `load_digit_samples`.

The grammar (each picture has exactly one right caption):

    caption  = lone | counted | above | beside | digit
    lone     = "a" colour shape place              a red circle in the top left corner
    counted  = number colour shape+"s"             four green crosses                  (two to five)
    above    = group "above" group                 two red circles above a blue square (one to three each)
    beside   = group "to the left of" group        the upper, or left, group is always named first
    digit    = "a handwritten" name                a handwritten seven
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Size = tuple[int, int]  # (height, width) in pixels, as the model's own `image_sizes`
RGB = tuple[int, int, int]
Relation = Literal["above", "to the left of"]

LONGEST_EDGE = 112  # of the small model's image processor
CELL = 28  # pixels a side of what becomes one image token: patch_size 14 x spatial_merge_size 2

COLOURS: dict[str, RGB] = {
    "red": (214, 36, 40),
    "green": (38, 150, 60),
    "blue": (40, 82, 214),
    "yellow": (240, 208, 30),
    "purple": (140, 50, 170),
    "orange": (244, 130, 20),
}
SHAPES: dict[str, str] = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COUNTS = ("a", "two", "three", "four", "five")
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Place name -> (x, y) of the object's centre as a fraction of the canvas.
PLACES: dict[str, tuple[float, float]] = {
    "in the top left corner": (0.24, 0.24),
    "in the top right corner": (0.76, 0.24),
    "in the bottom left corner": (0.24, 0.76),
    "in the bottom right corner": (0.76, 0.76),
    "in the middle": (0.5, 0.5),
}
RELATIONS: tuple[Relation, ...] = ("above", "to the left of")
# Sizes of a picture after the image processor, with how often each is drawn.
MODEL_SIZES: dict[Size, int] = {(112, 112): 3, (84, 112): 2, (112, 84): 2, (84, 84): 2, (56, 112): 1}
# Kinds of scenes (the grammar's five), with how often each is drawn.
KINDS: dict[str, int] = {"lone": 2, "counted": 2, "above": 3, "beside": 3, "digit": 2}
LIGHT: tuple[RGB, ...] = ((255, 255, 255), (232, 232, 232), (250, 242, 222), (222, 236, 246))
DARK: tuple[RGB, ...] = ((12, 12, 14), (44, 44, 52))

# Every sixth sample of the digits never reaches the training.
HELD_OUT_EVERY = 6


@dataclass(frozen=True)
class Group:
    """`count` (1 to 5) equal objects."""

    count: int
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What is on a picture. Exactly one of: a group at a place, a group, two groups in a relation, a digit."""

    first: Group | None = None
    place: str | None = None
    relation: Relation | None = None
    second: Group | None = None
    digit: int | None = None


@dataclass(frozen=True)
class DigitSample:
    """One handwritten digit: `ink` is float32 [8, 8] from 0 (paper) to 1 (ink), `label` 0 to 9."""

    ink: np.ndarray
    label: int


@dataclass(frozen=True)
class Picture:
    """An RGB image and its one right caption."""

    image: Image.Image
    caption: str


def load_digit_samples(split: Literal["train", "held-out"]) -> list[DigitSample]:
    """The handwritten digits of one split.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
    (doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn's `load_digits` ships them. The split goes by sample index.
    """
    from sklearn.datasets import load_digits  # a development dependency: only the drawing of digits needs it

    data = load_digits()
    held_out = split == "held-out"
    return [
        DigitSample(ink=(image / 16.0).astype(np.float32), label=int(label))
        for index, (image, label) in enumerate(zip(data.images, data.target, strict=True))
        if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out
    ]


def describe_group(group: Group) -> str:
    """`two red circles`, `a blue square`, `an orange cross`."""
    if group.count == 1:
        article = "an" if group.colour[0] in "aeiou" else "a"
        return f"{article} {group.colour} {group.shape}"
    return f"{COUNTS[group.count - 1]} {group.colour} {SHAPES[group.shape]}"


def caption_of(scene: Scene) -> str:
    """The scene in words; the grammar is in the module's docstring."""
    if scene.digit is not None:
        return f"a handwritten {DIGIT_NAMES[scene.digit]}"
    assert scene.first is not None, "a scene has a digit or a first group"
    words = describe_group(scene.first)
    if scene.second is not None:
        return f"{words} {scene.relation} {describe_group(scene.second)}"
    return words if scene.place is None else f"{words} {scene.place}"


def all_scenes() -> list[Scene]:
    """Every scene of the grammar, in a fixed order."""
    groups = [Group(n, colour, shape) for n in (1, 2, 3) for colour in COLOURS for shape in SHAPES]
    lone = [Scene(first=g, place=p) for g in groups if g.count == 1 for p in PLACES]
    counted = [Scene(first=Group(n, colour, s)) for n in (2, 3, 4, 5) for colour in COLOURS for s in SHAPES]
    pairs = [
        Scene(first=a, relation=relation, second=b)
        for relation in RELATIONS
        for a in groups
        for b in groups
        if _differ(a, b)
    ]
    digits = [Scene(digit=d) for d in range(10)]
    return [*lone, *counted, *pairs, *digits]


def all_captions() -> list[str]:
    """Every caption of the grammar, in a fixed order."""
    return [caption_of(scene) for scene in all_scenes()]


@functools.cache
def _scene_by_caption() -> dict[str, Scene]:
    return {caption_of(scene): scene for scene in all_scenes()}


def parse_caption(caption: str) -> Scene:
    """The scene that a caption speaks of. `ValueError` if the caption is not of the grammar."""
    try:
        return _scene_by_caption()[caption]
    except KeyError:
        raise ValueError(f"{caption!r} is not a caption of the grammar in the docstring of {__name__}") from None


def _differ(a: Group, b: Group) -> bool:
    # Two groups of the same things would read as one larger group.
    return (a.colour, a.shape) != (b.colour, b.shape)


def roll_scene(rng: random.Random, model_size: Size, kinds: Mapping[str, int] = KINDS) -> Scene:
    """A random scene that fits a picture of `model_size`, of a kind that is drawn as often as `kinds` says."""

    def group(most: int) -> Group:
        return Group(rng.randint(1, most), rng.choice(list(COLOURS)), rng.choice(list(SHAPES)))

    # A banner is too low to stack groups.
    allowed = {kind: 0 if model_size == (56, 112) and kind == "above" else weight for kind, weight in kinds.items()}
    kind = rng.choices(list(allowed), list(allowed.values()))[0]
    if kind == "digit":
        return Scene(digit=rng.randrange(10))
    if kind == "lone":
        return Scene(first=group(1), place=rng.choice(list(PLACES)))
    if kind == "counted":
        return Scene(first=Group(rng.randint(2, 5), rng.choice(list(COLOURS)), rng.choice(list(SHAPES))))
    first, second = group(3), group(3)
    while not _differ(first, second):
        second = group(3)
    return Scene(first=first, relation="above" if kind == "above" else "to the left of", second=second)


def model_size_of(height: int, width: int) -> Size:
    """What the image processor makes of a picture: at most `LONGEST_EDGE` a side, rounded up to whole cells.

    The rule of Hugging Face's `PixtralImageProcessorPil` with `patch_size` 28; a test holds the two together.
    """
    ratio = max(height, width) / LONGEST_EDGE
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    return math.ceil(height / CELL) * CELL, math.ceil(width / CELL) * CELL


def roll_canvas(rng: random.Random, model_size: Size) -> Size:
    """The size of a canvas, up to 280 pixels a side, that the image processor brings to `model_size`."""
    height, width = model_size
    scale = rng.choice((1.0, 1.5, 2.0, 2.5)) if max(model_size) == LONGEST_EDGE else 1.0
    shrink = rng.randint(0, 8)  # pixels of the model's picture: the processor stretches them back
    if height < width:
        height -= shrink
    elif width < height:
        width -= shrink
    elif max(model_size) < LONGEST_EDGE:
        height, width = height - shrink, width - rng.randint(0, 8)
    return round(height * scale), round(width * scale)


def _jitter(rng: random.Random, colour: RGB, amount: int) -> RGB:
    r, g, b = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)
    return r, g, b


def _draw_object(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: RGB) -> None:
    """One object in a box of 2 x `radius` pixels around (`x`, `y`)."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        side = radius * 0.9
        draw.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius * 0.85), (x - radius, y + radius * 0.85)], fill=colour)
    else:
        arm = radius * 0.34
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def _scatter(rng: random.Random, count: int, box: tuple[float, float, float, float]) -> tuple[list[Size], float]:
    """Centres (x, y) of `count` objects in `box` (left, top, right, bottom) that keep a gap, and their radius."""
    left, top, right, bottom = box
    room = min((right - left) / 2, (bottom - top) / 2, 0.36 * math.sqrt((right - left) * (bottom - top) / count))
    radius = room * rng.uniform(0.72, 0.95)
    while True:
        for _ in range(30):
            centres: list[Size] = []
            for _ in range(count * 8):
                x, y = rng.uniform(left + radius, right - radius), rng.uniform(top + radius, bottom - radius)
                # Boxes, not circles, are kept apart: squares reach into the corners.
                if all(max(abs(x - a), abs(y - b)) > 2.25 * radius for a, b in centres):
                    centres.append((round(x), round(y)))
                    if len(centres) == count:
                        return centres, radius
        radius *= 0.94  # too tight: smaller objects


def _draw_digit(rng: random.Random, canvas: Image.Image, sample: DigitSample, ink: RGB) -> None:
    height, width = canvas.height, canvas.width
    side = round(min(height, width) * rng.uniform(0.68, 0.94))
    mask = Image.fromarray((sample.ink * 255).astype(np.uint8))
    mask = mask.resize((side, side), Image.Resampling.BICUBIC)
    mask = mask.rotate(rng.uniform(-9, 9), resample=Image.Resampling.BILINEAR)
    x, y = rng.randint(0, width - side), rng.randint(0, height - side)
    canvas.paste(Image.new("RGB", mask.size, ink), (x, y), mask)


def draw_scene(rng: random.Random, scene: Scene, canvas: Size, digits: Sequence[DigitSample] = ()) -> Image.Image:
    """The scene as an RGB image of `canvas` (height, width) pixels.

    `digits` is where a handwritten digit is taken from; a scene with a digit needs it (`ValueError`).
    """
    height, width = canvas
    dark = rng.random() < 0.25
    image = Image.new("RGB", (width, height), _jitter(rng, rng.choice(DARK if dark else LIGHT), 6))
    draw = ImageDraw.Draw(image)
    if scene.digit is not None:
        samples = [sample for sample in digits if sample.label == scene.digit]
        if not samples:
            raise ValueError(f"the scene has the digit {scene.digit} but `digits` holds no sample of it: give some")
        grey = rng.randint(215, 255) if dark else rng.randint(0, 50)
        _draw_digit(rng, image, rng.choice(samples), (grey, grey, grey))
        return image
    assert scene.first is not None, "a scene has a digit or a first group"
    margin = 0.03 * min(height, width)
    boxes = [(margin, margin, width - margin, height - margin)]
    groups = [scene.first]
    if scene.second is not None:
        groups.append(scene.second)
        split = rng.uniform(0.45, 0.55)
        if scene.relation == "above":
            line = height * split
            boxes = [(margin, margin, width - margin, line - margin), (margin, line + margin, *boxes[0][2:])]
        else:
            line = width * split
            boxes = [(margin, margin, line - margin, height - margin), (line + margin, margin, *boxes[0][2:])]
    for group, box in zip(groups, boxes, strict=True):
        if scene.place is not None:
            fx, fy = PLACES[scene.place]
            radius = min(height, width) * rng.uniform(0.13, 0.2)
            wobble = 0.03
            x = width * (fx + rng.uniform(-wobble, wobble))
            y = height * (fy + rng.uniform(-wobble, wobble))
            _draw_object(draw, group.shape, x, y, radius, _jitter(rng, COLOURS[group.colour], 12))
            continue
        centres, radius = _scatter(rng, group.count, box)
        for x, y in centres:
            own = radius * rng.uniform(0.88, 1.0)
            _draw_object(draw, group.shape, x, y, own, _jitter(rng, COLOURS[group.colour], 12))
    return image


def draw_picture(
    rng: random.Random,
    model_size: Size | None = None,
    digits: Sequence[DigitSample] = (),
    kinds: Mapping[str, int] = KINDS,
) -> Picture:
    """A random picture; of a random size if no `model_size` (a key of `MODEL_SIZES`) is asked for.

    Without `digits` no handwritten digit is drawn.
    """
    if model_size is None:
        model_size = rng.choices(list(MODEL_SIZES), list(MODEL_SIZES.values()))[0]
    scene = roll_scene(rng, model_size, kinds if digits else {**kinds, "digit": 0})
    return Picture(draw_scene(rng, scene, roll_canvas(rng, model_size), digits), caption_of(scene))
