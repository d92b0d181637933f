"""From a row's values to the token ids of its prompt, and from generated ids back to text.

`PromptTemplate` fills `{column}`; `PromptTokenizer` lays the text and its images into the model's chat template and
expands each image to its placeholders. Data never gets to say a control token: text that contains one is refused, and
so is a prompt in which more of them stand than the template put there.

Nothing here imports torch.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_ministral.config import PromptConfig
from ray_ministral.data.model_files import merged_patch, read_config, read_json
from ray_ministral.errors import ConfigError, ModelError, PromptError

# The Mistral format for a model that brings no chat template.
_BUILT_IN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'] }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}[IMG]{% else %}{{ block['text'] }}{% endif %}"
    "{% endfor %}[/INST]{% endif %}{% endfor %}"
)


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


class PromptTokenizer:
    """The tokenizer of a model directory, with its chat template and its image placeholders."""

    def __init__(self, model_dir: str | Path) -> None:
        """Raises ModelError where the tokenizer cannot be loaded or lacks what a prompt needs."""
        # takes 0.8 s, and would slow down whoever only wants the template
        from transformers import PreTrainedTokenizerFast

        self._model_dir = str(model_dir)
        config = read_config(model_dir)
        self._merged_patch = merged_patch(config, model_dir)
        if not (Path(model_dir) / "tokenizer.json").is_file():
            raise ModelError(f"{model_dir} has no tokenizer.json: take it from where the model came from")
        try:
            self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(self._model_dir, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ModelError(f"{model_dir}: the tokenizer cannot be loaded: {error}") from error
        processor = read_json(model_dir, "processor_config.json") or {}
        names = [
            str(processor.get("image_token", "[IMG]")),
            str(processor.get("image_break_token", "[IMG_BREAK]")),
            str(processor.get("image_end_token", "[IMG_END]")),
        ]
        self.image_token_id, self.image_break_id, self.image_end_id = (self._token_id(name) for name in names)
        self._check_image_token(config, names[0])
        self.eos_token_ids = self._eos_token_ids(config)
        self._template = self._chat_template()

        added = self._tokenizer.added_tokens_decoder
        control = {int(id_) for id_, token in added.items() if token.special} | set(self._tokenizer.all_special_ids)
        control |= {self.image_token_id, self.image_break_id, self.image_end_id}
        self._control_ids = np.array(sorted(control), dtype=np.int32)
        # the longest first, so that an error names [IMG_BREAK] and not what it begins with
        texts = sorted(filter(None, self._tokenizer.convert_ids_to_tokens(sorted(control))), key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, texts)))
        self._skeletons: dict[tuple[int, str | None], np.ndarray] = {}

    def control_token_in(self, text: str) -> str | None:
        """The first control token that `text` spells out, or None."""
        found = self._control_text.search(text)
        return found.group() if found else None

    def image_tokens(self, height: int, width: int) -> int:
        """How many tokens an image of these pixels takes: a row of patches and its break, for each row."""
        return (height // self._merged_patch) * (width // self._merged_patch + 1)

    def render(
        self, text: str, image_sizes: Sequence[tuple[int, int]] = (), system_prompt: str | None = None
    ) -> np.ndarray:
        """The prompt's token ids, int32 `[P]`, images first, placeholders expanded.

        `image_sizes` are (height, width) in pixels as the model sees them, multiples of patch size times spatial merge
        size. `system_prompt` None leaves it to the chat template, which may have one of its own.
        Raises PromptError where the text has a control token or the chat template refuses it.
        """
        found = self.control_token_in(text)
        if found is not None:
            raise PromptError(
                f"the prompt contains the control token {found!r}, which only the template may", stage="template"
            )
        ids = self._encode(text, len(image_sizes), system_prompt)
        expected = self._skeleton(len(image_sizes), system_prompt)
        control = ids[np.isin(ids, self._control_ids)]
        if not np.array_equal(control, expected):
            raise PromptError(
                f"the prompt has {len(control)} control tokens, of which the template made {len(expected)}: some of "
                "its text was read as more than text",
                stage="encode",
            )
        return self._expand(ids, image_sizes)

    def probe(self, system_prompt: str | None) -> None:
        """Tries the chat template with one image and a text. Raises PromptError, ModelError."""
        self._skeleton(1, system_prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, as Hugging Face's `batch_decode(skip_special_tokens=True)` gives it.

        Control tokens are left out; blanks are kept as they are, at both ends, too.
        """
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _encode(self, text: str, images: int, system_prompt: str | None) -> np.ndarray:
        """Token ids before expansion: one image token for each image."""
        messages: list[dict[str, Any]] = []
        if system_prompt is not None:
            messages.append({"role": "system", "content": system_prompt})
        messages.append({"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]})
        from jinja2 import TemplateError

        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise PromptError(f"the chat template refuses the prompt: {error}", stage="template") from error
        ids = self._tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array(ids, dtype=np.int32)

    def _skeleton(self, images: int, system_prompt: str | None) -> np.ndarray:
        """The control tokens, in order, of a prompt of so many images with a harmless text."""
        key = (images, system_prompt)
        if key not in self._skeletons:
            ids = self._encode("a", images, system_prompt)
            skeleton = ids[np.isin(ids, self._control_ids)]
            made = int((skeleton == self.image_token_id).sum())
            if made != images:
                raise ModelError(
                    f"{self._model_dir}: the chat template makes {made} image tokens for {images} images: it is no "
                    "template for a vision model"
                )
            self._skeletons[key] = skeleton
        return self._skeletons[key]

    def _expand(self, ids: np.ndarray, image_sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        places = np.flatnonzero(ids == self.image_token_id)
        pieces: list[np.ndarray] = []
        begin = 0
        for place, (height, width) in zip(places, image_sizes, strict=True):
            rows, columns = height // self._merged_patch, width // self._merged_patch
            if rows < 1 or columns < 1 or height % self._merged_patch or width % self._merged_patch:
                raise ValueError(
                    f"image of {height} x {width} is not made of patches of {self._merged_patch} pixels a side"
                )
            grid = np.full((rows, columns + 1), self.image_token_id, dtype=np.int32)
            grid[:, -1] = self.image_break_id
            grid[-1, -1] = self.image_end_id
            pieces += [ids[begin:place], grid.reshape(-1)]
            begin = int(place) + 1
        return np.concatenate([*pieces, ids[begin:]]).astype(np.int32)

    def _token_id(self, token: str) -> int:
        id_ = self._tokenizer.get_vocab().get(token)
        if id_ is None:
            raise ModelError(f"{self._model_dir}: the tokenizer has no token {token!r}, which images need")
        return int(id_)

    def _check_image_token(self, config: dict[str, Any], name: str) -> None:
        stated = config.get("image_token_id", config.get("image_token_index"))
        if stated is not None and stated != self.image_token_id:
            raise ModelError(
                f"{self._model_dir}: config.json says that the image token is {stated}, but the tokenizer's {name!r} "
                f"is {self.image_token_id}: model and tokenizer do not belong together"
            )

    def _eos_token_ids(self, config: dict[str, Any]) -> frozenset[int]:
        """Where Hugging Face's `generate` would stop: the first of these places that names an id or several."""
        generation = read_json(self._model_dir, "generation_config.json") or {}
        text = config.get("text_config")
        places = [generation, config, text if isinstance(text, dict) else {}]
        stated = next(
            (p["eos_token_id"] for p in places if p.get("eos_token_id") is not None), self._tokenizer.eos_token_id
        )
        ids = stated if isinstance(stated, list) else [stated]
        if not ids or not all(isinstance(id_, int) and id_ >= 0 for id_ in ids):
            raise ModelError(f"{self._model_dir}: no end of text is named (eos_token_id is {stated!r})")
        return frozenset(ids)

    def _chat_template(self) -> str:
        template = self._tokenizer.chat_template
        if template is None:  # older saves keep it in a file that only Hugging Face's processors read
            template = (read_json(self._model_dir, "chat_template.json") or {}).get("chat_template")
        if isinstance(template, dict):
            template = template.get("default")
        if template is None:
            for token in ("[INST]", "[/INST]"):
                self._token_id(token)
            return _BUILT_IN_TEMPLATE
        if not isinstance(template, str):
            raise ModelError(f"{self._model_dir}: the chat template is a {type(template).__name__}, wanted a text")
        return template


def check_prompt(prompt: PromptConfig, tokenizer: PromptTokenizer) -> None:
    """Refuses, before a job starts, a prompt that no row could use.

    Raises ConfigError where the job's own texts are malformed or contain a control token, ModelError where the chat
    template cannot take an image and a text.
    """
    template = PromptTemplate.of(prompt)
    for option, text in (("--prompt", template.literal), ("--system-prompt", prompt.system_prompt or "")):
        found = tokenizer.control_token_in(text)
        if found is not None:
            raise ConfigError(
                f"{option} contains the control token {found!r}, which only the chat template may: leave it out"
            )
    try:
        tokenizer.probe(prompt.system_prompt)
    except PromptError as error:
        raise ModelError(f"the model's chat template takes no image with a text: {error}") from error
