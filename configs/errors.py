"""What is wrong with a configuration, in lines that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import msgspec

from configs.tomltext import toml_value

COMMAND_LINE = "command line"
_SHOWN_CHARS = 80


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong: `section.key`, its value (None: there is none) and what to do about it.

    source: the file, or `command line`; empty while a check does not know where the value came from.
    """

    key: str
    value: object
    message: str
    source: str = ""

    def __str__(self) -> str:
        if not self.key:
            return f"{self.source}: {self.message}"
        hidden = self.value is None or _is_secret(self.key, self.value)
        shown = "" if hidden else _shorten(toml_value(self.value))
        if self.source == COMMAND_LINE:
            return f"{self.source}: --{self.key}{' ' + shown if shown else ''}: {self.message}"
        where = f"{self.source}: " if self.source else ""
        return f"{where}{self.key}{' = ' + shown if shown else ''}: {self.message}"


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is one line for each problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "an error needs at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


def did_you_mean(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate nearest to name, whatever its case, or None when nothing is near."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    near = difflib.get_close_matches(name.casefold(), list(by_folded), n=1, cutoff=0.6)
    return by_folded[near[0]] if near else None


def alternatives(name: str, candidates: Sequence[str], there_are: str = "it can be") -> str:
    """` (it can be x, y, z); did you mean "x"?`: the end of a message about a wrong name."""
    near = did_you_mean(name, candidates)
    hint = f"; did you mean {toml_value(near)}?" if near else "; choose one of them"
    return f" ({there_are} {', '.join(candidates)}){hint}"


def _is_secret(key: str, value: object) -> bool:
    """Whether a value may be a webhook's URL, put where it does not belong: whoever has it can write to the channel."""
    return ("alert" in key.lower() or "webhook" in key.lower()) and "://" in str(value)


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
