"""Reads a job's configuration: a TOML file or packaged preset, overrides, types, cross-field checks.

The only way in for users' input: whatever is wrong comes out as a ConfigError that names it and says the fix.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from configs.changes import Change, describe_changes
from configs.check import check_files, check_job
from configs.decode import decode
from configs.errors import COMMAND_LINE, ConfigError, Problem, alternatives
from configs.overrides import apply_overrides, parse_overrides
from configs.schema import JobConfig
from configs.tomltext import resolve_toml

__all__ = [
    "Change",
    "ConfigError",
    "Problem",
    "check_files",
    "describe_changes",
    "load_job",
    "parse_job",
    "preset_paths",
    "resolve_toml",
]

_HERE = Path(__file__).parent
_WEBHOOK = re.compile(r"https?://\S+")


def load_job(path: Path | str, overrides: Sequence[str] = ()) -> JobConfig:
    """The job that a file, or a packaged preset named without a folder, describes, with overrides applied.

    Raises ConfigError with one line for each problem.
    """
    file = _find(Path(path))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _file_error(file, f"not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise _file_error(file, f"cannot be read: {error.strerror}") from error
    return parse_job(text, str(file), overrides)


def parse_job(text: str, source: str, overrides: Sequence[str] = ()) -> JobConfig:
    """The same from TOML text; source is the name that messages give it. Raises ConfigError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(text, source, error)]) from error
    except (ValueError, RecursionError) as error:
        what = f"this TOML is beyond what can be read ({error}); look for a number or a nesting without end"
        raise ConfigError([Problem("", None, what, source)]) from error
    values, problems = parse_overrides(overrides)
    decoded = decode(apply_overrides(table, values))
    found = decoded if isinstance(decoded, list) else check_job(decoded)
    problems += [_with_source(problem, source, values) for problem in found]
    if problems or isinstance(decoded, list):
        raise ConfigError(problems)
    return decoded


def preset_paths() -> dict[str, Path]:
    """The packaged presets by name, `demo` among them."""
    return {path.stem: path for path in [*sorted(_HERE.glob("*.toml")), *sorted((_HERE / "presets").glob("*.toml"))]}


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    presets = preset_paths()
    if path.name == str(path) and path.name.removesuffix(".toml") in presets:
        return presets[path.name.removesuffix(".toml")]
    if path.is_dir():
        raise _file_error(path, "is a folder; name a .toml file in it")
    choices = alternatives(path.name.removesuffix(".toml"), list(presets), "presets are")
    raise _file_error(path, f"there is no such file or preset{choices}")


def _file_error(path: Path, message: str) -> ConfigError:
    return ConfigError([Problem("", None, message, str(path))])


def _syntax_problem(text: str, source: str, error: tomllib.TOMLDecodeError) -> Problem:
    """Python 3.11 has the position only inside the message: `... (at line 3, column 5)`."""
    reason = re.sub(r" \(at [^()]*\)$", "", str(error))
    position = re.search(r"\(at line (\d+), column (\d+)\)$", str(error))
    lines = text.splitlines() or [""]
    line = int(position[1]) if position else len(lines)
    shown = _WEBHOOK.sub("https://...", lines[min(line, len(lines)) - 1].strip())
    where = f"line {line}, column {position[2]}" if position else f"line {line} (end of the file)"
    fix = 'text needs quotes ("..."), tables a [header], each key one line'
    return Problem("", None, f"{where}: this is not TOML: {reason}: {shown!r}; {fix}", source)


def _with_source(problem: Problem, source: str, overridden: dict[str, object]) -> Problem:
    key = problem.key.partition("[")[0]
    return msgspec.structs.replace(problem, source=COMMAND_LINE if key in overridden else source)
