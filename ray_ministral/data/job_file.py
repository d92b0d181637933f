"""`_job.json`, an output folder's record of the job that began it: written, read, compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ray_ministral.data.files import Location
from ray_ministral.errors import ConfigError

JOB_FILE = "_job.json"

SHOWN_DIFFERENCES = 8
_SHOWN_VALUE = 120


def refuse_another_job(folder: Location, fingerprint: Mapping[str, Any]) -> None:
    """Raises ConfigError, with the differences key by key, where a job with another fingerprint began the folder."""
    began = read_json(folder.child(JOB_FILE))
    now = json.loads(json_bytes(fingerprint))
    differences = list(_differences(began, now, ""))
    if not differences:
        return
    shown = "; ".join(differences[:SHOWN_DIFFERENCES])
    more = len(differences) - SHOWN_DIFFERENCES
    raise ConfigError(
        f"--output {folder.name} belongs to another job: {shown}{f'; and {more} more' if more > 0 else ''}: "
        "run the same command to go on with it, or give another --output"
    )


def _differences(began: object, now: object, key: str) -> Iterator[str]:
    """Where two JSON values differ, as `key: before -> now`."""
    if isinstance(began, dict) and isinstance(now, dict):
        for name in sorted(began.keys() | now.keys()):
            below = f"{key}.{name}" if key else str(name)
            if name not in began:
                yield f"{below}: (absent) -> {_short(now[name])}"
            elif name not in now:
                yield f"{below}: {_short(began[name])} -> (absent)"
            else:
                yield from _differences(began[name], now[name], below)
    elif began != now or type(began) is not type(now):
        yield f"{key}: {_short(began)} -> {_short(now)}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_VALUE else f"{text[:_SHOWN_VALUE]}…"


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON for people to read."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(place: Location) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError where it holds none, OSError."""
    try:
        with place.filesystem.open_input_stream(place.path) as stream:
            value = json.loads(stream.read())
    except ValueError as error:
        raise ConfigError(f"{place.name} is not JSON ({error}): give another --output") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{place.name} holds no JSON object: give another --output")
    return value
