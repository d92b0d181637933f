"""The README tells the truth: its file tree, its options, its columns, its links and its make targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import click
import pytest

from jobs.caption import command
from jobs.train import command as train_command
from ray_ministral.config import DEFAULT_PROMPT
from ray_ministral.driver.summary import CaptionSummary
from ray_ministral.errors import RowError

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()

# Every module of these must stand in the tree; of other folders the folder alone is enough.
EXPLAINED = ("ray_ministral", "actors", "jobs")


def section(title: str, text: str = README) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"the README has no section {title!r}"
    return found.group(1)


@dataclass(frozen=True)
class Entry:
    path: str  # folders end with a slash
    purpose: str


def tree(text: str) -> Iterator[Entry]:
    """The entries of a file tree that is indented by two spaces a level."""
    block = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert block, "no file tree"
    above: list[str] = []
    for line in block.group(1).splitlines():
        match = re.fullmatch(r"( *)(\S+)(?: {2,}(.*))?", line)
        assert match, f"not a line of a tree: {line!r}"
        depth = len(match.group(1)) // 2
        above = [*above[:depth], match.group(2)]
        yield Entry("".join(above), match.group(3) or "")


def mistakes(entries: list[Entry], root: Path) -> list[str]:
    """What the tree has and the folders have not, and the other way round."""
    listed = {entry.path for entry in entries}
    found = [f"{entry.path} has no purpose" for entry in entries if not entry.purpose]
    for path in sorted(listed):
        there = root / path
        if not (there.is_dir() if path.endswith("/") else there.is_file()):
            found.append(f"{path} is in the tree, but not there")
    for top in EXPLAINED:
        for source in sorted((root / top).rglob("*.py")):
            relative = source.relative_to(root).as_posix()
            named = source.parent.relative_to(root).as_posix() + "/" if source.name == "__init__.py" else relative
            if named not in listed:
                found.append(f"{named} is there, but not in the tree")
    return found


def test_the_file_tree_is_true() -> None:
    found = mistakes(list(tree(section("What lies where"))), ROOT)
    assert not found, "\n".join(found)


def test_a_wrong_file_tree_is_seen(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "__init__.py"):
        (tmp_path / "jobs").mkdir(exist_ok=True)
        (tmp_path / "jobs" / name).touch()
    text = "```text\njobs/     jobs\n  a.py\n  c.py    gone\n```"
    assert mistakes(list(tree(text)), tmp_path) == [
        "jobs/a.py has no purpose",
        "jobs/c.py is in the tree, but not there",
        "jobs/b.py is there, but not in the tree",
    ]


def test_every_folder_of_the_project_is_in_the_tree() -> None:
    listed = {entry.path for entry in tree(section("What lies where"))}
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").read_text().splitlines()}
    folders = {
        f"{path.name}/"
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name not in ignored
        # Build leftovers such as *.egg-info.
        if not any(path.match(pattern) for pattern in ignored)
    }
    assert folders <= listed


@dataclass(frozen=True)
class Row:
    option: str
    metavar: str
    default: str


def option_rows() -> list[Row]:
    cells = re.findall(r"^\| `(--[a-z-]+)(?: ([A-Z]+))?` \|(.*?)\| .+ \|$", section("Options"), re.MULTILINE)
    return [Row(option, metavar, default.strip(" `")) for option, metavar, default in cells]


def click_options() -> dict[str, click.Option]:
    options = [*command.params, command.get_help_option(click.Context(command))]
    found = {}
    for option in options:
        assert isinstance(option, click.Option)
        found[max(option.opts, key=len)] = option
    return found


def test_the_readme_has_every_option_once_and_no_other() -> None:
    names = [row.option for row in option_rows()]
    assert len(names) == len(set(names))
    assert set(names) == set(click_options())


@pytest.mark.parametrize("row", option_rows(), ids=lambda row: row.option)
def test_the_readme_has_each_option_as_it_is(row: Row) -> None:
    option = click_options()[row.option]
    assert bool(row.metavar) is not option.is_flag, "an option with a value shows it, a flag has none"
    # What the command is called with when no option is given: None, or nothing, where there is no default.
    default = command.make_context("caption.py", [], resilient_parsing=True).params.get(str(option.name))
    if option.is_flag or (not default and default != 0):
        # Where no value means something, the README says what.
        described = {
            "--prompt": DEFAULT_PROMPT,
            "--threads-per-stage": "cores / stages",
            "--columns": "all but the image",
        }
        assert row.default == described.get(row.option, "")
    else:
        assert row.default == str(default)


def test_the_readme_mentions_no_option_that_does_not_exist() -> None:
    own = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    of_ray = {"--head", "--working-dir", "--generate", "--disable-usage-stats", "--address"}
    assert own - of_ray <= set(click_options()) | options_of_training()


def options_of_training() -> set[str]:
    return {name for option in train_command.params for name in option.opts}


def test_the_section_on_training_mentions_every_option_of_training() -> None:
    own = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", section("Fine-tuning")))
    assert own - {"--help"} == options_of_training() - {"--version"}


def test_the_options_of_training_have_their_defaults() -> None:
    cells = re.findall(r"^\| `(--[a-z0-9-]+)(?: [A-Z]+)?` \|(.*?)\| .*\|$", section("Fine-tuning"), re.MULTILINE)
    assert len(cells) > 30
    options = {max(option.opts, key=len): option for option in train_command.params}
    values = train_command.make_context("train.py", [], resilient_parsing=True).params
    words = {"--eval-every", "--eval-limit", "--min-stages", "--max-stages", "--lora-alpha", "--checkpoint-every"}
    for name, shown in cells:
        default = values[str(options[name].name)]
        if name not in words:
            assert shown.strip(" `") == (
                "" if default is None or default is False or default == () else str(default)
            ), name


def test_the_output_columns_are_those_that_are_written() -> None:
    from ray_ministral.data.columns import output_columns

    columns = re.findall(r"^\| `([a-z_]+)` \|", section("Output"), re.MULTILINE)
    assert tuple(columns) == output_columns(with_token_ids=True)


def test_the_statuses_and_the_summary_are_named() -> None:
    text = section("Output")
    statuses = {"ok", *(kind.status for kind in RowError.__subclasses__())}
    row = re.search(r"^\| `status` \| (.*) \|$", text, re.MULTILINE)
    assert row
    assert set(re.findall(r"`([a-z_]+)`", row.group(1))) == statuses
    for field in fields(CaptionSummary):
        assert f"`{field.name}`" in text, field.name


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        anchors = {re.sub(r"[^a-z0-9]+", "-", title.lower()) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, (page, target)
            elif "://" not in target:
                assert (page.parent / target.split("#")[0]).exists(), (page, target)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(re.findall(r"`[^`]+`|```.*?```", README, re.DOTALL))))
    assert named
    assert named <= targets


def test_files_that_the_commands_name_exist() -> None:
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    named = set(re.findall(r"\b((?:jobs|examples)/[\w./-]+|\.ci/\w+)", commands))
    assert {"jobs/caption.py", "examples/pictures.parquet", "examples/model"} <= named
    for path in named:
        assert (ROOT / path).exists(), path
