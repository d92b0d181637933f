"""From shards to chunks of rows that the pipeline can take: read, decode, resize, tokenise.

Whatever goes wrong with one row stays with that row, as its `failure`. What goes wrong with a file or the model
directory is raised. Plain generators that know nothing of Ray; a Ray task runs them, so that neither a decoder's crash
nor its memory is the driver's. They end the process that runs them where a row takes longer than its deadline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from ray_ministral.captioning.prompts import PromptTemplate, PromptTokenizer
from ray_ministral.captioning.request import Pixels, PreparedChunk, PreparedRow, RowFailure
from ray_ministral.config import ImageLimits, PromptConfig
from ray_ministral.data.images import ImagePreprocessor, open_image
from ray_ministral.data.limits import deadline, memory_limit
from ray_ministral.data.parquet import SourceRow, iter_rows
from ray_ministral.data.shards import Shard
from ray_ministral.errors import EngineError, PromptError, RowError, TooLargeError, TooLongError, UsageError

CHUNK_ROWS = 16
CHUNK_BYTES = 32 << 20


def prepare_shards(
    shards: Sequence[Shard],
    *,
    model_dir: str | Path,
    prompt: PromptConfig,
    images: ImageLimits,
    max_prompt_tokens: int,
    limit_column: str | None = None,
    chunk_rows: int = CHUNK_ROWS,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[PreparedChunk | Pixels]:
    """Yields, alternately, a `PreparedChunk` and its pixels, for all rows of `shards` in order.

    `shards` should lie together: each run of shards of one row group is read in one pass. A chunk is of one shard, and
    ends at `chunk_rows` rows or when its pixels reach `chunk_bytes` (so it is larger by one row's images at most). The
    pixels are uint8 `[3, H, W]`, a list of images for each row, empty for a row that failed or has no image.
    Raises ModelError, InputError.
    """
    preparer = RowPreparer(
        model_dir, prompt=prompt, images=images, max_prompt_tokens=max_prompt_tokens, limit_column=limit_column
    )
    yield from preparer.chunks(shards, chunk_rows=chunk_rows, chunk_bytes=chunk_bytes)


class RowPreparer:
    """Tokenizer, image processor and options, loaded once, for as many rows as one likes."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        prompt: PromptConfig,
        images: ImageLimits,
        max_prompt_tokens: int,
        limit_column: str | None = None,
    ) -> None:
        """`limit_column` has the most new tokens of each row. Raises ModelError, ConfigError."""
        self._prompt = prompt
        self._template = PromptTemplate.of(prompt)
        self._limits = images
        self._max_prompt_tokens = max_prompt_tokens
        self._limit_column = limit_column
        self._tokenizer = PromptTokenizer(model_dir)
        self._preprocessor = ImagePreprocessor(model_dir)

    def chunks(
        self, shards: Sequence[Shard], *, chunk_rows: int = CHUNK_ROWS, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[PreparedChunk | Pixels]:
        """As `prepare_shards` says."""
        if chunk_rows < 1 or chunk_bytes < 1:
            raise ValueError(f"a chunk needs a row and a byte at least, got {chunk_rows} rows and {chunk_bytes} bytes")
        for _, together in groupby(shards, key=lambda shard: (shard.location, shard.row_group)):
            source = iter_rows(
                list(together),
                image_column=self._prompt.image_column,
                text_columns=self._template.columns,
                limit_column=self._limit_column,
            )
            for shard_index, rows in groupby(source, key=lambda row: row.shard.index):
                yield from self._chunks_of_shard(shard_index, rows, chunk_rows, chunk_bytes)

    def _chunks_of_shard(
        self, shard_index: int, rows: Iterable[SourceRow], chunk_rows: int, chunk_bytes: int
    ) -> Iterator[PreparedChunk | Pixels]:
        prepared: list[PreparedRow] = []
        pixels: Pixels = []
        size = 0
        for source in rows:
            row, row_pixels = self.prepare(source)
            prepared.append(row)
            pixels.append(row_pixels)
            size += sum(image.nbytes for image in row_pixels)
            if len(prepared) == chunk_rows or size >= chunk_bytes:
                yield PreparedChunk(shard_index=shard_index, rows=tuple(prepared), pixel_bytes=size)
                yield pixels
                prepared, pixels, size = [], [], 0
        if prepared:
            yield PreparedChunk(shard_index=shard_index, rows=tuple(prepared), pixel_bytes=size)
            yield pixels

    def prepare(self, source: SourceRow) -> tuple[PreparedRow, list[np.ndarray]]:
        """One row and its pixels; never raises because of the row. Ends the process where the row takes too long."""
        with deadline(self._limits.deadline_s), memory_limit(self._limits.decode_bytes):
            return self._prepare(source)

    def _prepare(self, source: SourceRow) -> tuple[PreparedRow, list[np.ndarray]]:
        stage = "read"
        try:
            if source.error is not None:
                raise source.error
            stage = "template"
            text = self._template.render(source.texts)
            limit = self._limit(source)
            stage = "decode"
            pixels = [self._preprocessor.resize(open_image(data, self._limits)) for data in source.images]
            stage = "encode"
            sizes = tuple((int(image.shape[1]), int(image.shape[2])) for image in pixels)
            token_ids = self._tokenizer.render(text, sizes, self._prompt.system_prompt)
            if len(token_ids) > self._max_prompt_tokens:
                for_images = sum(self._tokenizer.image_tokens(height, width) for height, width in sizes)
                raise TooLongError(
                    f"the prompt has {len(token_ids)} tokens ({for_images} of them for images), at most "
                    f"{self._max_prompt_tokens} fit",
                    stage=stage,
                )
        except RowError as error:
            return _failed(source.row, error), []
        except UsageError:
            raise  # of the model directory: the same for every row
        except MemoryError as error:
            return _failed(source.row, self._too_large(error, stage)), []
        except Exception as error:  # noqa: BLE001 one row must not end the job, whatever it is made of
            return _failed(source.row, EngineError(f"{type(error).__name__}: {error}", stage=stage)), []
        return PreparedRow(source.row, token_ids, sizes, failure=None, max_new_tokens=limit), pixels

    def _too_large(self, error: MemoryError, stage: str) -> RowError:
        """What a row that took all the memory it may have is: too large, and so it will be the next time."""
        limit = self._limits.decode_bytes >> 20
        return TooLargeError(
            f"preparing this row takes more than {limit} MiB of memory ({str(error) or 'MemoryError'}): make its "
            "images smaller, or raise --max-image-pixels, which the limit follows",
            stage=stage,
        )

    def _limit(self, source: SourceRow) -> int | None:
        """The row's own most new tokens. Raises PromptError where no caption can be so short."""
        limit = None if self._limit_column is None else source.texts[self._limit_column]
        if limit is None:
            return None
        if int(limit) < 1:
            raise PromptError(
                f"column {self._limit_column!r} is {limit}, a caption has at least 1 token", stage="template"
            )
        return int(limit)


def _failed(row: int, error: RowError) -> PreparedRow:
    return PreparedRow(row=row, token_ids=None, image_sizes=(), failure=RowFailure.of(error))
