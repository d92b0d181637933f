"""A prompt as the job states it, filled in with the values of a row."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping

from ray_ministral.config import PromptConfig
from ray_ministral.data.chat import ChatTokenizer
from ray_ministral.errors import ConfigError, PromptError


class PromptTemplate:
    """A text in which `{column}` stands for the row's value of that column; `{{` and `}}` stand for braces."""

    def __init__(self, template: str) -> None:
        """Raises ConfigError where `template` is not well formed or asks for more than a column's value."""
        self._pieces: list[tuple[str, str | None]] = []
        try:
            pieces = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ConfigError(
                f"--prompt {template!r} has unbalanced braces ({error}): write {{column}}, and {{{{ or }}}} for a brace"
            ) from error
        for literal, column, form, conversion in pieces:
            if column is not None and (form or conversion or not column or re.search(r"[.\[\]]", column)):
                raise ConfigError(
                    f"--prompt {template!r} has a placeholder that is not just the name of a column: write "
                    "{column}, and {{ or }} for a brace"
                )
            self._pieces.append((literal, column))

    @classmethod
    def of(cls, prompt: PromptConfig) -> PromptTemplate:
        """The template of a job; with `prompt_column` the whole prompt is that column's value."""
        if prompt.template is not None:
            return cls(prompt.template)
        whole = cls("")
        whole._pieces = [("", prompt.prompt_column)]
        return whole

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it needs, in order, each once."""
        return tuple(dict.fromkeys(column for _, column in self._pieces if column is not None))

    @property
    def literal(self) -> str:
        """What it says itself, without the rows' values."""
        return " ".join(literal for literal, _ in self._pieces if literal)

    def render(self, row: Mapping[str, object]) -> str:
        """The prompt of one row. Raises PromptError where a value is null, KeyError where a column was not read."""
        text = []
        for literal, column in self._pieces:
            text.append(literal)
            if column is None:
                continue
            value = row[column]
            if value is None:
                raise PromptError(f"column {column!r} is null, and the prompt needs it", stage="template")
            text.append(str(value))
        return "".join(text)


def check_texts(prompt: PromptConfig, tokenizer: ChatTokenizer) -> None:
    """Refuses, before a job starts, the job's own texts where they are malformed or contain a control token.

    Raises ConfigError.
    """
    template = PromptTemplate.of(prompt)
    for option, text in (("--prompt", template.literal), ("--system-prompt", prompt.system_prompt or "")):
        found = tokenizer.control_token_in(text)
        if found is not None:
            raise ConfigError(
                f"{option} contains the control token {found!r}, which only the chat template may: leave it out"
            )
