"""What an agent collects of a worker that may hang, as files: their names, and how they are read back. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from health.collectives import FlightRecord, decode_record

STOPPED = frozenset("TtZX")
_NAME = re.compile(r"rank-(\d{1,7})\.(stack\.txt|flight\.json|process\.json)")
_FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
_PY_SPY_FRAME = re.compile(r"^\s+(\S+) \(([^():]+):(\d+)\)$")
_LOOKS = "--- look "


class ProcessFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What /proc says of a worker, and how it answered, from two looks that were looked_s apart.

    state: its letter at the second look, R if it was R at either. cpu_s: processor time that all its threads used
    between the looks. runnable: threads that ran or wanted to, at both looks. stack_from: `witness`, `py-spy`,
    `faulthandler` or "". record_moved: whether collectives began or ended between the looks. kernel: where its main
    thread waits in the kernel, as far as that may be read.
    """

    rank: int
    pid: int
    state: str
    cpu_s: float
    looked_s: float
    stack_from: str
    record_moved: bool
    threads: int = 0
    runnable: int = 0
    kernel: str = ""
    problem: str = ""


@dataclass(frozen=True)
class RankEvidence:
    """What is known of one rank; facts None: its agent said nothing of it, record None: the process did not."""

    rank: int
    facts: ProcessFacts | None = None
    record: FlightRecord | None = None
    stack: str = ""

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped, traced or dead."""
        return self.facts is not None and self.facts.state in STOPPED

    @property
    def frames(self) -> tuple[str, ...]:
        """Frames of the main thread at the last look, innermost first, as `function (file:line)`."""
        return main_frames(self.stack.rpartition(_LOOKS)[2])

    @property
    def stack_moved(self) -> bool:
        """Whether the main thread was elsewhere at the first look."""
        looks = [main_frames(look) for look in self.stack.split(_LOOKS) if look.strip()]
        return len(looks) > 1 and looks[0] != looks[-1]


def stack_name(rank: int) -> str:
    """File with a rank's stacks."""
    return f"rank-{rank}.stack.txt"


def flight_name(rank: int) -> str:
    """File with a rank's flight record."""
    return f"rank-{rank}.flight.json"


def facts_name(rank: int) -> str:
    """File with a rank's `ProcessFacts`."""
    return f"rank-{rank}.process.json"


def join_looks(looks: list[str]) -> str:
    """Stacks of several looks as the text of one file, oldest first."""
    return "".join(f"{_LOOKS}{number} ---\n{look}\n" for number, look in enumerate(looks, start=1))


def read_evidence(files: Mapping[str, bytes]) -> dict[int, RankEvidence]:
    """Evidence by rank, from all agents' files together. What is malformed counts as not said."""
    parts: dict[int, dict[str, bytes]] = {}
    for name, data in files.items():
        if found := _NAME.fullmatch(name):
            parts.setdefault(int(found[1]), {})[found[2]] = data
    return {rank: _read_rank(rank, of) for rank, of in sorted(parts.items())}


def main_frames(stack: str) -> tuple[str, ...]:
    """The main thread's frames in what faulthandler or py-spy wrote, innermost first; none if there are none."""
    blocks = re.split(r"\n\s*\n", stack.strip())
    named = [block for block in blocks if '"MainThread"' in block]
    # Faulthandler lists threads newest first: the main thread is the last one.
    chosen = named[0] if named else blocks[-1]
    frames = []
    for line in chosen.splitlines():
        if found := _FRAME.search(line):
            frames.append(f"{found[3]} ({found[1]}:{found[2]})")
        elif found := _PY_SPY_FRAME.match(line):
            frames.append(f"{found[1]} ({found[2]}:{found[3]})")
    return tuple(frames)


def _read_rank(rank: int, parts: Mapping[str, bytes]) -> RankEvidence:
    facts, record = None, None
    if "process.json" in parts:
        facts = _read_facts(parts["process.json"])
    if "flight.json" in parts:
        record = _read_record(parts["flight.json"])
    stack = parts.get("stack.txt", b"").decode(errors="replace")
    right = record if record is not None and record.rank == rank else None
    return RankEvidence(rank, facts if facts is not None and facts.rank == rank else None, right, stack)


def _read_facts(data: bytes) -> ProcessFacts | None:
    try:
        return msgspec.json.decode(data, type=ProcessFacts)
    except msgspec.MsgspecError:
        return None


def _read_record(data: bytes) -> FlightRecord | None:
    try:
        return decode_record(data)
    except msgspec.MsgspecError:
        return None
