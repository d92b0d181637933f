"""The quick start's pictures, tokenizer and model: right in themselves and the same each time they are made.

Nothing is trained here; the slow test measures the model in the repository on the pictures in the repository.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "model"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    # The scripts import one another by name, as they do when they are run.
    monkeypatch.syspath_prepend(str(EXAMPLES))


def script(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def bundled() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(EXAMPLES / "pictures.parquet").to_pylist()
    return rows


# --- pictures --------------------------------------------------------------------------------------------------------


def test_every_caption_of_the_grammar_parses_back_to_itself() -> None:
    pictures = script("pictures")
    captions = pictures.all_captions()
    assert len(captions) == len(set(captions)) > 10_000
    assert all(pictures.caption_of(pictures.parse_caption(caption)) == caption for caption in captions)


@pytest.mark.parametrize(
    "caption",
    [
        "a red circles in the middle",
        "two red circles in the middle",
        "a orange circle in the middle",
        "a handwritten ten",
        "a red circle below a blue square",
        "a red circle above a blue square.",
        "a red circle above a red circle",
        "four red circles above a blue square",
        "a red circle",
        "",
    ],
)
def test_what_is_not_of_the_grammar_is_refused(caption: str) -> None:
    pictures = script("pictures")
    with pytest.raises(ValueError, match="not a caption of the grammar"):
        pictures.parse_caption(caption)


def test_the_same_seed_draws_the_same_picture_and_another_seed_another() -> None:
    pictures = script("pictures")

    def draw(seed: int) -> tuple[bytes, str]:
        picture = pictures.draw_picture(random.Random(seed))
        return picture.image.tobytes(), picture.caption

    assert [draw(seed) for seed in range(20)] == [draw(seed) for seed in range(20)]
    assert len({draw(seed) for seed in range(20)}) == 20


def test_pictures_come_in_every_size_and_in_the_size_that_was_asked_for() -> None:
    pictures = script("pictures")
    for size in pictures.MODEL_SIZES:
        for seed in range(40):
            image = pictures.draw_picture(random.Random(seed), size).image
            assert pictures.model_size_of(image.height, image.width) == size
    canvases = {pictures.draw_picture(random.Random(seed)).image.size for seed in range(200)}
    assert len(canvases) > 50, "canvases of many sizes are drawn"


def test_what_the_caption_says_is_on_the_picture() -> None:
    pictures = script("pictures")
    scene = pictures.parse_caption("two red circles above a blue square")
    for seed in range(20):
        image = np.asarray(pictures.draw_scene(random.Random(seed), scene, (112, 112))).astype(int)

        def near(colour: str, image: np.ndarray = image) -> np.ndarray:
            return np.abs(image - np.array(pictures.COLOURS[colour])).max(axis=-1) <= 12

        red, blue = near("red"), near("blue")
        assert _blobs(red) == 2
        assert _blobs(blue) == 1
        assert np.nonzero(red)[0].max() < np.nonzero(blue)[0].min(), "all of the red lies above all of the blue"
        assert not near("green").any()
        assert not near("purple").any()


def _blobs(mask: np.ndarray) -> int:
    """How many connected (by a side) areas a bool [H, W] mask has."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    count = 0
    while left:
        count += 1
        stack = [left.pop()]
        while stack:
            y, x = stack.pop()
            for neighbour in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if neighbour in left:
                    left.remove(neighbour)
                    stack.append(neighbour)
    return count


def test_held_out_digits_are_never_in_the_training() -> None:
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn, a development dependency")
    pictures = script("pictures")
    train, held_out = (
        Counter((sample.label, sample.ink.tobytes()) for sample in pictures.load_digit_samples(split))
        for split in ("train", "held-out")
    )
    assert train.total() + held_out.total() == 1797
    assert held_out.total() == 299
    assert not train.keys() & held_out.keys()
    assert {label for label, _ in held_out} == set(range(10))


# --- the parquet file ------------------------------------------------------------------------------------------------


def test_bundled_rows_are_good_but_for_the_six_that_are_broken_on_purpose() -> None:
    pictures = script("pictures")
    rows = bundled()
    assert [row["id"] for row in rows] == list(range(306))
    formats: Counter[str | None] = Counter()
    broken = []
    for row in rows:
        if row["expected"] is None:
            broken.append(row["image"])
            continue
        assert _why_refused(row["image"]["bytes"]) is None  # type: ignore[index]
        image = Image.open(BytesIO(row["image"]["bytes"]))  # type: ignore[index]
        formats[image.format] += 1
        assert pictures.model_size_of(image.height, image.width) in pictures.MODEL_SIZES
        pictures.parse_caption(row["expected"])
    assert set(formats) == {"PNG", "JPEG", "WEBP"}
    assert min(formats.values()) > 50
    assert len(broken) == 6
    assert broken.count(None) == 1
    for struct in broken:
        if struct is not None:
            assert _why_refused(struct["bytes"]), struct["path"]  # type: ignore[index]


def _why_refused(data: bytes) -> str | None:
    """What a careful reader has against an image file, None if nothing."""
    try:
        image = Image.open(BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > 64_000_000:
            return "too large"
        image.load()
    except (OSError, SyntaxError) as error:
        return str(error)
    return None


def test_bundled_file_is_small_and_has_several_row_groups() -> None:
    assert (EXAMPLES / "pictures.parquet").stat().st_size < 2_000_000
    metadata = pq.read_metadata(EXAMPLES / "pictures.parquet")
    assert metadata.num_row_groups == 5
    features = json.loads(metadata.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert list(features) == pq.read_schema(EXAMPLES / "pictures.parquet").names


def test_the_bundled_file_is_what_the_script_writes() -> None:
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn, a development dependency")
    make_data = script("make_data")
    rows = bundled()
    digits = script("pictures").load_digit_samples("held-out")
    made = make_data.bundled_rows(digits)
    assert [row["expected"] for row in made] == [row["expected"] for row in rows]
    # Pixels of PNGs, not bytes of files: another Pillow may compress otherwise.
    for new, old in zip(made, rows, strict=True):
        if old["expected"] is not None and old["image"]["path"].endswith(".png"):  # type: ignore[index]
            pixels = [Image.open(BytesIO(row["image"]["bytes"])).convert("RGB").tobytes() for row in (new, old)]
            assert pixels[0] == pixels[1]


# --- tokenizer and processor -----------------------------------------------------------------------------------------

TEXTS = [
    "two red circles above a blue square",
    "  spaces  and\ttabs\nand lines ",
    "Grüße, 你好, \N{WOMAN}\N{ZERO WIDTH JOINER}\N{MICROSCOPE}, \N{RIGHT-TO-LEFT OVERRIDE}",
    "\x00\x7f control",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(MODEL)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < 640


def test_special_tokens_have_mistrals_ids(tokenizer) -> None:  # type: ignore[no-untyped-def]
    wanted = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "[INST]": 3,
        "[/INST]": 4,
        "[IMG]": 10,
        "<pad>": 11,
        "[IMG_BREAK]": 12,
        "[IMG_END]": 13,
        "[SYSTEM_PROMPT]": 17,
        "[/SYSTEM_PROMPT]": 18,
    }
    assert tokenizer.convert_tokens_to_ids(list(wanted)) == list(wanted.values())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 11)
    assert set(wanted.values()) <= set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }


def test_the_tokenizer_in_the_model_directory_is_the_one_that_the_script_makes(tmp_path: Path) -> None:
    script("make_tokenizer").write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), name


def test_auto_tokenizer_loads_the_same(tokenizer) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(MODEL)
    assert auto.get_vocab() == tokenizer.get_vocab()
    assert auto.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "Hi"}], "<s>[INST]Hi[/INST]"),
        (
            [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}],
            "<s>[INST][IMG]What?[/INST]",
        ),
        (
            [{"role": "user", "content": [IMAGE, {"type": "text", "text": "and"}, IMAGE]}],
            "<s>[INST][IMG]and[IMG][/INST]",
        ),
        (
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "a red circle"},
            ],
            "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST][IMG]What?[/INST]a red circle</s>",
        ),
        (
            [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": " {{ x }} <b> "},
            ],
            "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST] {{ x }} <b> [/INST]",
        ),
    ],
)
def test_chat_template(tokenizer, messages: list[dict[str, object]], expected: str) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "tool", "content": "x"}, "role system, user or assistant, got tool"),
        ({"role": "user", "content": [{"type": "audio"}]}, "type text or image, got audio"),
    ],
)
def test_chat_template_refuses_what_it_does_not_know(tokenizer, message: dict[str, object], error: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Exception, match=error):
        tokenizer.apply_chat_template([message], tokenize=False)


def test_most_words_of_the_captions_are_one_token(tokenizer) -> None:  # type: ignore[no-untyped-def]
    captions = script("pictures").all_captions()
    lengths = [len(tokenizer.encode(caption, add_special_tokens=False)) for caption in captions]
    assert sum(lengths) < 1.05 * sum(len(caption.split()) for caption in captions)
    assert max(lengths) <= 16


def test_the_training_resizes_as_hugging_faces_image_processor_does() -> None:
    make_model = script("make_model")
    processor = make_model.image_processor(MODEL)
    for seed in range(12):
        image = script("pictures").draw_picture(random.Random(seed)).image
        theirs = processor([image], return_tensors="pt")
        pixels = make_model.pixels_of(image)
        ours = make_model.normalise(make_model.torch.from_numpy(pixels[None].copy()))
        assert tuple(theirs["image_sizes"][0].tolist()) == pixels.shape[1:]
        make_model.torch.testing.assert_close(theirs["pixel_values"].float(), ours, rtol=0, atol=1e-5)


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_model_directory_is_complete_and_at_most_8_mb() -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000


def test_the_config_is_a_small_ministral_3() -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODEL)
    text, vision = config.text_config, config.vision_config
    assert (config.model_type, text.model_type, vision.model_type) == ("mistral3", "ministral3", "pixtral")
    assert text.tie_word_embeddings
    assert text.num_key_value_heads < text.num_attention_heads
    assert text.num_hidden_layers >= 4, "it can be cut into up to four stages"
    rope = text.rope_parameters
    assert rope["rope_type"] == "yarn"
    assert rope["llama_4_scaling_beta"] > 0
    # The images' tokens alone reach beyond this, so every caption meets YaRN and the query scale.
    assert rope["original_max_position_embeddings"] <= 32
    made = script("make_model").model_config()
    assert {**text.to_dict(), "dtype": None} == {**made.text_config.to_dict(), "dtype": None}
    assert {**vision.to_dict(), "dtype": None} == {**made.vision_config.to_dict(), "dtype": None}


def test_every_weight_is_finite_bfloat16_of_the_configs_shape() -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import Mistral3ForConditionalGeneration

    tensors = load_file(MODEL / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 and bool(t.isfinite().all()) for t in tensors.values())
    model, report = Mistral3ForConditionalGeneration.from_pretrained(
        MODEL, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    # The tied output layer is not stored.
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters())


def test_the_trainings_batched_vision_equals_hugging_faces() -> None:
    import torch
    from transformers import Mistral3ForConditionalGeneration

    make_model = script("make_model")
    model = Mistral3ForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    for height, width in ((84, 112), (112, 112)):
        pixels = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.inference_mode():
            theirs = model.get_image_features(pixel_values=pixels, image_sizes=[(height, width)] * 3).pooler_output
            ours = make_model.encode_images(model, pixels)
        torch.testing.assert_close(torch.stack(list(ours)), torch.stack(list(theirs)), rtol=1e-4, atol=1e-4)


def test_training_batches_depend_on_the_seed_and_the_step_alone() -> None:
    import torch

    make_model = script("make_model")
    tokenizer = script("make_tokenizer").build_tokenizer()
    cycle = make_model.Cycle(steps=10, batch=4, learning_rate=1e-3)

    def batches(seed: int) -> object:
        return make_model.TrainingBatches(cycle, seed, 0, tokenizer, [])

    first, again, other = batches(0), batches(0), batches(1)
    first[0]  # what was drawn before must not matter
    assert all(torch.equal(getattr(first[7], n), getattr(again[7], n)) for n in ("pixels", "ids", "labels"))
    assert not torch.equal(first[7].ids, other[7].ids) or not torch.equal(first[7].pixels, other[7].pixels)


def test_labels_are_the_answers_tokens_through_the_end_of_sentence() -> None:
    make_model = script("make_model")
    tokenizer = script("make_tokenizer").build_tokenizer()
    pictures = script("pictures")
    cycle = make_model.Cycle(steps=6, batch=4, learning_rate=1e-3)
    batches = make_model.TrainingBatches(cycle, 0, 0, tokenizer, [])
    for step in range(cycle.steps):
        batch = batches[step]
        for ids, labels in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
            answer = [label for label in labels if label != make_model.IGNORED]
            assert answer[-1] == 2
            pictures.parse_caption(tokenizer.decode(answer[:-1]))
            start = labels.index(answer[0])
            assert ids[start : start + len(answer)] == answer
            prompt = tokenizer.decode(ids[:start])
            assert prompt.startswith("<s>[")
            assert prompt.endswith("[/INST]")
            cells = (batch.pixels.shape[2] // 28) * (batch.pixels.shape[3] // 28)
            assert ids.count(10) == cells
            assert ids.count(13) == 1


def test_orthogonalise_brings_singular_values_near_to_one() -> None:
    import torch

    make_model = script("make_model")
    matrices = torch.randn(3, 24, 60, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(make_model.orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert torch.linalg.svdvals(matrices).max() > 5, "they were not near to one before"


@pytest.mark.slow
def test_captions_of_held_out_pictures_are_right() -> None:
    import torch
    from transformers import Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

    make_model = script("make_model")
    rows = [row for row in bundled() if row["expected"] is not None]
    images = [Image.open(BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]  # type: ignore[index]
    captions = make_model.generate_captions(
        Mistral3ForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval(),
        PreTrainedTokenizerFast.from_pretrained(MODEL),
        make_model.image_processor(MODEL),
        images,
    )
    wrong = [(row["expected"], c) for row, c in zip(rows, captions, strict=True) if row["expected"] != c]
    assert len(rows) == 300
    assert len(wrong) <= 0.05 * len(rows), wrong
