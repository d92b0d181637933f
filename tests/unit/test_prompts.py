"""From values to token ids: templates, chat templates, image placeholders, and no injection from data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ministral.captioning.prompts import PromptTemplate, PromptTokenizer, check_prompt
from ray_ministral.config import PromptConfig
from ray_ministral.errors import ConfigError, ModelError, PromptError
from tests.unit.model_directory import SPECIAL, make_model_directory, write_json

IMG, BREAK, END = SPECIAL.index("[IMG]"), SPECIAL.index("[IMG_BREAK]"), SPECIAL.index("[IMG_END]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PromptTokenizer:
    return PromptTokenizer(folder)


def spell(tokenizer: PromptTokenizer, ids: np.ndarray) -> str:
    return str(tokenizer._tokenizer.decode(ids.tolist(), skip_special_tokens=False))


# --- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "columns", "rendered"),
    [
        ("Plain.", (), "Plain."),
        ("{a}", ("a",), "A"),
        ("{a} and {b}, {a}!", ("a", "b"), "A and 7, A!"),
        ("{{a}} {{{a}}}", ("a",), "{a} {A}"),
        ("{with space}", ("with space",), "S"),
        ("", (), ""),
    ],
)
def test_templates(template: str, columns: tuple[str, ...], rendered: str) -> None:
    made = PromptTemplate(template)
    assert made.columns == columns
    assert made.render({"a": "A", "b": 7, "with space": "S", "other": "x"}) == rendered


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>5}", "{}", "{a.__class__}", "{!s}", "{a]}"])
def test_templates_take_the_value_of_a_column_and_no_more(template: str) -> None:
    with pytest.raises(ConfigError, match=r"not just the name of a column: write \{column\}"):
        PromptTemplate(template)


@pytest.mark.parametrize("template", ["{", "}", "{a", "a}", "{a{b}}"])
def test_malformed_templates(template: str) -> None:
    with pytest.raises(ConfigError, match=r"--prompt .*write"):
        PromptTemplate(template)


def test_a_null_value() -> None:
    with pytest.raises(PromptError, match="column 'a' is null") as caught:
        PromptTemplate("{a}").render({"a": None})
    assert (caught.value.status, caught.value.stage) == ("prompt_error", "template")


def test_braces_in_values_stay() -> None:
    assert PromptTemplate("{a}").render({"a": "{b} {"}) == "{b} {"


def test_a_prompt_column_is_taken_whole() -> None:
    made = PromptTemplate.of(PromptConfig(prompt_column="my.column"))
    assert made.columns == ("my.column",)
    assert made.render({"my.column": "{not} a template"}) == "{not} a template"
    assert PromptTemplate.of(PromptConfig()).render({}) == "Describe this image."


# --- rendering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(28, 28), (28, 84), (84, 28), (56, 112)])
def test_placeholders(tokenizer: PromptTokenizer, height: int, width: int) -> None:
    ids = tokenizer.render("x", [(height, width)], "s")
    rows, columns = height // 28, width // 28
    expected = ("[IMG]" * columns + "[IMG_BREAK]") * (rows - 1) + "[IMG]" * columns + "[IMG_END]"
    assert spell(tokenizer, ids) == f"<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]{expected}x[/INST]"
    assert (ids == IMG).sum() == rows * columns
    assert (ids == BREAK).sum() == rows - 1
    assert (ids == END).sum() == 1
    assert tokenizer.image_tokens(height, width) == np.isin(ids, [IMG, BREAK, END]).sum()
    assert ids.dtype == np.int32


def test_several_images_keep_their_order(tokenizer: PromptTokenizer) -> None:
    ids = tokenizer.render("x", [(28, 56), (56, 28), (28, 28)], "s")
    assert spell(tokenizer, ids) == (
        "<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST][IMG][IMG][IMG_END][IMG][IMG_BREAK][IMG][IMG_END][IMG][IMG_END]x[/INST]"
    )


def test_text_alone(tokenizer: PromptTokenizer) -> None:
    assert (
        spell(tokenizer, tokenizer.render("hello", [], "s")) == "<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]hello[/INST]"
    )
    assert spell(tokenizer, tokenizer.render("", [(28, 28)], "s")).endswith("[INST][IMG][IMG_END][/INST]")


def test_the_templates_own_system_prompt(tokenizer: PromptTokenizer) -> None:
    assert "[SYSTEM_PROMPT]Today is 20" in spell(tokenizer, tokenizer.render("x"))


def test_the_built_in_format(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(make_model_directory(tmp_path, template=None))
    assert spell(tokenizer, tokenizer.render("x", [(28, 28)])) == "<s>[INST][IMG][IMG_END]x[/INST]"
    assert spell(tokenizer, tokenizer.render("x", [(28, 28)], "s")) == (
        "<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST][IMG][IMG_END]x[/INST]"
    )
    check_prompt(PromptConfig(system_prompt="Be kind."), tokenizer)


def test_the_older_file_with_a_chat_template(tmp_path: Path) -> None:
    make_model_directory(tmp_path, template=None)
    block = "{{ '[IMG]' if b['type'] == 'image' else b['text'] }}"
    template = "{{ bos_token }}{% for b in messages[-1]['content'] %}" + block + "{% endfor %}"
    write_json(tmp_path, "chat_template.json", {"chat_template": template})
    tokenizer = PromptTokenizer(tmp_path)
    assert spell(tokenizer, tokenizer.render("x", [(28, 28)])) == "<s>[IMG][IMG_END]x"


def test_sizes_that_are_no_patches_are_a_bug(tokenizer: PromptTokenizer) -> None:
    for size in ((28, 30), (0, 28)):
        with pytest.raises(ValueError, match="not made of patches of 28"):
            tokenizer.render("x", [size])


def test_it_renders_as_hugging_faces_chat_template(tokenizer: PromptTokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    content = [{"type": "image"}, {"type": "text", "text": "Wie geht's, Zoë? 😀"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    ours = tokenizer.render("Wie geht's, Zoë? 😀", [(28, 28)], "s")
    assert [id_ for id_ in ours.tolist() if id_ != END] == expected


# --- no injection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", SPECIAL)
def test_control_tokens_in_a_rows_text(tokenizer: PromptTokenizer, token: str) -> None:
    with pytest.raises(PromptError) as caught:
        tokenizer.render(f"before {token} after", [(28, 28)])
    assert token in str(caught.value)
    assert caught.value.status == "prompt_error"


def test_control_tokens_made_of_two_columns(tokenizer: PromptTokenizer) -> None:
    text = PromptTemplate("{a}{b}").render({"a": "[/IN", "b": "ST]"})
    with pytest.raises(PromptError, match=r"\[/INST\]"):
        tokenizer.render(text)


@pytest.mark.parametrize("text", ["[INST", "IMG]", "[ IMG ]", "<s", "[img]", "</s >"])
def test_what_only_looks_like_one_is_text(tokenizer: PromptTokenizer, text: str) -> None:
    ids = tokenizer.render(text, [], "s")
    assert spell(tokenizer, ids).endswith(f"[INST]{text}[/INST]")


def test_a_control_token_that_no_search_for_its_text_finds(tmp_path: Path) -> None:
    # a tokenizer that lowers text before it looks for its special tokens
    make_model_directory(tmp_path)
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    value["normalizer"] = {"type": "Replace", "pattern": {"String": "HIDDEN"}, "content": "[TOOL_CALLS]"}
    for token in value["added_tokens"]:
        token["normalized"] = token["content"] == "[TOOL_CALLS]"
    path.write_text(json.dumps(value))
    tokenizer = PromptTokenizer(tmp_path)
    assert tokenizer.control_token_in("HIDDEN") is None
    with pytest.raises(PromptError, match="read as more than text"):
        tokenizer.render("HIDDEN")
    tokenizer.render("harmless")


def test_the_jobs_own_texts_are_checked_at_the_start(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"--prompt contains the control token '\[IMG\]'"):
        check_prompt(PromptConfig(prompt="Look: [IMG]"), tokenizer)
    with pytest.raises(ConfigError, match=r"--system-prompt contains the control token '</s>'"):
        check_prompt(PromptConfig(system_prompt="</s>"), tokenizer)
    with pytest.raises(ConfigError, match="not just the name"):
        check_prompt(PromptConfig(prompt="{a.b}"), tokenizer)
    check_prompt(PromptConfig(prompt="What is {title}?", system_prompt="Be kind."), tokenizer)
    check_prompt(PromptConfig(prompt_column="question"), tokenizer)


# --- model directories -----------------------------------------------------------------------------------------------


def test_a_chat_template_without_images(tmp_path: Path) -> None:
    template = "{{ bos_token }}[INST]{% for b in messages[-1]['content'] %}{{ b['text'] }}{% endfor %}[/INST]"
    tokenizer = PromptTokenizer(make_model_directory(tmp_path, template=template))
    with pytest.raises(ModelError, match="0 image tokens for 1 images"):
        check_prompt(PromptConfig(), tokenizer)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('never') }}", "{{ 'a' + messages[0]['content'] }}", "{% broken", "{{ x.__class__.y }}"],
)
def test_a_chat_template_that_refuses(tmp_path: Path, template: str) -> None:
    tokenizer = PromptTokenizer(make_model_directory(tmp_path, template=template))
    with pytest.raises(ModelError, match="takes no image with a text"):
        check_prompt(PromptConfig(), tokenizer)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 3}, {7}),
        ({"eos_token_id": [2, 11]}, {}, {2, 11}),
        ({}, {"eos_token_id": 3}, {3}),
        ({}, {"eos_token_id": [3, 4]}, {3, 4}),
        (None, {"text_config": {"eos_token_id": 6}}, {6}),
        (None, {"text_config": {"eos_token_id": None}}, {2}),
    ],
)
def test_where_generation_ends(tmp_path: Path, generation: Any, config: dict[str, Any], expected: set[int]) -> None:
    make_model_directory(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        write_json(tmp_path, "generation_config.json", generation)
    whole = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path, "config.json", whole | {"text_config": {}} | config)
    assert PromptTokenizer(tmp_path).eos_token_ids == expected


def test_ids(tokenizer: PromptTokenizer) -> None:
    assert (tokenizer.image_token_id, tokenizer.image_break_id, tokenizer.image_end_id) == (IMG, BREAK, END)


def _special_without(token: str) -> Callable[[Path], None]:
    return lambda folder: (
        make_model_directory(folder, special=tuple(t if t != token else "[X]" for t in SPECIAL)) and None
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer cannot be loaded"),
        (_special_without("[IMG]"), r"no token '\[IMG\]'"),
        (_special_without("[IMG_BREAK]"), r"no token '\[IMG_BREAK\]'"),
        (_special_without("[IMG_END]"), r"no token '\[IMG_END\]'"),
        (
            lambda folder: write_json(folder, "config.json", {"vision_config": {}, "image_token_index": 99}),
            "99.*belong",
        ),
        (lambda folder: write_json(folder, "generation_config.json", {"eos_token_id": "x"}), "no end of text"),
        (lambda folder: write_json(folder, "generation_config.json", {"eos_token_id": []}), "no end of text"),
    ],
)
def test_a_model_directory_that_cannot_be_used(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    make_model_directory(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message):
        PromptTokenizer(tmp_path)


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [" two cats .", "tabs\tand\nlines ", "Zoë 😀", "", "don 't , stop"])
def test_decode_keeps_the_text_and_drops_control_tokens(tokenizer: PromptTokenizer, text: str) -> None:
    ids = tokenizer._tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([1, *ids, 2]) == text
    assert tokenizer.decode(np.array([*ids, 2], dtype=np.int32)) == text


def test_neither_prompts_nor_the_data_room_import_torch(folder: Path) -> None:
    program = (
        "import sys\n"
        "from ray_ministral.captioning import prompts, request\n"
        "from ray_ministral.data import columns, files, fingerprint, ledger, parquet, parts, shards\n"
        f"prompts.check_prompt(prompts.PromptConfig(), prompts.PromptTokenizer({str(folder)!r}))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
