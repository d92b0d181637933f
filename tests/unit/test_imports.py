"""Imports point one way, and the light parts stay light. Read from the sources, so that lazy imports count as well."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Room -> the rooms of the project that it may import. `jobs -> actors -> ray_ministral`; inside,
# `driver -> captioning, training -> pipeline, data -> model -> config, errors`.
BASE = {"config", "errors"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "model": BASE,
    "pipeline": BASE | {"model"},
    "data": BASE | {"model"},
    "captioning": BASE | {"model", "pipeline", "data"},
    "training": BASE | {"model", "pipeline", "data"},
    "driver": BASE | {"model", "pipeline", "data", "captioning", "training"},
    # The package itself hands out the public names of its rooms, lazily.
    "ray_ministral": BASE | {"model", "driver"},
    "actors": BASE | {"model", "pipeline", "data", "captioning", "training", "driver", "ray_ministral"},
    "jobs": BASE | {"driver", "actors", "ray_ministral"},
}
# Library -> the only rooms that may import it.
RESERVED = {
    "ray": {"driver", "actors", "jobs"},
    "click": {"jobs"},
    "megatron": {"model"},
}


def room_of(module: str) -> str | None:
    """The room of a dotted module name; None for other people's modules."""
    parts = module.split(".")
    if parts[0] == "ray_ministral":
        return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "ray_ministral"
    return parts[0] if parts[0] in {"actors", "jobs"} else None


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str) -> set[str]:
    """Every module that a source names in an import, at the top or inside a function, `TYPE_CHECKING` included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction: write the whole name"
            base = node.module or ""
            # `from ray_ministral import config` names the room config; `from x import Name` names x all the same.
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def complaints(module: str, source: str) -> list[str]:
    """What this module imports and must not."""
    room = room_of(module)
    assert room is not None, module
    found = []
    for name in sorted(imports_of(source)):
        top = name.split(".")[0]
        if top in RESERVED and room not in RESERVED[top]:
            found.append(f"{module} ({room}) imports {name}: only {sorted(RESERVED[top])} may")
        target = None if name == "ray_ministral.__version__" else room_of(name)
        if target is not None and target != room and target not in ALLOWED[room]:
            found.append(f"{module} ({room}) imports {name} ({target}): it may import {sorted(ALLOWED[room])}")
    return found


def sources() -> list[Path]:
    return sorted(path for top in ("ray_ministral", "actors", "jobs") for path in (ROOT / top).rglob("*.py"))


def test_imports_point_one_way() -> None:
    found = [line for path in sources() for line in complaints(module_of(path), path.read_text())]
    assert not found, "\n".join(found)


def test_every_file_of_the_package_lies_in_a_room() -> None:
    """A new folder has no directions until somebody gives it some."""
    lost = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.is_relative_to(ROOT / "ray_ministral")
        and len(module_of(path).split(".")) > 1
        and module_of(path).split(".")[1] not in ALLOWED
    ]
    assert not lost, lost
    # And the glob above does find sources.
    assert len(sources()) > 5


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ray_ministral.model.language", "import ray"),
        ("ray_ministral.data.shards", "def f():\n    from ray.util import queue"),
        ("ray_ministral.pipeline.stage", "from megatron.core import parallel_state"),
        ("ray_ministral.driver.captioner", "import click"),
        ("ray_ministral.config", "from ray_ministral.data.shards import Shard"),
        ("ray_ministral.model.language", "from ray_ministral import pipeline"),
        ("ray_ministral.data.shards", "from ray_ministral.captioning.request import RowResult"),
        ("ray_ministral.driver.captioner", "from actors import StageActor"),
        ("ray_ministral.driver.captioner", "from ray_ministral import caption"),
        ("actors.stage", "import jobs.caption"),
    ],
)
def test_a_wrong_direction_is_seen(module: str, source: str) -> None:
    assert complaints(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ray_ministral.driver.captioner", "import ray\nfrom ray_ministral.captioning import request"),
        ("ray_ministral.model.language", "from megatron.core.models.gpt import GPTModel"),
        ("ray_ministral.data.ledger", "from ray_ministral import __version__"),
        ("jobs.caption", "import click, actors\nfrom ray_ministral import __version__"),
    ],
)
def test_a_right_direction_is_let_through(module: str, source: str) -> None:
    assert not complaints(module, source)


def loaded_by(*program: str) -> set[str]:
    """The top-level modules that are loaded when `program`, arguments of Python, has run."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


HEAVY = {"torch", "ray", "transformers", "megatron", "pyarrow", "numpy"}


def test_the_instrument_sees_heavy_imports() -> None:
    assert "numpy" in loaded_by("-c", "import numpy")


@pytest.mark.parametrize("module", ["ray_ministral", "ray_ministral.config", "ray_ministral.errors"])
def test_the_config_is_light(module: str) -> None:
    assert not loaded_by("-c", f"import {module}") & HEAVY


# They run in the driver, or in the workers that read and write rows, where nobody computes.
WITHOUT_TORCH = [
    "ray_ministral.data.shards",
    "ray_ministral.data.parquet",
    "ray_ministral.data.ledger",
    "ray_ministral.data.row_reader",
    "ray_ministral.captioning.prompts",
    "ray_ministral.captioning.request",
    "ray_ministral.training.order",
    "ray_ministral.training.packing",
    "ray_ministral.training.samples",
    "ray_ministral.training.checkpoint",
    "ray_ministral.pipeline.generators",
    *(module_of(path) for path in sorted((ROOT / "ray_ministral" / "driver").glob("*.py"))),
]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_driver_and_its_data_import_without_torch(module: str) -> None:
    assert not loaded_by("-c", f"import {module}") & {"torch", "megatron"}


@pytest.mark.parametrize("program", [("jobs/caption.py",), ("-m", "jobs.caption"), ("jobs/train.py",)])
def test_help_is_light_and_quick(program: tuple[str, ...]) -> None:
    assert not loaded_by(*program, "--help") & HEAVY
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, timeout=60, check=True)
        seconds.append(time.perf_counter() - start)
    # A tenth of a second on a quiet machine; the bound is for a busy one, and below what importing Ray or torch takes.
    assert min(seconds) < 2.0, seconds


def test_public_names_come_from_where_they_live() -> None:
    import ray_ministral

    for name, home in ray_ministral._HOMES.items():
        source = ROOT / Path(*home.split(".")).with_suffix(".py")
        defined = {
            node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        assert name in defined, f"{home} defines no {name}"
        assert name in ray_ministral.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    import ray_ministral

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ray_ministral.nothing
    assert "CaptionConfig" in dir(ray_ministral)
