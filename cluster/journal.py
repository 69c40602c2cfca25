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
from cluster.rundir import GARBLED
from trainer.events import LineFile, StepRecord

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
        path.touch()
        self._file = LineFile(path)

    def append(self, event: Event) -> OSError | None:
        """Write one event; those that a restarted supervisor decides by are on the disk when this returns.

        On a full disk the event waits in memory and the reason is returned: training does not end because its story
        cannot be written, but a supervisor that dies before there is room leaves a gap. Shared storage often says only
        at fsync that it has no room; then the event may or may not be kept.
        """
        problem = self._file.keep(event)
        if problem is None and isinstance(event, _DURABLE):
            try:
                with self.path.open("rb") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                return error
        return problem


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
        except GARBLED:
            skipped += 1
    return Lines(records, offset + len(whole), skipped)
