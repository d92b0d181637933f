"""Everything that this package raises on purpose.

    RayMinistralError
    ├── UsageError            the caller can mend it: options, model directory, input; exit status 2
    │   ├── ConfigError       an option that does not fit, alone or with another
    │   ├── ModelError        a model directory that cannot be run: architecture, weights, tokenizer
    │   ├── InputError        input files or columns that are not there or not readable
    │   └── DivergedError     training came to gradients that are no numbers
    ├── RowError              one row cannot be captioned; becomes `status` and `error` of that row
    │   ├── BadImageError     bad_image
    │   ├── TooLargeError     too_large
    │   ├── PromptError       prompt_error
    │   ├── TooLongError      too_long
    │   └── EngineError       engine_error
    ├── TooManyErrorsError    more bad rows than --max-error-rate allows; exit status 3
    └── ClusterError          the cluster could not carry the job; exit status 4
        ├── PlacementError    no room for the stages
        ├── StageDiedError    a stage actor died, hung or could not start
        ├── OutputError       the output cannot be written: a full disk, a full object store
        ├── LeaseLostError    another job has taken over the output folder
        ├── PieceError        a part of the model did not come from one stage to another as it was sent
        └── StaleStepError    a step of a pipeline as it was before a stage was replaced; nobody waits for it

A message says what it got, what it wanted and what to change. Bugs are not in this tree: they stay
`AssertionError`, `TypeError` and the like, with their traceback.
"""

from __future__ import annotations

from typing import ClassVar


class RayMinistralError(Exception):
    """Root of the tree."""

    exit_status: ClassVar[int] = 1


class UsageError(RayMinistralError, ValueError):
    """The caller can mend it, nearly always before the job starts."""

    exit_status = 2


class ConfigError(UsageError):
    """An option that does not fit, alone or with another."""


class ModelError(UsageError):
    """A model directory that cannot be run."""


class InputError(UsageError):
    """Input files or columns that are missing or unreadable."""


class DivergedError(UsageError):
    """Training came to gradients that are no numbers. The same options would come there again."""


class RowError(RayMinistralError):
    """One row cannot be captioned. `status` is what its output row says.

    `stage` names the step that failed: read, decode, template, encode, prefill, decode_token, write.
    """

    status: ClassVar[str] = "engine_error"

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message)
        self.stage = stage

    def __reduce__(self) -> tuple[object, ...]:
        return (_remake_row_error, (type(self), str(self), self.stage))


class BadImageError(RowError):
    """Not an image, truncated, null, of a format that is not allowed."""

    status = "bad_image"


class TooLargeError(RowError):
    """An image above the pixel, side or aspect limit, known from its header, or above the limit on memory."""

    status = "too_large"


class PromptError(RowError):
    """The row's prompt cannot be made: a null column, control tokens in the text."""

    status = "prompt_error"


class TooLongError(RowError):
    """Prompt plus new tokens do not fit into the model's context or the KV cache."""

    status = "too_long"


class EngineError(RowError):
    """The pipeline failed on this row."""

    status = "engine_error"


def _remake_row_error(kind: type[RowError], message: str, stage: str) -> RowError:
    """Unpickling calls this: an exception with a keyword argument of its own does not survive the default way."""
    return kind(message, stage=stage)


class TooManyErrorsError(RayMinistralError):
    """More rows failed than `--max-error-rate` allows."""

    exit_status = 3


class ClusterError(RayMinistralError):
    """The cluster failed for good."""

    exit_status = 4


class PlacementError(ClusterError):
    """The cluster has no room for the stages."""


class StageDiedError(ClusterError):
    """A stage actor died, hung, or could not start."""


class StaleStepError(ClusterError):
    """A step of an older generation came to a stage: the driver has given it up."""


class PieceError(ClusterError):
    """A part of the model did not come from one stage to another as it was sent."""


class OutputError(ClusterError):
    """The output cannot be written, often for want of room. The same command goes on once it can."""


class LeaseLostError(ClusterError):
    """Another job has taken over the output folder; this one may commit nothing more."""
