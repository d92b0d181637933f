"""What rows say: questions with answers, and messages in the ways that people write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ray_ministral.errors import PromptError
from ray_ministral.training.conversation import Turn, parse_messages, question_and_answer

IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def answer(content: Any = "yes") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def test_a_question_and_its_answer() -> None:
    assert question_and_answer("q?", "a", num_images=2) == (
        Turn("user", (None, None, "q?")),
        Turn("assistant", ("a",)),
    )
    assert question_and_answer("q?", 7, num_images=0, system_prompt="s") == (
        Turn("system", ("s",)),
        Turn("user", ("q?",)),
        Turn("assistant", ("7",)),
    )
    assert question_and_answer("q?", False, num_images=0)[-1] == Turn("assistant", ("False",))
    assert question_and_answer("q?", 0, num_images=0)[-1] == Turn("assistant", ("0",))


@pytest.mark.parametrize("response", [None, ""])
def test_no_answer(response: str | None) -> None:
    with pytest.raises(PromptError, match="the response is null or empty") as caught:
        question_and_answer("q?", response, num_images=1)
    assert caught.value.stage == "template"


def test_messages_of_texts() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, answer("a")]
    expected = (Turn("system", ("s",)), Turn("user", ("q",)), Turn("assistant", ("a",)))
    assert parse_messages(messages, num_images=0) == expected
    assert parse_messages(json.dumps(messages), num_images=0) == expected
    assert parse_messages(messages, num_images=0, system_prompt="of the job") == expected
    assert parse_messages(messages[1:], num_images=0, system_prompt="of the job")[0] == Turn("system", ("of the job",))


def test_messages_of_parts_as_arrow_has_them() -> None:
    """In a parquet file every part has all fields, null where they say nothing."""
    messages = [
        user({"type": "image", "text": None}, {"type": "text", "text": "q"}),
        answer([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
    ]
    parsed = parse_messages(messages, num_images=1)
    assert parsed == (Turn("user", (None, "q")), Turn("assistant", ("a", "b")))
    assert [turn.message() for turn in parsed] == [user(IMAGE, text("q")), answer("ab")]


def test_images_in_several_turns_and_places() -> None:
    messages = [user(text("first"), IMAGE, text("then"), IMAGE), answer("a"), user(IMAGE), answer("b")]
    parsed = parse_messages(messages, num_images=3)
    assert [turn.num_images for turn in parsed] == [2, 0, 1, 0]
    assert [turn.message() for turn in parsed] == messages


def test_openais_image_parts_stand_for_the_images_of_the_column() -> None:
    part = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    assert parse_messages([user(part, text("q")), answer()], num_images=1)[0] == Turn("user", (None, "q"))


def test_images_that_no_message_places_stand_at_the_head_of_the_first_question() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        answer(),
        user(text("r")),
        answer(),
    ]
    parsed = parse_messages(messages, num_images=2)
    assert [turn.parts for turn in parsed] == [("s",), (None, None, "q"), ("yes",), ("r",), ("yes",)]


def test_what_follows_the_last_answer_is_left_out() -> None:
    messages = [user(IMAGE, text("q")), answer("a"), user(IMAGE, text("and this?"))]
    assert parse_messages(messages, num_images=2) == (Turn("user", (None, "q")), Turn("assistant", ("a",)))
    # its images are counted all the same, since they have their places in the column
    with pytest.raises(PromptError, match="places for 2 images, but the image column has 1"):
        parse_messages(messages, num_images=1)


def test_texts_that_nothing_stands_between_are_one() -> None:
    assert Turn("user", ("[/IN", "ST]", None, "x", "", "y")).texts == ("[/INST]", "xy")
    assert Turn("user", (None,)).texts == ()


@pytest.mark.parametrize(
    ("messages", "num_images", "reason"),
    [
        (None, 0, "messages are null"),
        ("", 0, "are no JSON"),
        ("null", 0, "messages are null"),
        ("{}", 0, "wanted a list of messages, got {}"),
        ("[" * 100_000, 0, "are no JSON"),
        ([], 0, r"wanted a list of messages, got \[\]"),
        ({"role": "user"}, 0, "wanted a list of messages"),
        (["hello"], 0, "message 0 must be a {role, content}, got 'hello'"),
        ([None, answer()], 0, "message 0 must be a {role, content}, got None"),
        ([user(text("q"))], 0, "no message has the role assistant"),
        ([user(text("q")), {"role": "tool", "content": "x"}], 0, "role of system, user, assistant, got 'tool'"),
        ([{"from": "human", "value": "q"}], 0, "must have a role .*, got None"),
        ([{"role": ["user"], "content": "q"}], 0, "must have a role"),
        ([{"role": "user"}, answer()], 0, "message 0 must have a text or a list of parts, got None"),
        ([{"role": "user", "content": 7}, answer()], 0, "must have a text or a list of parts, got 7"),
        ('[{"role": "user", "content": "\\ud83d"}]', 0, "half of a surrogate pair"),
        ([user("q"), answer()], 0, "part 0 of message 0 must be .* got 'q'"),
        ([user({"type": "text"}), answer()], 0, "part 0 of message 0 must be"),
        ([user({"type": "text", "text": None}), answer()], 0, "part 0 of message 0 must be"),
        ([user({"type": "video"}), answer()], 0, "part 0 of message 0 must be"),
        ([user(IMAGE), answer([IMAGE])], 2, "message 1 of role assistant has an image"),
        ([{"role": "system", "content": [IMAGE]}, answer()], 1, "message 0 of role system has an image"),
        ([user(text("q")), answer("")], 0, "message 1 is an empty answer"),
        ([user(text("q")), answer([])], 0, "message 1 is an empty answer"),
        ([user(text("q")), answer() | {"tool_calls": [{"id": "1"}]}], 0, "message 1 calls tools"),
        ([user(IMAGE, IMAGE), answer()], 1, "places for 2 images, but the image column has 1"),
        ([user(IMAGE), answer()], 0, "places for 1 images, but the image column has 0"),
        ([answer()], 1, "no message of the role user shows the 1 images"),
    ],
)
def test_messages_that_cannot_be_used(messages: object, num_images: int, reason: str) -> None:
    with pytest.raises(PromptError, match=reason) as caught:
        parse_messages(messages, num_images=num_images)
    assert caught.value.status == "prompt_error"


def test_an_error_does_not_show_all_of_a_large_value() -> None:
    with pytest.raises(PromptError) as caught:
        parse_messages([{"role": "x" * 10_000_000, "content": ""}], num_images=0)
    assert len(str(caught.value)) < 300
