"""`ConversationTokenizer`: from a conversation to token ids, and which of them are to be learnt.

The prompt before an answer is, to the token, what captioning would feed to get that answer; that holds since both go
through the same chat template, and is checked for each conversation. The answers' own tokens, with the end of text
that the template puts after them, are the loss's targets, and nothing else is.
"""

from __future__ import annotations

import datetime
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ray_ministral.data.chat import ChatTokenizer
from ray_ministral.errors import ModelError, PromptError
from ray_ministral.training.conversation import Conversation, Turn, question_and_answer
from ray_ministral.training.plan import IGNORED

_SKELETONS = 256


@dataclass(frozen=True, eq=False)
class TrainSample:
    """One conversation, ready for the stages.

    token_ids: int32 [T], image placeholders expanded. targets: int32 [T], `targets[t]` is `token_ids[t + 1]` where that
    belongs to an answer, `IGNORED` otherwise. image_sizes: (height, width) in pixels of each image, after resizing.
    prompt_tokens: the tokens before the last answer are what captioning would feed to get it.
    """

    token_ids: np.ndarray
    targets: np.ndarray
    image_sizes: tuple[tuple[int, int], ...]
    prompt_tokens: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that the loss counts."""
        return int((self.targets != IGNORED).sum())

    @property
    def last_answer(self) -> np.ndarray:
        """int32: the tokens of the last answer, with its end of text."""
        targets: np.ndarray = self.targets[self.prompt_tokens - 1 :]
        learnt: np.ndarray = targets[targets != IGNORED]
        return learnt


@dataclass(frozen=True)
class _Segment:
    """A piece of the text that the template laid out; `learn` where an answer begins with it."""

    text: str
    learn: bool


class ConversationTokenizer(ChatTokenizer):
    """The tokenizer of a model directory as training uses it."""

    def __init__(self, model_dir: str | Path, *, date: datetime.date | None = None) -> None:
        """`date` is what the chat template takes for today: with it, a row always has the same tokens.

        Raises ModelError where the tokenizer cannot be loaded or lacks what a prompt needs.
        """
        super().__init__(model_dir, date=date)
        self._ends = np.array(sorted(self.eos_token_ids), dtype=np.int32)
        self._skeletons: OrderedDict[tuple[object, ...], np.ndarray] = OrderedDict()

    def sample(self, conversation: Conversation, image_sizes: Sequence[tuple[int, int]] = ()) -> TrainSample:
        """The sample of a conversation whose images have these sizes, (height, width) in pixels after resizing.

        Raises PromptError where a text has a control token, or the chat template refuses the conversation or lays an
        earlier turn out anew when a later one comes. Raises ModelError where the template does not end answers.
        """
        for turn in conversation:
            for text in turn.texts:
                found = self.control_token_in(text)
                if found is not None:
                    raise PromptError(
                        f"the {turn.role}'s text contains the control token {found!r}, which only the template may",
                        stage="template",
                    )
        segments = self._segments(conversation)
        ids = [self.encode(segment.text) for segment in segments]
        self._require_no_injection(np.concatenate(ids), segments, conversation)

        sizes = list(image_sizes)
        token_ids: list[np.ndarray] = []
        learnt: list[np.ndarray] = []
        for segment, piece in zip(segments, ids, strict=True):
            images = int((piece == self.image_token_id).sum())
            expanded = self.expand(piece, sizes[:images])
            del sizes[:images]
            token_ids.append(expanded)
            learnt.append(np.arange(len(expanded)) < (self._end_of_answer(expanded) if segment.learn else 0))
        if sizes:
            raise ValueError(f"{len(image_sizes)} images for a conversation that shows {len(image_sizes) - len(sizes)}")
        prompt_tokens = sum(len(piece) for piece in token_ids[:-1])
        return _shifted(np.concatenate(token_ids), np.concatenate(learnt), tuple(image_sizes), prompt_tokens)

    def probe(self, system_prompt: str | None = None) -> None:
        """Refuses, before a job starts, a chat template that no conversation could be laid out with.

        Raises ModelError.
        """
        try:
            turns = question_and_answer("a", "a", num_images=1, system_prompt=system_prompt)
            self.sample(turns, [(self.merged_patch, self.merged_patch)])
        except PromptError as error:
            raise ModelError(
                f"{self.model_dir}: the chat template takes no image with a question and an answer: {error}"
            ) from error

    def _segments(self, conversation: Conversation) -> list[_Segment]:
        """The whole text, cut before and after each answer.

        The text before an answer is asked of the template as captioning asks for it. That it is how the text with the
        answer begins is what makes the model see in training what it will see in use.
        """
        messages = [turn.message() for turn in conversation]
        segments: list[_Segment] = []
        done = ""
        for number, turn in enumerate(conversation):
            if turn.role != "assistant":
                continue
            for text, learn in (
                (self.lay_out(messages[:number], add_generation_prompt=True), False),
                (self.lay_out(messages[: number + 1], add_generation_prompt=False), True),
            ):
                if not text.startswith(done):
                    raise PromptError(
                        f"the chat template lays the text before message {number} out anew when that message comes, so "
                        "the model would be trained on another text than it will be asked with: use a template that "
                        "only adds to what it laid out",
                        stage="template",
                    )
                segments.append(_Segment(text[len(done) :], learn))
                done = text
        return segments

    def _require_no_injection(self, ids: np.ndarray, segments: Sequence[_Segment], conversation: Conversation) -> None:
        """Refuses a text that the tokenizer reads as more than text, or across the seams of the segments."""
        expected = self._skeleton(conversation)
        control = self.control_tokens(ids)
        if not np.array_equal(control, expected):
            raise PromptError(
                f"the conversation has {len(control)} control tokens, of which the template made {len(expected)}: some "
                "of its text was read as more than text",
                stage="encode",
            )
        whole = self.encode("".join(segment.text for segment in segments))
        if not np.array_equal(ids, whole):
            raise PromptError(
                "an answer's first characters and the prompt before it share a token, so the prompt would not be what "
                "the model will be asked with: use a chat template in which a control token ends the prompt",
                stage="encode",
            )

    def _skeleton(self, conversation: Conversation) -> np.ndarray:
        """The control tokens, in order, of a conversation of this shape with harmless texts."""
        # a system prompt is mostly the job's own; its shape is all that is asked about here
        shape = tuple((turn.role, *(part is None for part in turn.parts)) for turn in conversation)
        if shape in self._skeletons:
            self._skeletons.move_to_end(shape)
            return self._skeletons[shape]
        harmless = tuple(
            Turn(turn.role, tuple(None if part is None else "a" for part in turn.parts)) for turn in conversation
        )
        pieces = [self.encode(segment.text) for segment in self._segments(harmless)]
        skeleton = self.control_tokens(np.concatenate(pieces))
        made = int((skeleton == self.image_token_id).sum())
        shown = sum(turn.num_images for turn in conversation)
        if made != shown:
            raise PromptError(
                f"the chat template makes {made} image tokens for {shown} images: it is no template for a vision model",
                stage="template",
            )
        self._skeletons[shape] = skeleton
        if len(self._skeletons) > _SKELETONS:
            self._skeletons.popitem(last=False)
        return skeleton

    def _end_of_answer(self, ids: np.ndarray) -> int:
        """Tokens of an answer's segment through its end of text."""
        ends = np.flatnonzero(np.isin(ids, self._ends))
        if not len(ends):
            raise ModelError(
                f"{self.model_dir}: the chat template does not end an answer with any of the tokens "
                f"{self._ends.tolist()} that end a text, so the model would not learn to stop: correct the "
                "template, or eos_token_id in generation_config.json"
            )
        return int(ends[0]) + 1


def _shifted(
    token_ids: np.ndarray, learnt: np.ndarray, image_sizes: tuple[tuple[int, int], ...], prompt_tokens: int
) -> TrainSample:
    targets = np.full(len(token_ids), IGNORED, dtype=np.int32)
    targets[:-1] = np.where(learnt[1:], token_ids[1:], IGNORED)
    return TrainSample(token_ids=token_ids, targets=targets, image_sizes=image_sizes, prompt_tokens=prompt_tokens)
