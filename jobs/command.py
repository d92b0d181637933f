"""What the command lines share: exit statuses, signals, log lines. Imports nothing heavy."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ray_ministral.errors import RayMinistralError

if TYPE_CHECKING:
    from types import FrameType

USAGE_ERROR = 2
INTERRUPTED = 130


def run_command(
    command: click.Command, arguments: Sequence[str] | None, *, prog_name: str, engine: Callable[[], Any]
) -> int:
    """Run a command line and return its exit status.

    0 done, 2 wrong options, model or input, 3 too many row errors, 4 the cluster failed for good, 130 interrupted. A
    bug keeps its traceback (and Python's status 1). `engine` makes what the command calls once its options are good.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _terminate_as_interrupt():
            status = command.main(args=list(arguments), prog_name=prog_name, standalone_mode=False, obj=engine)
    except RayMinistralError as error:
        _complain(str(error))
        return error.exit_status
    except click.ClickException as error:
        _complain(f"{error.format_message()} (--help lists the options)")
        return USAGE_ERROR
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted; the same command goes on where this one stopped", label="stopped")
        return INTERRUPTED
    except SystemExit as error:
        # `ray.init` puts its own SIGTERM handler in place of ours; it leaves by `sys.exit(SIGTERM)`.
        if error.code != signal.SIGTERM:
            raise
        _complain("terminated; the same command goes on where this one stopped", label="stopped")
        return INTERRUPTED
    return status if isinstance(status, int) else 0


def _complain(message: str, label: str = "error") -> None:
    click.echo(f"{label}: {message}", err=True)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM (`ray job stop`, a batch system's time limit) unwind like Ctrl-C, so that all is cleaned up."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to the stderr of the moment: the live progress bar replaces it, and lines must go above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


def log_to_stderr() -> None:
    """Show what the package logs, one line each."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("ray_ministral")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def let_local_workers_import_us(root: str) -> None:
    """Put the project on PYTHONPATH, which the workers of a cluster that this process starts inherit.

    Ray gives workers the script's folder and the current directory, neither of which need be the one with `actors`.
    """
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, known)])
