"""From rows of parquet files to samples and their pixels.

`plan_samples` numbers the rows; `SamplePreparer` reads, decodes, resizes and tokenises those that are asked for.
Whatever goes wrong with one row stays with that row: it is skipped, with the reason. What goes wrong with a file or the
model directory is raised. Nothing here knows Ray: a task or an actor keeps a `SamplePreparer` and calls `prepare_step`.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from ray_ministral.config import ImageLimits, PromptConfig
from ray_ministral.data.columns import RowColumns
from ray_ministral.data.images import ImagePreprocessor, open_image
from ray_ministral.data.parquet import SourceRow
from ray_ministral.data.prompts import PromptTemplate, check_texts
from ray_ministral.data.row_reader import CACHE_BYTES, RowIndex, RowPlace, RowReader
from ray_ministral.data.rows import Pixels, RowFailure
from ray_ministral.data.shards import plan_row_groups
from ray_ministral.errors import ConfigError, EngineError, InputError, RowError, TooLongError, UsageError
from ray_ministral.training.conversation import Conversation, parse_messages, question_and_answer
from ray_ministral.training.targets import ConversationTokenizer, TrainSample

DECODERS = 4
"""Threads that prepare the rows of a step; decoding and resizing, which is most of it, runs in all of them at once."""


@dataclass(frozen=True)
class SampleOptions:
    """How a row becomes a sample.

    `prompt` is as in captioning, so that the same options ask the trained model the same question; its answer is in
    `response_column`. With `messages_column` that column holds whole conversations, and of `prompt` only the image
    column and the system prompt (for conversations that have none) count. `date` is today's for chat templates that say
    it: of the job's first start, so that a run resumed another day goes on with the same tokens.
    """

    model_dir: str
    max_tokens: int
    prompt: PromptConfig = field(default_factory=PromptConfig)
    response_column: str | None = "response"
    messages_column: str | None = None
    images: ImageLimits = field(default_factory=ImageLimits)
    date: datetime.date | None = None
    cache_bytes: int = CACHE_BYTES

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ConfigError(f"a sample needs room for 2 tokens at least, got {self.max_tokens}")
        if self.messages_column is None and self.response_column is None:
            raise ConfigError("no answers to learn: give --response-column or --messages-column")
        if self.messages_column is not None and (self.prompt.prompt, self.prompt.prompt_column) != (None, None):
            raise ConfigError("--messages-column holds the prompts, too: leave --prompt and --prompt-column out")

    @property
    def columns(self) -> RowColumns:
        """What is read of a row."""
        if self.messages_column is not None:
            return RowColumns(image=self.prompt.image_column, messages=self.messages_column)
        return RowColumns(
            image=self.prompt.image_column,
            texts=PromptTemplate.of(self.prompt).columns,
            response=self.response_column,
        )


@dataclass(frozen=True)
class SkippedRow:
    """A row that gave no sample: where it is, as people see it, and why."""

    file: str
    row_group: int
    row: int
    failure: RowFailure

    def __str__(self) -> str:
        return f"row {self.row} of row group {self.row_group} of {self.file}: {self.failure.error}"


@dataclass(frozen=True, eq=False)
class PreparedSamples:
    """What became of some rows, in the order in which they were asked for. Small: pixels travel beside it.

    `samples` has None in the place of each row that was skipped; `skipped` lists those.
    """

    samples: tuple[TrainSample | None, ...]
    skipped: tuple[SkippedRow, ...]
    pixel_bytes: int


def plan_samples(inputs: Sequence[str], options: SampleOptions, *, option: str = "--train") -> RowIndex:
    """All rows of `inputs` (files, folders, globs, URIs), numbered; only footers are read.

    Raises InputError for a file that is missing or not parquet, a column that is missing or of a type that cannot be
    used, and where there is no row at all; it says that `option` is to be mended.
    """
    groups = plan_row_groups(inputs, options.columns, option=option)
    index = RowIndex(groups.shards, groups.bytes)
    if len(index) == 0:
        raise InputError(f"{option} has no rows: give parquet files with some")
    return index


def load_tokenizer(options: SampleOptions) -> ConversationTokenizer:
    """The tokenizer of a job, tried out: what it raises would be wrong with every row. Takes a second, and no torch.

    Raises ModelError where the model directory cannot be trained on conversations, ConfigError where the job's own
    texts cannot be used.
    """
    tokenizer = ConversationTokenizer(options.model_dir, date=options.date)
    check_texts(options.prompt, tokenizer)
    tokenizer.probe(options.prompt.system_prompt)
    return tokenizer


class SamplePreparer:
    """Tokenizer, image processor and a reader's cache, for as many steps as one likes."""

    def __init__(self, options: SampleOptions) -> None:
        """Raises ModelError, and ConfigError where the job's own texts cannot be used."""
        self._options = options
        self._template = PromptTemplate.of(options.prompt)
        self._tokenizer = load_tokenizer(options)
        self._preprocessor = ImagePreprocessor(options.model_dir)
        self._reader = RowReader(options.columns, cache_bytes=options.cache_bytes)
        self._threads = ThreadPoolExecutor(DECODERS, thread_name_prefix="prepare")
        self._tokenizing = Lock()  # Hugging Face's tokenizers are not made for several threads

    def prepare_step(self, places: Sequence[RowPlace]) -> tuple[PreparedSamples, Pixels]:
        """The samples of the rows at `places`, and the pixels of each (none for a row that was skipped).

        Raises InputError where a file cannot be read, ModelError where the model directory cannot be used.
        """
        samples: list[TrainSample | None] = []
        skipped: list[SkippedRow] = []
        pixels: Pixels = []
        rows = self._reader.read(places)
        for place, (sample, sample_pixels) in zip(places, self._threads.map(self.prepare, rows), strict=True):
            pixels.append(sample_pixels)
            if isinstance(sample, RowFailure):
                skipped.append(SkippedRow(place.shard.file, place.shard.row_group, place.row, sample))
                samples.append(None)
            else:
                samples.append(sample)
        size = sum(image.nbytes for images in pixels for image in images)
        return PreparedSamples(samples=tuple(samples), skipped=tuple(skipped), pixel_bytes=size), pixels

    def prepare(self, source: SourceRow) -> tuple[TrainSample | RowFailure, list[np.ndarray]]:
        """One row and its pixels, uint8 `[3, H, W]` each; never raises because of the row."""
        stage = "read"
        try:
            if source.error is not None:
                raise source.error
            stage = "template"
            conversation = self._conversation(source)
            stage = "decode"
            # messages after the last answer are left out, with their images
            shown = source.images[: sum(turn.num_images for turn in conversation)]
            pixels = [self._preprocessor.resize(open_image(data, self._options.images)) for data in shown]
            stage = "encode"
            sizes = tuple((int(image.shape[1]), int(image.shape[2])) for image in pixels)
            with self._tokenizing:
                sample = self._tokenizer.sample(conversation, sizes)
            self._require_room(sample)
        except RowError as error:
            return RowFailure.of(error), []
        except UsageError:
            raise  # of the model directory: the same for every row
        except Exception as error:  # noqa: BLE001 one row must not end the job, whatever it is made of
            return RowFailure.of(EngineError(f"{type(error).__name__}: {error}", stage=stage)), []
        return sample, pixels

    def _conversation(self, source: SourceRow) -> Conversation:
        options = self._options
        images, system_prompt = len(source.images), options.prompt.system_prompt
        if options.messages_column is not None:
            return parse_messages(source.messages, num_images=images, system_prompt=system_prompt)
        assert options.response_column is not None, "checked when made"
        return question_and_answer(
            self._template.render(source.texts),
            source.texts[options.response_column],
            num_images=images,
            system_prompt=system_prompt,
        )

    def _require_room(self, sample: TrainSample) -> None:
        if sample.num_tokens > self._options.max_tokens:
            for_images = sum(self._tokenizer.image_tokens(height, width) for height, width in sample.image_sizes)
            raise TooLongError(
                f"the sample has {sample.num_tokens} tokens ({for_images} of them for images), at most "
                f"{self._options.max_tokens} fit",
                stage="encode",
            )
