"""The quick start's pictures, tokenizer and model: right in themselves and the same each time they are made.

Nothing is trained here; the slow test measures the model in the repository on the pictures in the repository.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.unit.example_scripts import EXAMPLES, script

MODEL = EXAMPLES / "model"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    # The scripts import one another by name, as they do when they are run.
    monkeypatch.syspath_prepend(str(EXAMPLES))


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


def test_pictures_get_the_size_that_hugging_faces_image_processor_gives_them() -> None:
    pictures, measure = script("pictures"), script("measure")
    processor = measure.image_processor(MODEL)
    for seed in range(12):
        image = pictures.draw_picture(random.Random(seed)).image
        sizes = processor([image], return_tensors="pt")["image_sizes"]
        assert tuple(sizes[0].tolist()) == pictures.model_size_of(image.height, image.width)


# --- the pairs to learn from -----------------------------------------------------------------------------------------


def test_a_pair_depends_on_the_seed_and_its_number_alone() -> None:
    make_pairs = script("make_pairs")
    first = make_pairs.Pairs(count=make_pairs.FILE_PICTURES + 3).rows(1, [])
    assert first == [make_pairs.pair(0, make_pairs.FILE_PICTURES + n, []) for n in range(3)]
    images = {make_pairs.pair(seed, number, [])["image"] for seed in (0, 1) for number in range(20)}
    assert len(images) == 40


def test_the_pairs_are_what_a_training_job_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the script, read by the job: every row is a sample, and its answer is a caption of the grammar."""
    from ray_ministral.training.samples import SampleOptions, SamplePreparer, plan_samples

    make_pairs, pictures = script("make_pairs"), script("pictures")
    tokenizer = script("make_tokenizer").build_tokenizer()
    monkeypatch.setattr(make_pairs, "FILE_PICTURES", 40)
    monkeypatch.setattr(make_pairs, "GROUP_PICTURES", 16)
    monkeypatch.setattr(make_pairs, "_digits", list)
    pairs = make_pairs.Pairs(count=60)
    for file in range(pairs.num_files):
        make_pairs.write_file(pairs, file, tmp_path)
    options = SampleOptions(str(MODEL), max_tokens=1024, response_column=None, messages_column="messages")
    index = plan_samples([str(tmp_path)], options)
    assert index.group_rows == (16, 16, 8, 16, 4)
    prepared, pixels = SamplePreparer(options).prepare_step([index.place(number) for number in range(60)])
    assert not prepared.skipped
    sizes, formats, systems, default = Counter(), Counter(), 0, 0
    for row, sample, images in zip(
        (r for f in (0, 1) for r in pairs.rows(f, [])), prepared.samples, pixels, strict=True
    ):
        assert sample is not None
        answer = sample.targets[sample.targets >= 0].tolist()
        assert answer[-1] == 2
        caption = tokenizer.decode(answer[:-1])
        assert caption == row["messages"][-1]["content"]
        pictures.parse_caption(caption)
        sizes[images[0].shape[1:]] += 1
        formats[Image.open(BytesIO(row["image"])).format] += 1
        systems += row["messages"][0]["role"] == "system"
        default += row["messages"][-2]["content"] == "Describe this image."
    assert sizes.keys() == pictures.MODEL_SIZES.keys()
    assert formats.keys() == {"PNG", "JPEG", "WEBP"}
    assert 5 < systems < 30
    assert 20 < default < 50


def test_a_file_of_pairs_that_is_there_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pairs = script("make_pairs")
    monkeypatch.setattr(make_pairs, "_digits", list)
    pairs = make_pairs.Pairs(count=5)
    path = make_pairs.write_file(pairs, 0, tmp_path)
    written = path.read_bytes()
    monkeypatch.setattr(make_pairs, "pair", None)
    assert make_pairs.write_file(pairs, 0, tmp_path).read_bytes() == written
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_digits_of_the_pairs_are_the_trainings() -> None:
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn, a development dependency")
    make_pairs, pictures = script("make_pairs"), script("pictures")
    known = {sample.ink.tobytes() for sample in pictures.load_digit_samples("train")}
    assert {sample.ink.tobytes() for sample in make_pairs._digits()} == known


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


def test_the_first_model_is_what_a_training_job_takes(tmp_path: Path) -> None:
    """Everything but the training: options, first weights and pictures are found good before a cluster is touched."""
    from jobs.train import main
    from ray_ministral.config import TrainConfig
    from ray_ministral.driver.train_job import TrainJob

    make_model, make_pairs = script("make_model"), script("make_pairs")
    make_model.write_first_model(tmp_path / "first", 0)
    (tmp_path / "pairs").mkdir()
    pq.write_table(
        make_pairs.pa.Table.from_pylist([make_pairs.pair(0, number, []) for number in range(4)], make_pairs.SCHEMA),
        tmp_path / "pairs" / "pairs.parquet",
    )
    found: list[TrainConfig] = []

    def run(config: TrainConfig) -> object:
        found.append(config)
        raise KeyboardInterrupt

    recipe = make_model.Recipe()
    command = recipe.command(*(tmp_path / name for name in ("first", "pairs", "run")), seed=3)
    assert main(command[2:], engine=lambda: run) == 130
    (config,) = found
    job = TrainJob.plan_job(config)
    assert (job.total_steps, config.seed, config.pipeline.stages) == (recipe.steps, 3, 2)
    assert config.optimizer.learning_rate == recipe.learning_rate


def test_the_first_weights_follow_from_the_seed(tmp_path: Path) -> None:
    make_model = script("make_model")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_model.write_first_model(tmp_path / name, seed)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other


def test_the_model_directory_of_trained_weights(tmp_path: Path) -> None:
    """Rounded to bf16 in one file, and beside it what the repository's own has."""
    from safetensors.torch import load_file

    make_model = script("make_model")
    make_model.write_first_model(tmp_path / "first", 0)
    make_model.write_model(tmp_path / "first", tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {path.name for path in MODEL.iterdir()}
    for name in {path.name for path in MODEL.iterdir()} - {"model.safetensors", "generation_config.json"}:
        assert (tmp_path / "model" / name).read_bytes() == (MODEL / name).read_bytes(), name
    made, kept = (json.loads((path / "generation_config.json").read_text()) for path in (tmp_path / "model", MODEL))
    assert made == {name: value for name, value in kept.items() if name != "max_length"}  # of an older script
    trained = load_file(tmp_path / "first" / "model.safetensors")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert written.keys() == trained.keys() == load_file(MODEL / "model.safetensors").keys()
    assert all(bool((written[name] == trained[name].bfloat16()).all()) for name in trained)


@pytest.mark.slow
def test_captions_of_held_out_pictures_are_right() -> None:
    measure = script("measure")
    pictures = measure.bundled_pictures()
    assert len(pictures) == 300
    wrong = measure.wrong_captions(MODEL, pictures)
    assert len(wrong) <= 0.05 * len(pictures), wrong


def test_a_wrong_caption_is_seen() -> None:
    """The measure itself: the same picture under its own caption and under another."""
    measure, pictures = script("measure"), script("pictures")
    (picture,) = measure.bundled_pictures()[:1]
    other = pictures.Picture(picture.image, "a handwritten ten")
    ((expected, caption),) = measure.wrong_captions(MODEL, [picture, other])
    assert (expected, caption) == ("a handwritten ten", picture.caption)
