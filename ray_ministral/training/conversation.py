"""What a row says, as turns: from a question and its answer, or from a messages column.

A conversation may be written as Hugging Face or OpenAI write it: a list of `{role, content}` (or such a list as JSON),
where content is a text or a list of parts, `{"type": "text", "text": …}` and `{"type": "image"}` (or `image_url`; no
address is followed). Image parts stand for the images of the image column, in order.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, cast, get_args

from ray_ministral.errors import PromptError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)

_IMAGE_TYPES = ("image", "image_url")


@dataclass(frozen=True)
class Turn:
    """What one of them says. `parts` are texts, and None in the place of each image (only a user shows images)."""

    role: Role
    parts: tuple[str | None, ...]

    @property
    def num_images(self) -> int:
        """How many images it shows."""
        return self.parts.count(None)

    @property
    def texts(self) -> tuple[str, ...]:
        """Its texts, those that nothing stands between joined."""
        runs = groupby(self.parts, key=lambda part: part is None)
        return tuple("".join(part or "" for part in run) for is_image, run in runs if not is_image)

    def message(self) -> dict[str, Any]:
        """It in Hugging Face's form, as captioning writes it: a user's content as parts, any other's as a text."""
        if self.role != "user":
            return {"role": self.role, "content": "".join(self.texts)}
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in self.parts]
        return {"role": self.role, "content": content}


Conversation = tuple[Turn, ...]


def question_and_answer(
    question: str, answer: object, *, num_images: int, system_prompt: str | None = None
) -> Conversation:
    """One question, its images first, and one answer. Raises PromptError where there is no answer."""
    if answer is None or answer == "":
        raise PromptError("the response is null or empty: there is nothing to learn", stage="template")
    turns = [
        Turn("user", (*(None,) * num_images, question)),
        Turn("assistant", (str(answer),)),
    ]
    return tuple([Turn("system", (system_prompt,)), *turns] if system_prompt is not None else turns)


def parse_messages(value: object, *, num_images: int, system_prompt: str | None = None) -> Conversation:
    """The conversation in a value of the messages column, up to its last answer: what follows teaches nothing.

    `num_images` are there; where no message says a place for them, they stand at the head of the first question.
    `system_prompt` is for a conversation that has none. Raises PromptError.
    """
    if isinstance(value, str):
        value = _from_json(value)
    if value is None:
        raise PromptError("the messages are null", stage="template")
    if not isinstance(value, list) or not value:
        raise PromptError(f"wanted a list of messages, got {_shown(value)}", stage="template")
    turns = [_turn(message, f"message {number}") for number, message in enumerate(value)]
    places = sum(turn.num_images for turn in turns)
    if places not in (0, num_images):
        raise PromptError(
            f"the messages have places for {places} images, but the image column has {num_images}", stage="template"
        )
    turns = _to_last_answer(turns)
    if places == 0 and num_images:
        turns = _showing(turns, num_images)
    if system_prompt is not None and turns[0].role != "system":
        turns = [Turn("system", (system_prompt,)), *turns]
    return tuple(turns)


def _from_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"the messages are no JSON: {error}", stage="template") from error


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} must be a {{role, content}}, got {_shown(message)}", stage="template")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise PromptError(f"{where} must have a role of {', '.join(ROLES)}, got {_shown(role)}", stage="template")
    if message.get("tool_calls"):
        raise PromptError(f"{where} calls tools, which cannot be learnt here", stage="template")
    if isinstance(content, str):
        parts: tuple[str | None, ...] = (content,)
    elif isinstance(content, list):
        parts = tuple(_part(part, f"part {number} of {where}") for number, part in enumerate(content))
    else:
        raise PromptError(f"{where} must have a text or a list of parts, got {_shown(content)}", stage="template")
    turn = Turn(cast(Role, role), parts)
    if not all(map(_is_unicode, turn.texts)):
        raise PromptError(f"{where} has half of a surrogate pair, which is no text", stage="template")
    if turn.num_images and role != "user":
        raise PromptError(f"{where} of role {role} has an image: only a user shows images", stage="template")
    if role == "assistant" and not "".join(turn.texts):
        raise PromptError(f"{where} is an empty answer: there is nothing to learn", stage="template")
    return turn


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can say and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _part(part: object, where: str) -> str | None:
    """Its text, or None for an image."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _IMAGE_TYPES:
        return None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(text, str):
        return text
    raise PromptError(
        f'{where} must be {{"type": "text", "text": …}} or {{"type": "image"}}, got {_shown(part)}', stage="template"
    )


def _to_last_answer(turns: list[Turn]) -> list[Turn]:
    for last in reversed(range(len(turns))):
        if turns[last].role == "assistant":
            return turns[: last + 1]
    raise PromptError("no message has the role assistant: there is nothing to learn", stage="template")


def _showing(turns: list[Turn], num_images: int) -> list[Turn]:
    """`turns` with the images at the head of the first question."""
    for number, turn in enumerate(turns):
        if turn.role == "user":
            asked = replace(turn, parts=(*(None,) * num_images, *turn.parts))
            return [*turns[:number], asked, *turns[number + 1 :]]
    raise PromptError(f"no message of the role user shows the {num_images} images", stage="template")


def _shown(value: object) -> str:
    """`value` for an error message, not at length."""
    return reprlib.repr(value)
