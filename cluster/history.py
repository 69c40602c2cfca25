"""What all runs of a site remember of nodes: one file of JSON lines, appended under a lock by every supervisor.

Nothing is ever rewritten. Lines that a crash cut off, or that a newer version wrote, are skipped and counted.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.rundir import GARBLED
from configs.schema import JobConfig
from health.verdict import Cause, Certainty, Severity

HISTORY_FILE = "nodes.jsonl"


class NodeId(msgspec.Struct, frozen=True):
    """A node as it is known across runs: the machine's host name, and its name there, which may be the same.

    hardware: identifiers of what cannot be replaced without its becoming another node (UUIDs of GPUs), where known.
    """

    host: str
    name: str
    hardware: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """How a person names it: `host/name`, or `host`."""
        return self.host if self.host == self.name else f"{self.host}/{self.name}"


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="record"):
    """Base: when (seconds since the epoch), and in which run; "" where a person did it."""

    t_wall_s: float
    run: str = ""


class Judged(Entry, frozen=True, kw_only=True, tag="judged"):
    """A verdict spoke against the node."""

    node: NodeId
    incident: int
    cause: Cause
    severity: Severity
    certainty: Certainty
    words: str = ""
    device: str = ""


class Evicted(Entry, frozen=True, kw_only=True, tag="evicted"):
    """The node lost its place. gone: it was lost, rather than judged; certainty: of what was held against it."""

    node: NodeId
    incident: int
    certainty: Certainty
    gone: bool
    reason: str


class Served(Entry, frozen=True, kw_only=True, tag="served"):
    """The nodes were there for so many hours up to this time, with ranks or as spares."""

    nodes: tuple[NodeId, ...]
    hours: float


class Examined(Entry, frozen=True, kw_only=True, tag="examined"):
    """The node was examined while it was idle."""

    node: NodeId
    passed: bool
    reason: str


class Drained(Entry, frozen=True, kw_only=True, tag="drained"):
    """A person wants no more work on the node."""

    node: NodeId
    reason: str
    who: str


class Readmitted(Entry, frozen=True, kw_only=True, tag="readmitted"):
    """A person says that the node is repaired, or was never bad."""

    node: NodeId
    reason: str
    who: str


AnyEntry = Judged | Evicted | Served | Examined | Drained | Readmitted


@dataclass(frozen=True)
class History:
    """The entries that could be read, in the file's order, and how many lines could not."""

    entries: tuple[AnyEntry, ...]
    skipped: int = 0


class HistoryFile:
    """The file; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._encoder = msgspec.json.Encoder()

    def read(self) -> History:
        """Everything in it. Raises OSError if it is there and cannot be read."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return History(())
        decoder = msgspec.json.Decoder(AnyEntry)
        entries, skipped = [], 0
        for line in data.split(b"\n"):
            if not line.strip():
                continue
            try:
                entries.append(decoder.decode(line))
            except GARBLED:
                skipped += 1
        return History(tuple(entries), skipped)

    def append(self, entries: Iterable[AnyEntry]) -> bool:
        """Add entries, durably; False if another process holds the file just now: nobody waits for it here.

        Raises:
            OSError: they could not be written; a part may have been, as a line that readers skip.
        """
        data = b"".join(self._encoder.encode(entry) + b"\n" for entry in entries)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                data = b"\n" + data
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        return True


def history_path(config: JobConfig, runs: Path) -> Path:
    """Where a job's nodes are remembered. runs: the folder that its run directory is in, wherever one looks from."""
    return Path(config.cluster.node_history or runs / HISTORY_FILE).absolute()
