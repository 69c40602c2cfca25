"""Writes docs/configuration.md: `python docs/generate_configuration.py`, from the repository's root.

Sections, keys, types, bounds, defaults and what a resume may change come from the code; words for a person come from
docs/configuration_keys.toml. A key that only one of them has is an error.
"""

from __future__ import annotations

import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from configs.changes import resume_rule
from configs.decode import expected
from configs.load import preset_paths
from configs.schema import DataSet, JobConfig, LeaveOut
from configs.tomltext import toml_value

PAGE = Path(__file__).with_name("configuration.md")
WORDS = Path(__file__).with_name("configuration_keys.toml")
_UNITS = {"_s": "seconds", "_steps": "steps"}
_WIDTH = 120

_HEAD = """\
# Configuration

<!-- Written by docs/generate_configuration.py from the code and docs/configuration_keys.toml: change those. -->

A job is one TOML file of the sections below. `everstep run` and `everstep config` take the path of one, or the name of
a packaged preset: {presets}. Behind it any key can be set with `--section.key value` or `--section.key=value`.
`everstep config` prints the whole resolved configuration, defaults included, as TOML that loads back to the same job.

Unknown sections and keys, values of a wrong type and values that do not fit together are errors (exit code 2). All of
them are said at once, a line each: the file or `command line`, the key, the value, and what to set instead.

*Resume* says whether `everstep run` goes on with an existing run after this key was changed. A refused change needs
another `run.name`. While workers train under a supervisor that died, no change is accepted at all: stop the job first.

`[run]`, `[model]`, `[data]` and `[training]` have keys that must be set; the other sections may be left out.
"""


def page() -> str:
    """The whole page.

    Raises:
        ValueError: a key has no words, or there are words about no key.
    """
    words: dict[str, dict[str, str]] = tomllib.loads(WORDS.read_text(encoding="utf-8"))
    sections = _sections()
    needed = {f"{name}.{key}" for name, section in sections.items() for key in ("about", *_keys(section))}
    if differ := sorted(needed ^ {f"{name}.{key}" for name, section in words.items() for key in section}):
        raise ValueError(f"{WORDS.name} and configs/schema.py do not have the same keys: {', '.join(differ)}")
    presets = ", ".join(f"`{name}`" for name in preset_paths())
    blocks = ["\n\n".join(_wrap(paragraph) for paragraph in _HEAD.format(presets=presets).split("\n\n"))]
    blocks += [_block(name, section, words[name]) for name, section in sections.items()]
    return "\n\n".join(blocks) + "\n"


def _sections() -> Mapping[str, type[msgspec.Struct]]:
    """Struct of every section, by the section's name in TOML."""
    found: dict[str, type[msgspec.Struct]] = {}
    for field in msgspec.structs.fields(JobConfig):
        found[field.name] = field.type
        if field.name == "data":
            found |= {"data.sets": DataSet, "data.leave_out": LeaveOut}
    return found


def _keys(section: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(section)}


def _block(name: str, section: type[msgspec.Struct], words: Mapping[str, str]) -> str:
    title = f"[[{name}]]" if section in (DataSet, LeaveOut) else f"[{name}]"
    lines = [f"## `{title}`", "", words["about"].strip(), ""]
    lines += ["| key | value | unit | default | resume | meaning |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in _rows(name, section, words))])


def _rows(name: str, section: type[msgspec.Struct], words: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for key, field in _keys(section).items():
        unit, bar, meaning = words[key].partition(" | ")
        if not bar:
            unit, meaning = next((unit for end, unit in _UNITS.items() if f"_{key}".endswith(end)), ""), words[key]
        default = "must be set" if field.required else f"`{toml_value(field.default)}`"
        allowed, _ = resume_rule(name if section in (DataSet, LeaveOut) else f"{name}.{key}")
        yield f"`{key}`", _value(field.type), unit, default, "allowed" if allowed else "refused", meaning


def _value(declared: Any) -> str:
    return expected(declared).replace('text in quotes ("...")', "text")


def _wrap(paragraph: str) -> str:
    if paragraph.startswith(("#", "<!--")):
        return paragraph.strip()
    return textwrap.fill(" ".join(paragraph.split()), _WIDTH, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name} written\n")
