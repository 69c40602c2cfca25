"""The journal on disk: appended whole lines, read back whatever a crash left at its end. Metrics rows likewise."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from cluster.events import (
    ActionTaken,
    AnyEvent,
    Event,
    GenerationPlanned,
    NodeEvicted,
    RunStarted,
    RunStopped,
    SupervisorTookOver,
    VerdictGiven,
)
from trainer.events import StepRecord

Record = TypeVar("Record")

_DURABLE = (RunStarted, SupervisorTookOver, GenerationPlanned, VerdictGiven, ActionTaken, NodeEvicted, RunStopped)


@dataclass(frozen=True)
class Lines(Generic[Record]):
    """What was read: records in order, where to read on (bytes), and how many lines were not understood."""

    records: list[Record]
    offset: int
    skipped: int


class Journal:
    """The supervisor's pen. One writer a file; a line is one write, so readers never see two lines mixed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size_bytes = os.fstat(self._fd).st_size
        self._torn = size_bytes > 0 and os.pread(self._fd, 1, size_bytes - 1) != b"\n"

    def append(self, event: Event) -> None:
        """Write one event; those that a restarted supervisor decides by are on the disk when this returns.

        Raises OSError if the line could not be written whole (a full disk); the next append starts a fresh line.
        """
        line = (b"\n" if self._torn else b"") + msgspec.json.encode(event) + b"\n"
        self._torn = True
        written = os.write(self._fd, line)
        if written != len(line):
            raise OSError(f"{self.path}: wrote {written} of {len(line)} bytes; is the disk full?")
        self._torn = False
        if isinstance(event, _DURABLE):
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read_events(path: Path) -> list[AnyEvent]:
    """Every event of a journal that this version knows, in order; none if there is no file."""
    return tail(path, 0).records


def tail(path: Path, offset: int) -> Lines[AnyEvent]:
    """The events from offset (bytes) on. A line without its end is left for the next call.

    A line cut off by a crash, and kinds of event that a newer version wrote, are skipped and counted.
    """
    return _read_lines(path, offset, msgspec.json.Decoder(AnyEvent).decode)


def read_steps(path: Path) -> list[StepRecord]:
    """Every row of a metrics.jsonl that can be read, in order; none if there is no file."""
    return tail_steps(path, 0).records


def tail_steps(path: Path, offset: int) -> Lines[StepRecord]:
    """The metrics rows from offset (bytes) on, as `tail`."""
    return _read_lines(path, offset, msgspec.json.Decoder(StepRecord).decode)


def _read_lines(path: Path, offset: int, decode: Callable[[bytes], Record]) -> Lines[Record]:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return Lines([], offset, 0)
    whole = data[: data.rfind(b"\n") + 1]
    records, skipped = [], 0
    for line in whole.split(b"\n"):
        if not line.strip():
            continue
        try:
            records.append(decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):
            skipped += 1
    return Lines(records, offset + len(whole), skipped)
