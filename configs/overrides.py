"""`--section.key value` and `--section.key=value`, on top of a file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Literal, get_origin

from configs.decode import expected, field_type, plain_type, unknown_key
from configs.errors import COMMAND_LINE, Problem


def parse_overrides(arguments: Sequence[str]) -> tuple[dict[str, object], list[Problem]]:
    """The values by `section.key` (of equal keys the last wins), and what is wrong with the arguments.

    A value is a TOML literal; what is none is plain text, and so is everything given to a key that holds text.
    A boolean key without a value means true.
    """
    values: dict[str, object] = {}
    problems: list[Problem] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            problems.append(_problem("", None, f"{argument!r} is not an option; write --section.key value"))
            continue
        key, equals, text = argument[2:].partition("=")
        has_value = bool(equals)
        if not has_value and rest and not rest[0].startswith("--"):
            text, has_value = rest.pop(0), True
        declared = field_type(key)
        if declared is None:
            problems.append(_problem(key, text if has_value else None, unknown_key(key)))
        elif has_value:
            if _is_unicode(text):
                values[key] = _parse_value(key, text)
            else:
                problems.append(_problem(key, None, "the value is not valid UTF-8; retype it"))
        elif declared is bool:
            values[key] = True
        else:
            problems.append(_problem(key, None, f"the value is missing; give {expected(declared)}"))
    return values, problems


def apply_overrides(table: dict[str, object], values: dict[str, object]) -> dict[str, object]:
    """A copy of the table with the values in place; a section that is no table in the file is left for decoding."""
    merged = {name: dict(section) if isinstance(section, dict) else section for name, section in table.items()}
    for key, value in values.items():
        section, _, name = key.partition(".")
        target = merged.setdefault(section, {})
        if isinstance(target, dict):
            target[name] = value
    return merged


def _parse_value(key: str, text: str) -> object:
    base = plain_type(field_type(key))
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (
        ValueError,
        RecursionError,
    ):  # TOML's own error is a ValueError; the others are numbers or nestings too long
        return _plain_number(text) if base is float else text
    holds_text = base is str or get_origin(base) is Literal
    if set(parsed) != {"value"} or (holds_text and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def _plain_number(text: str) -> float | str:
    """Numbers that people write and TOML does not know, such as `.5`."""
    try:
        return float(text)
    except ValueError:
        return text


def _is_unicode(text: str) -> bool:
    """False for bytes of the command line that were no UTF-8 (Python keeps them as lone surrogates)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _problem(key: str, value: object, message: str) -> Problem:
    return Problem(key, value, message, COMMAND_LINE)
