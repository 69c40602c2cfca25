"""What the parts of the control plane's benchmark say to each other: lines of JSON on standard input and output."""

from __future__ import annotations

import resource
from collections.abc import Sequence

import msgspec

INTERVAL_S = 1.0
TIMEOUT_S = 2.1
RANKS = 8
SPARES = 8
FILES_OF_AN_AGENT = 2
FILES_BESIDE = 300


class Silence(msgspec.Struct, frozen=True, tag=True):
    """To the agents: this node says nothing any more, though its connection stays."""

    node: str


class Close(msgspec.Struct, frozen=True, tag=True):
    """To the agents: this node is gone, its connection with it."""

    node: str


class Summarise(msgspec.Struct, frozen=True, tag=True):
    """To the agents: say how long answers took since the last time."""


class Placed(msgspec.Struct, frozen=True, tag=True):
    """From the agents: so many have ranks in this generation by now, the last one since then."""

    generation: int
    count: int
    t_wall_s: float


class Answers(msgspec.Struct, frozen=True, tag=True):
    """From the agents: reports sent and answered since the last time, and the seconds from one to the other, sorted."""

    sent: int
    answered: int
    seconds: tuple[float, ...]
    orders_bytes: int
    reports_bytes: int


class Dead(msgspec.Struct, frozen=True, tag=True):
    """From the agents: since when a node is silent or gone."""

    node: str
    t_wall_s: float


class Listening(msgspec.Struct, frozen=True, tag=True):
    """From the supervisor's process: where it listens."""

    port: int


Command = Silence | Close | Summarise
Said = Placed | Answers | Dead | Listening


def names(agents: int) -> list[str]:
    """The nodes that hold ranks, and the spares."""
    return [f"node{index}" for index in range(agents + SPARES)]


def files_allowed() -> int:
    """How many files a process may have open, if it asks for as many as it may."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def allow_files(wanted: int) -> None:
    """Raise this process' limit of open files. OSError, saying what is needed, if the system's own is lower."""
    wanted += FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
    except (ValueError, PermissionError) as error:
        raise OSError(
            f"{wanted} open files are needed and the limit is {hard} (ulimit -Hn); raise it, or ask for fewer agents: "
            f"{error}"
        ) from error


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which that share of a sorted sample lies."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
