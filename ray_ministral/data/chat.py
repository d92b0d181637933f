"""`ChatTokenizer`: the tokenizer of a model directory with its chat template and its image placeholders.

From messages to text to token ids and back; captioning lays prompts out with it, training whole conversations. Data
never gets to say a control token: who renders checks the texts with `control_token_in`, and what came out with
`control_tokens`. Nothing here imports torch.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_ministral.data.model_files import merged_patch, read_config, read_json
from ray_ministral.errors import ModelError, PromptError

# The Mistral format for a model that brings no chat template.
_BUILT_IN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'] }}[/SYSTEM_PROMPT]"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}[INST]{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}[IMG]{% else %}{{ block['text'] }}{% endif %}"
    "{% endfor %}[/INST]{% endif %}{% endfor %}"
)

_NOW = re.compile(r"""\bstrftime_now\s*\(\s*(?P<quote>['"])(?P<format>[^'"\\]*)(?P=quote)\s*\)""")


class ChatTokenizer:
    """Messages to token ids, and generated ids back to text."""

    def __init__(self, model_dir: str | Path, *, date: datetime.date | None = None) -> None:
        """`date` is what the chat template takes for today; None leaves it the clock.

        Raises ModelError where the tokenizer cannot be loaded or lacks what a prompt needs.
        """
        # takes 0.8 s, and would slow down whoever only wants a `PromptTemplate`
        from transformers import PreTrainedTokenizerFast

        self.model_dir = str(model_dir)
        config = read_config(model_dir)
        self.merged_patch = merged_patch(config, model_dir)
        if not (Path(model_dir) / "tokenizer.json").is_file():
            raise ModelError(f"{model_dir} has no tokenizer.json: take it from where the model came from")
        try:
            self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(self.model_dir, local_files_only=True)
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
        if date is not None:
            self._template = _at_date(self._template, date, model_dir)

        added = self._tokenizer.added_tokens_decoder
        control = {int(id_) for id_, token in added.items() if token.special} | set(self._tokenizer.all_special_ids)
        control |= {self.image_token_id, self.image_break_id, self.image_end_id}
        self._control_ids = np.array(sorted(control), dtype=np.int32)
        # the longest first, so that an error names [IMG_BREAK] and not what it begins with
        texts = sorted(filter(None, self._tokenizer.convert_ids_to_tokens(sorted(control))), key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, texts)))

    def control_token_in(self, text: str) -> str | None:
        """The first control token that `text` spells out, or None."""
        found = self._control_text.search(text)
        return found.group() if found else None

    def control_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Those of `ids` that are control tokens, in order."""
        return ids[np.isin(ids, self._control_ids)]

    def image_tokens(self, height: int, width: int) -> int:
        """How many tokens an image of these pixels takes: a row of patches and its break, for each row."""
        return (height // self.merged_patch) * (width // self.merged_patch + 1)

    def lay_out(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text that the chat template makes of messages in Hugging Face's form. Raises PromptError."""
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise PromptError(f"the chat template refuses the prompt: {error}", stage="template") from error
        return str(text)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text that the template laid out, int32; each image is one token still."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array(ids, dtype=np.int32)

    def expand(self, ids: np.ndarray, image_sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """`ids` (int32) with each image token replaced by the placeholders of its image.

        `image_sizes` are (height, width) in pixels as the model sees them, multiples of patch size times spatial merge
        size, one for each image token.
        """
        places = np.flatnonzero(ids == self.image_token_id)
        pieces: list[np.ndarray] = []
        begin = 0
        for place, (height, width) in zip(places, image_sizes, strict=True):
            rows, columns = height // self.merged_patch, width // self.merged_patch
            if rows < 1 or columns < 1 or height % self.merged_patch or width % self.merged_patch:
                raise ValueError(
                    f"image of {height} x {width} is not made of patches of {self.merged_patch} pixels a side"
                )
            grid = np.full((rows, columns + 1), self.image_token_id, dtype=np.int32)
            grid[:, -1] = self.image_break_id
            grid[-1, -1] = self.image_end_id
            pieces += [ids[begin:place], grid.reshape(-1)]
            begin = int(place) + 1
        return np.concatenate([*pieces, ids[begin:]]).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, as Hugging Face's `batch_decode(skip_special_tokens=True)` gives it.

        Control tokens are left out; blanks are kept as they are, at both ends, too.
        """
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _token_id(self, token: str) -> int:
        id_ = self._tokenizer.get_vocab().get(token)
        if id_ is None:
            raise ModelError(f"{self.model_dir}: the tokenizer has no token {token!r}, which images need")
        return int(id_)

    def _check_image_token(self, config: dict[str, Any], name: str) -> None:
        stated = config.get("image_token_id", config.get("image_token_index"))
        if stated is not None and stated != self.image_token_id:
            raise ModelError(
                f"{self.model_dir}: config.json says that the image token is {stated}, but the tokenizer's {name!r} "
                f"is {self.image_token_id}: model and tokenizer do not belong together"
            )

    def _eos_token_ids(self, config: dict[str, Any]) -> frozenset[int]:
        """Where Hugging Face's `generate` would stop: the first of these places that names an id or several."""
        generation = read_json(self.model_dir, "generation_config.json") or {}
        text = config.get("text_config")
        places = [generation, config, text if isinstance(text, dict) else {}]
        stated = next(
            (p["eos_token_id"] for p in places if p.get("eos_token_id") is not None), self._tokenizer.eos_token_id
        )
        ids = stated if isinstance(stated, list) else [stated]
        if not ids or not all(isinstance(id_, int) and id_ >= 0 for id_ in ids):
            raise ModelError(f"{self.model_dir}: no end of text is named (eos_token_id is {stated!r})")
        return frozenset(ids)

    def _chat_template(self) -> str:
        template = self._tokenizer.chat_template
        if template is None:  # older saves keep it in a file that only Hugging Face's processors read
            template = (read_json(self.model_dir, "chat_template.json") or {}).get("chat_template")
        if isinstance(template, dict):
            template = template.get("default")
        if template is None:
            for token in ("[INST]", "[/INST]"):
                self._token_id(token)
            return _BUILT_IN_TEMPLATE
        if not isinstance(template, str):
            raise ModelError(f"{self.model_dir}: the chat template is a {type(template).__name__}, wanted a text")
        return template


def _at_date(template: str, date: datetime.date, model_dir: str | Path) -> str:
    """`template` with its calls of `strftime_now` answered. (A variable of that name would not reach it as a function:
    transformers hands a template plain data only.)"""
    answered = _NOW.sub(lambda call: repr(date.strftime(call["format"])), template)
    if re.search(r"\bstrftime_now\s*\(", answered):
        raise ModelError(
            f"{model_dir}: the chat template asks for the time in a way that cannot be answered with a fixed date, so "
            "that the same row would not always give the same tokens: write its format as a plain text"
        )
    return answered
