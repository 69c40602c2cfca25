"""Promise: what the pages say can be found: commands, options, targets, files, links, journal lines, the preset."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest

from cluster.cli import Checkpoint, Command, Data, dispatch
from cluster.events import AnyEvent
from configs.load import parse_job
from health.verdict import Cause

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]
OVERRIDDEN = ("run", "submit", "config")


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def code_spans(page: Path) -> list[str]:
    """Everything between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def subcommands(union: object) -> dict[str, type]:
    """Name to class of each command in a union of tyro subcommands."""
    return {each.__metadata__[0].name: each.__origin__ for each in get_args(union)}


def all_commands() -> set[tuple[str, ...]]:
    """Every command that the command line has, as words."""
    found: set[tuple[str, ...]] = set()
    for name, kind in subcommands(Command).items():
        if kind in (Checkpoint, Data):
            found |= {(name, inner) for inner in subcommands(get_type_hints(kind, include_extras=True)["command"])}
        else:
            found.add((name,))
    return found


def said_commands(page: Path) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Every `everstep ...` of a page: the command's words, and the options that follow."""
    lines = [line.partition("#")[0] for block in blocks(page, "sh") for line in block.splitlines()]
    for text in [*code_spans(page), *lines]:
        match = re.match(r"(?:\$ )?everstep ([a-z].*)", text.strip())
        if match:
            words = match[1].split()
            size = 2 if words[0] in ("checkpoint", "data") else 1
            yield tuple(words[:size]), re.findall(r"--[a-z][a-z.-]*", match[1])


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """All anchors of a page."""
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


def test_the_configuration_page_is_up_to_date() -> None:
    """The page is what its generator writes now, and every key of the schema has words."""
    generator = runpy.run_path(str(ROOT / "docs" / "generate_configuration.py"))
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == generator["page"](), "run: python docs/generate_configuration.py"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command that a page names answers --help, and has the options that the page gives it."""
    for words, options in said_commands(page):
        assert words in all_commands(), f"{page.name} names everstep {' '.join(words)}"
        if words[0] in OVERRIDDEN:
            options = [option for option in options if "." not in option]
        with pytest.raises(SystemExit) as left:
            dispatch([*words, "--help"])
        helped = capsys.readouterr().out
        assert left.value.code == 0
        for option in options:
            known = re.search(rf"{option}(?![\w-])", helped)
            assert known, f"{page.name} gives everstep {' '.join(words)} {option}"


def test_the_readme_names_every_command() -> None:
    """None is left out."""
    assert {words for words, _ in said_commands(README)} == all_commands()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_make_targets_exist(page: Path) -> None:
    """Each `make x` is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for rule in re.findall(r"^([a-z][a-z -]*):", makefile, re.MULTILINE) for name in rule.split()}
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    named = {match[1] for text in [*code_spans(page), *lines] if (match := re.match(r"make ([a-z-]+)", text))}
    assert named <= targets, named - targets


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page: Path) -> None:
    """Every link inside the repository leads to a file and a heading that are there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.is_relative_to(ROOT), f"{page.name}: {target} leads out of the repository"
        assert to.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(to), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page: Path) -> None:
    """A source file in backticks is there."""
    paths = [span for span in code_spans(page) if re.fullmatch(r"[\w.]+(?:/[\w.]+)*/[\w.]+\.(?:py|toml|md)", span)]
    missing = [path for path in paths if not (ROOT / path).is_file()]
    assert not missing


def test_journal_lines_can_be_read() -> None:
    """The README's excerpt is a journal of this version."""
    lines = [line for block in blocks(README, "jsonl") for line in block.splitlines()]
    assert [type(msgspec.json.decode(line, type=AnyEvent)).__name__ for line in lines] == [
        "VerdictGiven", "ActionTaken", "NodeEvicted", "GenerationPlanned", *["WorkersReported"] * 4,
    ]  # fmt: skip


def test_the_preset_of_the_readme_is_valid() -> None:
    """It can be copied as it is."""
    (text,) = blocks(README, "toml")
    assert parse_job(text, "README.md").world_size == 4


def test_every_cause_that_is_named_exists() -> None:
    """The causes in the README are causes of verdicts; those that only facts have now are left out."""
    sentence = re.search(r"The causes are (.*?)\. ", README.read_text().replace("\n", " "))
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[1])) == {cause.value for cause in Cause} - {Cause.NONFINITE.value}
