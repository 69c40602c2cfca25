"""Writes the small part of TOML that a configuration needs; reading is the standard library's."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Mapping

import msgspec

from configs.schema import JobConfig

_COMMENT_WIDTH = 100


def toml_value(value: object) -> str:
    """A scalar, list or table as one TOML value on one line; anything else as its plain text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, msgspec.Struct):
        return toml_value(msgspec.structs.asdict(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return str(value)


def resolve_toml(config: JobConfig) -> str:
    """The whole configuration, defaults included, as commented TOML that loads back to an equal JobConfig."""
    blocks = []
    for section in msgspec.structs.fields(JobConfig):
        values = getattr(config, section.name)
        lines = [*_comment(type(values)), f"[{section.name}]"]
        tables: list[str] = []
        for key, value in msgspec.structs.asdict(values).items():
            if _is_table_array(value):
                for item in value:
                    tables += ["", f"[[{section.name}.{key}]]", *_pairs(item)]
            else:
                lines.append(f"{key} = {toml_value(value)}")
        blocks.append("\n".join(lines + tables))
    return "\n\n".join(blocks) + "\n"


def _pairs(table: msgspec.Struct) -> list[str]:
    return [f"{key} = {toml_value(value)}" for key, value in msgspec.structs.asdict(table).items()]


def _is_table_array(value: object) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(isinstance(item, msgspec.Struct) for item in value)


def _comment(section: type) -> list[str]:
    """The docstring of a section as comment lines; none when Python runs without docstrings."""
    doc = inspect.cleandoc(section.__doc__ or "")
    text = " ".join(re.sub(r"^`\[\w+\]`:\s*", "", doc).split())
    return [f"# {line}" for line in textwrap.wrap(text, _COMMENT_WIDTH, break_long_words=False)]
