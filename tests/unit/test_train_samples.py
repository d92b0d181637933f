"""From parquet to samples with their pixels: every row used or skipped with its reason, none changed by its company."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_ministral.captioning.prompts import PromptTokenizer
from ray_ministral.config import ImageLimits, PromptConfig
from ray_ministral.data.images import ImagePreprocessor
from ray_ministral.data.row_reader import RowIndex
from ray_ministral.data.rows import Pixels
from ray_ministral.errors import ConfigError, InputError, ModelError
from ray_ministral.training import samples as samples_module
from ray_ministral.training.order import SampleOrder
from ray_ministral.training.packing import build_microbatches
from ray_ministral.training.plan import IGNORED
from ray_ministral.training.samples import PreparedSamples, SampleOptions, SamplePreparer, plan_samples
from ray_ministral.training.targets import ConversationTokenizer, TrainSample
from tests.unit.model_directory import make_model_directory

DATE = datetime.date(2026, 11, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("model"))


def encoded(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def options_of(folder: Path, **changes: Any) -> SampleOptions:
    values = {"model_dir": str(folder), "max_tokens": 1000, "prompt": PromptConfig(prompt="What?"), "date": DATE}
    return SampleOptions(**(values | changes))


def run(
    options: SampleOptions, path: Path, columns: dict[str, Any], numbers: list[int] | None = None
) -> tuple[PreparedSamples, Pixels]:
    pq.write_table(pa.table(columns), path)
    index = plan_samples([str(path)], options)
    places = [index.place(number) for number in (range(len(index)) if numbers is None else numbers)]
    prepared, pixels = SamplePreparer(options).prepare_step(places)
    assert len(prepared.samples) == len(pixels) == len(places)
    assert prepared.pixel_bytes == sum(image.nbytes for images in pixels for image in images)
    for sample, images in zip(prepared.samples, pixels, strict=True):
        sizes = () if sample is None else sample.image_sizes
        assert sizes == tuple(image.shape[1:] for image in images)
        assert all(image.dtype == np.uint8 for image in images)
    return prepared, pixels


def statuses(prepared: PreparedSamples) -> dict[int, tuple[str, str]]:
    assert [number for number, sample in enumerate(prepared.samples) if sample is None] == [
        skipped.row for skipped in prepared.skipped
    ]
    return {skipped.row: (skipped.failure.status, skipped.failure.stage) for skipped in prepared.skipped}


def test_a_sample_has_the_tokens_and_pixels_of_its_row(folder: Path, tmp_path: Path) -> None:
    sizes = [(28, 28), (100, 50), (300, 30), (60, 90)]
    images = [encoded(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    columns = {"image": images, "question": [f"Q{n}?" for n in range(4)], "response": [f"a{n}" for n in range(4)]}
    options = options_of(folder, prompt=PromptConfig(prompt_column="question", system_prompt="s"))
    numbers = [2, 0, 3, 1, 2]
    prepared, pixels = run(options, tmp_path / "a.parquet", columns, numbers)
    captioning, preprocessor = PromptTokenizer(folder), ImagePreprocessor(folder)
    for number, sample, got in zip(numbers, prepared.samples, pixels, strict=True):
        expected = preprocessor.resize(Image.open(BytesIO(images[number])))
        assert np.array_equal(got[0], expected)
        assert sample is not None
        prompt = captioning.render(f"Q{number}?", [expected.shape[1:]], "s").tolist()
        assert sample.token_ids[: len(prompt)].tolist() == prompt
        assert captioning.decode(sample.targets[sample.targets != IGNORED].tolist()) == f"a{number}"
        assert sample.num_targets == 3


def test_a_prompt_template_and_an_answer_of_another_type(folder: Path, tmp_path: Path) -> None:
    columns = {"picture": [encoded(28, 28)] * 2, "kind": ["cats", None], "count": [3, 4]}
    prompt = PromptConfig(image_column="picture", prompt="How many {kind}?")
    prepared, _ = run(options_of(folder, prompt=prompt, response_column="count"), tmp_path / "a.parquet", columns)
    sample = prepared.samples[0]
    assert sample is not None
    tokenizer = ConversationTokenizer(folder)
    assert tokenizer.decode(sample.token_ids.tolist()).endswith("How many cats?3")
    assert statuses(prepared) == {1: ("prompt_error", "template")}


def test_a_bad_row_is_skipped_with_its_reason(folder: Path, tmp_path: Path) -> None:
    good = encoded(40, 40)
    images = [good, good[: len(good) // 2], b"", None, b"%!PS-Adobe-3.0", good, encoded(300, 300), good, good, good]
    titles = ["cat", "cat", "cat", "cat", "cat", "a [IMG] b", "cat", None, "dog", "dog"]
    answers = ["a", "a", "a", "a", "a", "a", "a", "a", None, "b [/INST] c"]
    columns = {"image": pa.array(images, pa.binary()), "title": titles, "response": answers}
    options = options_of(folder, prompt=PromptConfig(prompt="A {title}?"), images=ImageLimits(max_pixels=10_000))
    prepared, _ = run(options, tmp_path / "a.parquet", columns)
    assert statuses(prepared) == {
        1: ("bad_image", "decode"),
        2: ("bad_image", "decode"),
        3: ("bad_image", "read"),
        4: ("bad_image", "decode"),
        5: ("prompt_error", "template"),
        6: ("too_large", "decode"),
        7: ("prompt_error", "template"),
        8: ("prompt_error", "template"),
        9: ("prompt_error", "template"),
    }
    skipped = prepared.skipped[0]
    assert (skipped.file, skipped.row_group) == (str(tmp_path / "a.parquet"), 0)
    # what a list of them is written from
    assert json.loads(json.dumps(dataclasses.asdict(skipped)))["failure"]["status"] == "bad_image"


def test_a_sample_that_is_too_long(folder: Path, tmp_path: Path) -> None:
    columns = {"image": [encoded(28, 28), encoded(112, 112), encoded(28, 28)], "response": ["ab", "ab", "abc"]}
    whole, _ = run(options_of(folder), tmp_path / "a.parquet", columns)
    assert whole.samples[0] is not None
    fits = whole.samples[0].num_tokens
    prepared, _ = run(options_of(folder, max_tokens=fits), tmp_path / "a.parquet", columns)
    assert statuses(prepared) == {1: ("too_long", "encode"), 2: ("too_long", "encode")}
    assert f"has {fits + 18} tokens (20 of them for images), at most {fits} fit" in prepared.skipped[0].failure.error


def test_messages_with_images_in_several_turns(folder: Path, tmp_path: Path) -> None:
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    image = {"type": "image", "text": None}

    def said(role: str, *parts: Any) -> dict[str, Any]:
        content = [one if isinstance(one, dict) else {"type": "text", "text": one} for one in parts]
        return {"role": role, "content": content}

    conversations = [
        [said("user", image, "one"), said("assistant", "A"), said("user", "two", image), said("assistant", "B")],
        [said("user", "no picture"), said("assistant", "C")],
        [said("user", image, "x"), said("assistant", "D"), said("user", image, "unanswered")],
        [said("user", image, "x"), said("assistant", "E")],
        [said("user", image, "x"), said("assistant", "F")],
    ]
    small, wide, tall = encoded(28, 28), encoded(56, 28, 1), encoded(28, 84, 2)
    images = pa.array([[small, wide], None, [tall, b"broken"], [small, wide], None], pa.list_(pa.binary()))
    options = options_of(folder, messages_column="talk", prompt=PromptConfig(system_prompt="s"), response_column=None)
    prepared, pixels = run(options, tmp_path / "a.parquet", {"image": images, "talk": pa.array(conversations, kind)})
    assert statuses(prepared) == {3: ("prompt_error", "template"), 4: ("prompt_error", "template")}
    first, second, third = prepared.samples[:3]
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.image_sizes == ((28, 28), (28, 56))
    assert second.image_sizes == ()
    # what follows the last answer is not even decoded
    assert third.image_sizes == ((84, 28),)
    tokenizer = ConversationTokenizer(folder)
    text = tokenizer._tokenizer.decode(first.token_ids.tolist())
    # the little template of these tests puts the image of a pair first, as the hub's do
    assert text == (
        "<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST][IMG][IMG_END]one[/INST]A</s>[INST][IMG][IMG][IMG_END]two[/INST]B</s>"
    )
    assert [first.num_targets, second.num_targets, third.num_targets] == [4, 2, 2]
    assert np.array_equal(pixels[0][1], ImagePreprocessor(folder).resize(Image.open(BytesIO(wide))))


def test_messages_as_json(folder: Path, tmp_path: Path) -> None:
    talk = [
        '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "A"}]',
        '[{"role": "user", "content": "q"}',
        '[{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "A"}]',
        None,
    ]
    columns = {"image": [encoded(28, 28)] * 4, "talk": talk}
    options = options_of(folder, messages_column="talk", prompt=PromptConfig())
    prepared, _ = run(options, tmp_path / "a.parquet", columns)
    assert statuses(prepared) == {
        1: ("prompt_error", "template"),
        2: ("prompt_error", "template"),
        3: ("prompt_error", "template"),
    }
    sample = prepared.samples[0]
    assert sample is not None
    assert sample.image_sizes == ((28, 28),)


def test_an_unexpected_exception_stays_with_its_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, poison = samples_module.open_image, encoded(30, 30, seed=9)

    def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
        if data == poison:
            raise MemoryError("no room")
        return honest(data, limits)

    monkeypatch.setattr(samples_module, "open_image", open_image)
    columns = {"image": [encoded(28, 28), poison, encoded(28, 28)], "response": ["a"] * 3}
    prepared, _ = run(options_of(folder), tmp_path / "a.parquet", columns)
    assert statuses(prepared) == {1: ("engine_error", "decode")}
    assert prepared.skipped[0].failure.error == "MemoryError: no room"


def test_a_sample_does_not_depend_on_its_company(folder: Path, tmp_path: Path) -> None:
    """From order to microbatches: all rows of an epoch once, each with the tokens that it has alone."""
    rng = np.random.default_rng(0)
    rows = 50
    images = [encoded(*(28 * rng.integers(1, 5, 2)).tolist(), seed) for seed in range(rows)]
    images[7] = b"broken"
    columns = {"image": images, "response": [f"answer {'x' * int(rng.integers(0, 60))} {n}" for n in range(rows)]}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=13)
    options = options_of(folder, cache_bytes=20_000)
    index = plan_samples([str(path)], options)
    alone, preparer = SamplePreparer(options), SamplePreparer(options)
    order = SampleOrder(len(index), seed=3)

    seen: list[int] = []
    for step in range(order.num_steps(1, 8)):
        numbers = order.step_samples(step, 8)
        prepared, pixels = preparer.prepare_step([index.place(number) for number in numbers])
        blocks = [prepared.samples[:3], prepared.samples[3:]]
        pixel_blocks = [pixels[:3], pixels[3:]]
        microbatches = build_microbatches(blocks, 3)
        assert sum(len(microbatch.lengths) for microbatch in microbatches) == 8 - len(prepared.skipped)
        for microbatch in microbatches:
            begin = 0
            for length, (block, row) in zip(microbatch.lengths, microbatch.images, strict=True):
                number = numbers[3 * block + row]
                (expected,), ((image,),) = _only(alone, index, number)
                assert microbatch.token_ids[begin : begin + length].tolist() == expected.token_ids.tolist()
                assert microbatch.targets[begin : begin + length].tolist() == expected.targets.tolist()
                assert np.array_equal(pixel_blocks[block][row][0], image)
                seen.append(number)
                begin += length
            assert begin == microbatch.num_tokens
    # the last step takes six samples of the next epoch
    assert sorted(seen[: rows - 1]) != seen[: rows - 1]
    assert set(seen) == set(range(rows)) - {7}


def _only(preparer: SamplePreparer, index: RowIndex, number: int) -> tuple[tuple[TrainSample, ...], Pixels]:
    prepared, pixels = preparer.prepare_step([index.place(number)])
    return tuple(sample for sample in prepared.samples if sample is not None), pixels


def test_the_same_tokens_on_another_day(folder: Path, tmp_path: Path) -> None:
    columns = {"image": [encoded(28, 28)], "response": ["a"]}
    tokenizer = ConversationTokenizer(folder)
    for date in (DATE, datetime.date(2024, 2, 29)):
        prepared, _ = run(options_of(folder, date=date), tmp_path / "a.parquet", columns)
        assert prepared.samples[0] is not None
        assert f"Today is {date}." in tokenizer.decode(prepared.samples[0].token_ids.tolist())


def test_options_travel(folder: Path) -> None:
    options = options_of(folder)
    assert pickle.loads(pickle.dumps(options)) == options  # noqa: S301 our own
    assert hash(options) == hash(options_of(folder)), "a worker keeps one preparer for equal options"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_column": None}, "give --response-column or --messages-column"),
        ({"messages_column": "m"}, "leave --prompt and --prompt-column out"),
        ({"messages_column": "m", "prompt": PromptConfig(prompt_column="q")}, "leave --prompt and"),
        ({"max_tokens": 1}, "room for 2 tokens at least, got 1"),
    ],
)
def test_options_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options_of(folder, **changes)


def test_what_is_wrong_for_every_row_is_raised_before_the_first(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--prompt contains the control token '\[IMG\]'"):
        SamplePreparer(options_of(folder, prompt=PromptConfig(prompt="[IMG]?")))
    with pytest.raises(ConfigError, match=r"--system-prompt contains"):
        SamplePreparer(options_of(folder, messages_column="m", prompt=PromptConfig(system_prompt="</s>")))
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}[IMG]{% endfor %}"
    with pytest.raises(ModelError, match="2 image tokens for 1 images"):
        SamplePreparer(options_of(make_model_directory(tmp_path / "m", template=template)))
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "response": pa.array([], pa.string())}), tmp_path / "a"
    )
    with pytest.raises(InputError, match="--eval has no rows"):
        plan_samples([str(tmp_path / "a")], options_of(folder), option="--eval")
    with pytest.raises(InputError, match="no column 'reply', which --response-column needs"):
        plan_samples([str(tmp_path / "a")], options_of(folder, response_column="reply"))
