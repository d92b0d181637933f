"""From a row's values to the token ids of its prompt, and from generated ids back to text.

`PromptTemplate` fills `{column}`; `PromptTokenizer` lays the text and its images into the model's chat template and
expands each image to its placeholders. Data never gets to say a control token: text that contains one is refused, and
so is a prompt in which more of them stand than the template put there.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_ministral.config import PromptConfig
from ray_ministral.data.chat import ChatTokenizer
from ray_ministral.data.prompts import PromptTemplate, check_texts
from ray_ministral.errors import ModelError, PromptError

__all__ = ["PromptConfig", "PromptTemplate", "PromptTokenizer", "check_prompt"]


class PromptTokenizer(ChatTokenizer):
    """The tokenizer of a model directory as captioning uses it: one question, its images first."""

    def __init__(self, model_dir: str | Path) -> None:
        """Raises ModelError where the tokenizer cannot be loaded or lacks what a prompt needs."""
        super().__init__(model_dir)
        self._skeletons: dict[tuple[int, str | None], np.ndarray] = {}

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
        ids = self._encode_prompt(text, len(image_sizes), system_prompt)
        expected = self._skeleton(len(image_sizes), system_prompt)
        control = self.control_tokens(ids)
        if not np.array_equal(control, expected):
            raise PromptError(
                f"the prompt has {len(control)} control tokens, of which the template made {len(expected)}: some of "
                "its text was read as more than text",
                stage="encode",
            )
        return self.expand(ids, image_sizes)

    def probe(self, system_prompt: str | None) -> None:
        """Tries the chat template with one image and a text. Raises PromptError, ModelError."""
        self._skeleton(1, system_prompt)

    def _encode_prompt(self, text: str, images: int, system_prompt: str | None) -> np.ndarray:
        """Token ids before expansion: one image token for each image."""
        messages: list[dict[str, Any]] = []
        if system_prompt is not None:
            messages.append({"role": "system", "content": system_prompt})
        messages.append({"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]})
        return self.encode(self.lay_out(messages, add_generation_prompt=True))

    def _skeleton(self, images: int, system_prompt: str | None) -> np.ndarray:
        """The control tokens, in order, of a prompt of so many images with a harmless text."""
        key = (images, system_prompt)
        if key not in self._skeletons:
            skeleton = self.control_tokens(self._encode_prompt("a", images, system_prompt))
            made = int((skeleton == self.image_token_id).sum())
            if made != images:
                raise ModelError(
                    f"{self.model_dir}: the chat template makes {made} image tokens for {images} images: it is no "
                    "template for a vision model"
                )
            self._skeletons[key] = skeleton
        return self._skeletons[key]


def check_prompt(prompt: PromptConfig, tokenizer: PromptTokenizer) -> None:
    """Refuses, before a job starts, a prompt that no row could use.

    Raises ConfigError where the job's own texts are malformed or contain a control token, ModelError where the chat
    template cannot take an image and a text.
    """
    check_texts(prompt, tokenizer)
    try:
        tokenizer.probe(prompt.system_prompt)
    except PromptError as error:
        raise ModelError(f"the model's chat template takes no image with a text: {error}") from error
