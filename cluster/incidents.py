"""The folder of an incident: the verdict, the evidence behind it, and later what it cost."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from cluster.ledger import IncidentCost
from health.verdict import Verdict

VERDICT_FILE = "verdict.json"
VERDICTS_FILE = "verdicts.json"
COST_FILE = "cost.json"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_NAME = 120


def write_incident(
    run_dir: Path, number: int, verdict: Verdict, verdicts: Sequence[Verdict], files: Mapping[str, bytes]
) -> Path:
    """Write `incidents/<number>/`: verdict.json (the root), verdicts.json (all that came together) and the evidence
    files, whose names are made safe.

    Writing the same incident again (a supervisor that took over) replaces its files. Returns the folder. Raises
    OSError if it cannot be written.
    """
    folder = _folder(run_dir, number)
    folder.mkdir(parents=True, exist_ok=True)
    taken = {VERDICT_FILE, VERDICTS_FILE, COST_FILE}
    for name in sorted(files):
        safe = _free(safe_name(name), taken)
        taken.add(safe)
        write_whole(folder / safe, files[name])
    write_whole(folder / VERDICTS_FILE, _pretty(list(verdicts)))
    write_whole(folder / VERDICT_FILE, _pretty(verdict))
    return folder


def write_cost(run_dir: Path, cost: IncidentCost) -> Path:
    """Write `incidents/<number>/cost.json`, once the run has recovered or ended."""
    path = _folder(run_dir, cost.incident) / COST_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _pretty(cost))
    return path


def safe_name(name: str) -> str:
    """A file name made of letters, digits, dot, dash and underscore that stays in its folder and is not hidden."""
    return _UNSAFE.sub("_", name).lstrip(".")[-_LONGEST_NAME:].lstrip(".") or "unnamed"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _pretty(record: msgspec.Struct | list[Verdict]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record)) + b"\n"


def _folder(run_dir: Path, number: int) -> Path:
    return run_dir / "incidents" / str(number)


def _free(name: str, taken: set[str]) -> str:
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{count}-{name}"
    return free
