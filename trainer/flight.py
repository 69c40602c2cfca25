"""What a worker's witness writes about its process groups: the border between it and whoever judges. No torch here."""

from __future__ import annotations

from pathlib import Path

import msgspec


class GroupRanks(msgspec.Struct, frozen=True):
    """A process group that the rank belongs to: torch's name for it, what it is for, and its global ranks in order."""

    name: str
    about: str
    ranks: tuple[int, ...]


class PeerOp(msgspec.Struct, frozen=True):
    """A send to, or a receipt from, one peer (a global rank).

    number counts, from 1, those in this direction with this peer in this group. over: it was waited for.
    """

    group: str
    sends: bool
    peer: int
    number: int
    over: bool
    sizes: tuple[int, ...] = ()


class FlightFile(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one request: torch's own dumps, what they lack, and the Python stacks of all threads."""

    request: int
    rank: int
    groups: tuple[GroupRanks, ...]
    peer_ops: tuple[PeerOp, ...] = ()
    dumps: tuple[msgspec.Raw, ...] = ()
    stacks: str = ""
    problem: str = ""


def stacks_path(ram_dir: Path, local_rank: int) -> Path:
    """Python stacks that faulthandler appends on SIGUSR2, for processes whose witness cannot answer."""
    return ram_dir / f"stacks-{local_rank}.txt"


def flight_path(ram_dir: Path, local_rank: int) -> Path:
    """The newest `FlightFile`, as JSON."""
    return ram_dir / f"flight-{local_rank}.json"


def request_path(ram_dir: Path, local_rank: int) -> Path:
    """The named pipe that takes requests: a number and a newline each."""
    return ram_dir / f"witness-{local_rank}"
