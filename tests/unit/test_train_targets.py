"""Conversations to tokens: the prompt is captioning's, answers are what is learnt, data says no control token."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ministral.captioning.prompts import PromptTokenizer
from ray_ministral.errors import ModelError, PromptError
from ray_ministral.training.conversation import Conversation, Turn, parse_messages, question_and_answer
from ray_ministral.training.plan import IGNORED
from ray_ministral.training.targets import ConversationTokenizer, TrainSample
from tests.unit.model_directory import SPECIAL, make_model_directory, write_json

ROOT = Path(__file__).resolve().parents[2]
BOS, EOS, INST, END_INST = (SPECIAL.index(token) for token in ("<s>", "</s>", "[INST]", "[/INST]"))
IMG, BREAK, END = (SPECIAL.index(token) for token in ("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
SYSTEM, END_SYSTEM = SPECIAL.index("[SYSTEM_PROMPT]"), SPECIAL.index("[/SYSTEM_PROMPT]")

# every turn ends in something that is no control token
CHATML = (
    "{{ bos_token }}{% for m in messages %}[INST]{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for b in m['content'] %}"
    "{% if b['type'] == 'image' %}[IMG]{% else %}{{ b['text'] }}{% endif %}{% endfor %}{% endif %}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[INST]assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ConversationTokenizer:
    return ConversationTokenizer(folder)


def with_template(folder: Path, template: str | None) -> ConversationTokenizer:
    return ConversationTokenizer(make_model_directory(folder, template=template))


def letters(tokenizer: ConversationTokenizer, text: str) -> list[int]:
    """Its token ids in the byte-level tokenizer, each character one token."""
    ids = [tokenizer._tokenizer.get_vocab()[letter.replace(" ", "Ġ").replace("\n", "Ċ")] for letter in text]
    assert len(ids) == len(text)
    return ids


def spell(tokenizer: ConversationTokenizer, ids: np.ndarray) -> str:
    return str(tokenizer._tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def learnt(tokenizer: ConversationTokenizer, sample: TrainSample) -> list[str]:
    """The texts that the loss counts: runs of targets."""
    runs: list[list[int]] = []
    last = None
    for place, target in enumerate(sample.targets.tolist()):
        if target == IGNORED:
            continue
        if last is None or place != last + 1:
            runs.append([])
        runs[-1].append(target)
        last = place
    return [spell(tokenizer, np.array(run)) for run in runs]


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    return [turn.message() for turn in conversation]


# --- targets ---------------------------------------------------------------------------------------------------------


def test_a_caption_by_hand(tokenizer: ConversationTokenizer) -> None:
    turns = question_and_answer("Why?", "A cat", num_images=1, system_prompt="s")
    sample = tokenizer.sample(turns, [(56, 28)])
    prompt = [
        *(BOS, SYSTEM, *letters(tokenizer, "s"), END_SYSTEM, INST),
        *(IMG, BREAK, IMG, END, *letters(tokenizer, "Why?"), END_INST),
    ]
    answer = [*letters(tokenizer, "A cat"), EOS]
    assert sample.token_ids.tolist() == prompt + answer
    # the last token of the prompt predicts the first of the answer; the end of text predicts nothing
    assert sample.targets.tolist() == [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
    assert sample.token_ids.dtype == sample.targets.dtype == np.int32
    assert sample.image_sizes == ((56, 28),)
    assert (sample.num_tokens, sample.num_targets) == (len(prompt) + 6, 6)
    assert sample.prompt_tokens == len(prompt)
    assert sample.last_answer.tolist() == answer


def test_several_turns_by_hand(tokenizer: ConversationTokenizer) -> None:
    turns = (
        Turn("system", ("s",)),
        Turn("user", (None, "ab", None)),
        Turn("assistant", ("x", "y")),
        Turn("user", ("c",)),
        Turn("assistant", ("z",)),
    )
    sample = tokenizer.sample(turns, [(28, 28), (28, 56)])
    a, b, c, x, y, z = letters(tokenizer, "abcxyz")
    ids = [
        *(BOS, SYSTEM, *letters(tokenizer, "s"), END_SYSTEM),
        *(INST, IMG, END, a, b, IMG, IMG, END, END_INST, x, y, EOS),
        *(INST, c, END_INST, z, EOS),
    ]
    assert sample.token_ids.tolist() == ids
    targets = [IGNORED] * len(ids)
    for token in (x, y, z):
        place = ids.index(token)
        targets[place - 1] = token
    targets[ids.index(y)] = EOS
    targets[ids.index(z)] = EOS
    assert sample.targets.tolist() == targets
    # the last answer alone
    assert sample.token_ids[: sample.prompt_tokens].tolist() == ids[:-2]
    assert sample.last_answer.tolist() == [z, EOS]


def test_every_target_is_the_token_that_follows(tokenizer: ConversationTokenizer) -> None:
    turns = parse_messages(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Wie geht's, Zoë? 😀"}]},
            {"role": "assistant", "content": " Gut 😀.\n"},
            {"role": "user", "content": "</s"},
            {"role": "assistant", "content": "[INST ] [img]"},
        ],
        num_images=1,
    )
    sample = tokenizer.sample(turns, [(84, 84)])
    counted = np.flatnonzero(sample.targets != IGNORED)
    assert np.array_equal(sample.targets[counted], sample.token_ids[counted + 1])
    assert learnt(tokenizer, sample) == [" Gut 😀.\n</s>", "[INST ] [img]</s>"]


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
@pytest.mark.parametrize("sizes", [(), ((28, 28),), ((56, 84), (28, 28), (84, 28))])
def test_the_prompt_is_captionings_to_the_token(
    tokenizer: ConversationTokenizer, folder: Path, sizes: tuple[tuple[int, int], ...], system_prompt: str | None
) -> None:
    question = " What's here?\n"
    turns = question_and_answer(question, " A cat.", num_images=len(sizes), system_prompt=system_prompt)
    sample = tokenizer.sample(turns, sizes)
    prompt = PromptTokenizer(folder).render(question, sizes, system_prompt)
    assert np.array_equal(sample.token_ids[: len(prompt)], prompt)
    assert learnt(tokenizer, sample) == [" A cat.</s>"]
    assert np.flatnonzero(sample.targets != IGNORED)[0] == len(prompt) - 1


def conversations() -> list[Conversation]:
    """Some of every shape, with texts that are awkward to cut: blanks and joining letters at the seams."""
    rng = np.random.default_rng(0)
    words = ["two", " red", "circles ", "\n", "a", "ﬁ", "e\u0301", "😀👍🏽", " [INST", "' s", "0", "\u200b", "."]
    made = []
    for number in range(60):
        turns: list[Turn] = []
        if number % 3 == 0:
            turns.append(Turn("system", ("".join(rng.choice(words, 3)),)))
        for _ in range(rng.integers(1, 5)):
            parts: list[str | None] = [
                None if rng.random() < 0.3 else "".join(rng.choice(words, rng.integers(1, 4)))
                for _ in range(rng.integers(1, 5))
            ]
            turns.append(Turn("user", tuple(parts)))
            turns.append(Turn("assistant", tuple("".join(rng.choice(words, 2)) for _ in range(rng.integers(1, 3)))))
        made.append(tuple(turns))
    return made


@pytest.mark.parametrize("where", ["tests", "examples"])
def test_it_is_the_whole_conversation_as_hugging_face_tokenises_it(where: str, folder: Path) -> None:
    """In one go, with the template's own loop over the messages; `examples` has merges, so seams could matter there."""
    from transformers import AutoTokenizer

    model = ROOT / "examples" / "model" if where == "examples" else folder
    theirs = AutoTokenizer.from_pretrained(model, local_files_only=True)
    ours = ConversationTokenizer(model)
    patch = ours.merged_patch
    for turns in conversations():
        sample = ours.sample(turns, [(patch, patch)] * sum(turn.num_images for turn in turns))
        expected = theirs.apply_chat_template(messages_of(turns), tokenize=True, return_dict=True)["input_ids"]
        assert [id_ for id_ in sample.token_ids.tolist() if id_ != ours.image_end_id] == expected
        answers = ["".join(turn.texts) + "</s>" for turn in turns if turn.role == "assistant"]
        assert learnt(ours, sample) == answers


def test_every_prefix_is_a_sample(tokenizer: ConversationTokenizer) -> None:
    for turns in conversations():
        size = (28, 28)
        whole = tokenizer.sample(turns, [size] * sum(turn.num_images for turn in turns))
        for stop, turn in enumerate(turns, start=1):
            if turn.role == "assistant":
                part = tokenizer.sample(turns[:stop], [size] * sum(turn.num_images for turn in turns[:stop]))
                assert np.array_equal(whole.token_ids[: part.num_tokens], part.token_ids)
                assert np.array_equal(whole.targets[: part.num_tokens], part.targets)


# --- templates -------------------------------------------------------------------------------------------------------


def test_the_built_in_format(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, None)
    turns = (
        *question_and_answer("q", "a", num_images=1, system_prompt="s"),
        *question_and_answer("r", "b", num_images=0),
    )
    sample = tokenizer.sample(turns, [(28, 28)])
    assert spell(tokenizer, sample.token_ids) == (
        "<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST][IMG][IMG_END]q[/INST]a</s>[INST]r[/INST]b</s>"
    )
    assert learnt(tokenizer, sample) == ["a</s>", "b</s>"]
    tokenizer.probe("s")


def test_a_template_with_a_generation_prompt_and_text_after_the_end_of_an_answer(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML)
    tokenizer.probe()
    turns = (*question_and_answer("q", "a", num_images=1), *question_and_answer("r", "b\nc", num_images=0))
    sample = tokenizer.sample(turns, [(28, 28)])
    assert spell(tokenizer, sample.token_ids) == (
        "<s>[INST]user\n[IMG][IMG_END]q</s>\n[INST]assistant\na</s>\n[INST]user\nr</s>\n[INST]assistant\nb\nc</s>\n"
    )
    assert learnt(tokenizer, sample) == ["a</s>", "b\nc</s>"]


def test_a_template_that_lays_earlier_turns_out_anew(tmp_path: Path) -> None:
    # as those do that take the thoughts out of all answers but the last
    forgetful = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'][:1] }}")
    tokenizer = with_template(tmp_path, forgetful)
    one = question_and_answer("q", "ab", num_images=0)
    assert learnt(tokenizer, tokenizer.sample(one)) == ["ab</s>"]
    with pytest.raises(PromptError, match="lays the text before message 3 out anew"):
        tokenizer.sample((*one, *question_and_answer("r", "cd", num_images=0)))


def test_a_template_whose_prompt_is_not_the_beginning_of_the_text_with_the_answer(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML.replace("[INST]assistant\n{% endif", "[INST]assistant:{% endif"))
    with pytest.raises(ModelError, match="lays the text before message 1 out anew"):
        tokenizer.probe()


def test_a_template_that_does_not_end_answers(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML.replace("{{ eos_token }}", ""))
    with pytest.raises(ModelError, match=r"does not end an answer with any of the tokens \[2\]"):
        tokenizer.probe()


def test_the_first_of_several_ends_of_text_counts(tmp_path: Path) -> None:
    make_model_directory(
        tmp_path, template=CHATML.replace("{{ eos_token }}", "[TOOL_CALLS]{{ eos_token }}"), eos=[2, 10]
    )
    tokenizer = ConversationTokenizer(tmp_path)
    assert learnt(tokenizer, tokenizer.sample(question_and_answer("q", "a", num_images=0))) == ["a[TOOL_CALLS]"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("[IMG]", ""), "0 image tokens for 1 images"),
        (CHATML.replace("[IMG]", "[IMG][IMG]"), "2 image tokens for 1 images"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% broken", "takes no image with a question and an answer"),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        with_template(tmp_path, template).probe()


def test_a_template_that_refuses_a_conversation(tokenizer: ConversationTokenizer) -> None:
    turns = (Turn("user", ("q",)), *question_and_answer("q", "a", num_images=0))
    with pytest.raises(PromptError, match="roles must alternate"):
        tokenizer.sample(turns)


def test_a_token_across_the_seam(tmp_path: Path) -> None:
    """Where no control token ends the prompt, an answer could change its last token."""
    make_model_directory(
        tmp_path,
        template=CHATML.replace("[INST]{{ m['role'] }}\n", "[INST]{{ m['role'] }}").replace("assistant\n", "assistant"),
    )
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"]["ts"] = len(value["model"]["vocab"])
    value["model"]["merges"] = [["t", "s"]]
    path.write_text(json.dumps(value))
    tokenizer = ConversationTokenizer(tmp_path)
    tokenizer.probe()
    with pytest.raises(PromptError, match="share a token"):
        tokenizer.sample(question_and_answer("q", "s", num_images=0))


def test_a_fixed_date(tmp_path: Path, folder: Path) -> None:
    turns = question_and_answer("q", "a", num_images=0)
    fixed = ConversationTokenizer(folder, date=datetime.date(2023, 5, 6))
    assert "[SYSTEM_PROMPT]Today is 2023-05-06.[/SYSTEM_PROMPT]" in spell(fixed, fixed.sample(turns).token_ids)
    today = ConversationTokenizer(folder)
    assert "Today is 2023-05-06" not in spell(today, today.sample(turns).token_ids)

    make_model_directory(tmp_path, template='{%- set f = "%Y" %}{{ strftime_now(f) }}')
    with pytest.raises(ModelError, match="asks for the time in a way that cannot be answered"):
        ConversationTokenizer(tmp_path, date=datetime.date(2023, 5, 6))


@pytest.mark.parametrize("call", ['strftime_now("%d %b %Y")', "strftime_now( '%d %b %Y' )"])
def test_a_date_in_other_words(tmp_path: Path, call: str) -> None:
    template = CHATML.replace(
        "{{ bos_token }}", "{% if strftime_now is defined %}{%- set today = " + call + " %}{% endif %}{{ today }}"
    )
    make_model_directory(tmp_path, template=template)
    tokenizer = ConversationTokenizer(tmp_path, date=datetime.date(2023, 5, 6))
    ids = tokenizer.sample(question_and_answer("q", "a", num_images=0)).token_ids
    assert spell(tokenizer, ids).startswith("06 May 2023[INST]")


# --- no injection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", SPECIAL)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_any_text(tokenizer: ConversationTokenizer, token: str, role: str) -> None:
    texts = {"system": "s", "user": "q", "assistant": "a"} | {role: f"x{token}y"}
    turns = (
        Turn("system", (texts["system"],)),
        Turn("user", ("q",)),
        Turn("assistant", ("a",)),
        Turn("user", (None, texts["user"])),
        Turn("assistant", (texts["assistant"],)),
    )
    with pytest.raises(PromptError) as caught:
        tokenizer.sample(turns, [(28, 28)])
    assert f"the {role}'s text contains the control token" in str(caught.value)
    assert (caught.value.status, caught.value.stage) == ("prompt_error", "template")


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_made_of_several_parts(tokenizer: ConversationTokenizer, role: str) -> None:
    turns = [Turn("system", ("s",)), Turn("user", ("q",)), Turn("assistant", ("a",))]
    turns[["system", "user", "assistant"].index(role)] = Turn(role, ("[/IN", "", "ST]"))  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"\[/INST\]"):
        tokenizer.sample(tuple(turns))


def test_a_control_token_that_no_search_for_its_text_finds(tmp_path: Path) -> None:
    make_model_directory(tmp_path)
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    value["normalizer"] = {"type": "Replace", "pattern": {"String": "HIDDEN"}, "content": "[TOOL_CALLS]"}
    for token in value["added_tokens"]:
        token["normalized"] = token["content"] == "[TOOL_CALLS]"
    path.write_text(json.dumps(value))
    tokenizer = ConversationTokenizer(tmp_path)
    for question, answer in (("HIDDEN", "a"), ("q", "HIDDEN")):
        with pytest.raises(PromptError, match="read as more than text"):
            tokenizer.sample(question_and_answer(question, answer, num_images=0))
    tokenizer.sample(question_and_answer("harmless", "harmless", num_images=0))


def test_a_control_token_that_template_and_text_make_together(tmp_path: Path) -> None:
    template = CHATML.replace("[INST]{{ m['role'] }}\n", "[INST]{{ m['role'] }}[TOOL_").replace("nt\n", "nt[TOOL_")
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(PromptError, match="read as more than text"):
        tokenizer.sample((Turn("user", ("CALLS]",)), Turn("assistant", ("a",))))


def test_shapes_are_not_remembered_without_end(tokenizer: ConversationTokenizer) -> None:
    for number in range(300):
        tokenizer.sample(
            question_and_answer("q", "a", num_images=number % 150, system_prompt="s" * (number % 2)),
            [(28, 28)] * (number % 150),
        )
    assert len(tokenizer._skeletons) <= 256
    for turns in (question_and_answer("q", "a", num_images=0), question_and_answer("q", "b", num_images=0)):
        tokenizer.sample(turns)


def test_images_that_do_not_belong_are_a_bug(tokenizer: ConversationTokenizer) -> None:
    with pytest.raises(ValueError, match="2 images for a conversation that shows 1"):
        tokenizer.sample(question_and_answer("q", "a", num_images=1), [(28, 28)] * 2)
    with pytest.raises(ValueError, match="shorter"):
        tokenizer.sample(question_and_answer("q", "a", num_images=2), [(28, 28)])


def test_generation_config_names_another_end(tmp_path: Path) -> None:
    make_model_directory(tmp_path)
    write_json(tmp_path, "generation_config.json", {"eos_token_id": 3})
    with pytest.raises(ModelError, match=r"any of the tokens \[3\]"):
        ConversationTokenizer(tmp_path).probe()
