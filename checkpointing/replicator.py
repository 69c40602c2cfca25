"""The agent's thread that sends every snapshot in this node's memory to the peers that keep its copies.

Nothing here ever holds up training for long: a slot that is being sent is only marked as such, a worker waits for the
mark a bounded time, and is let go at once when a peer will not take a copy. Such a peer is left alone for a while, and
nobody waits for it until it has taken a copy again; the others get theirs meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from checkpointing.copies import Located
from checkpointing.ratelimit import RateLimit
from checkpointing.segment import (
    CONTROL_BYTES,
    READABLE,
    Control,
    parse_segment_name,
    read_control,
    read_settled,
    write_held,
    write_settled,
)
from checkpointing.transfer_client import TransferClient, TransferError

_POLL_S = 0.002
_BEHIND_S = 3.0
_FIRST_REST_S = 1.0
_LONGEST_REST_S = 60.0
_BEHIND_S = 3.0
_THREADS = 8
_NO_AGE = (-1, -1)


class CopyEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The copies fell behind (detail says why) or caught up again; said once each time."""

    behind: bool
    step: int
    generation: int
    rank: int
    detail: str


class _Rest(msgspec.Struct, frozen=True):
    """Until when (monotonic seconds) a peer that did not take a rank's copy is left alone, and how long that is."""

    until_s: float
    rest_s: float


class Replicator:
    """Sends the newest whole snapshot of each local rank to `send_to`'s addresses.

    interval_steps: only steps that it divides are sent (0: all). report gets events, in this object's thread.
    """

    def __init__(
        self, ram_dir: Path, key: bytes, interval_steps: int, limit: RateLimit | None,
        report: Callable[[CopyEvent], None],
    ) -> None:  # fmt: skip
        self.ram_dir = ram_dir
        self.key = key
        self.interval_steps = interval_steps
        self.limit = limit
        self.report = report
        self._targets: tuple[str, ...] = ()
        self._targets_lock = threading.Lock()
        self._sent: dict[int, tuple[tuple[int, int], frozenset[str]]] = {}
        self._resting: dict[tuple[int, str], _Rest] = {}
        self._begun = (_NO_AGE, 0)
        self._behind = False
        self._failing_since_s = 0.0
        self._stop = threading.Event()
        self._local = threading.local()
        self._clients: list[TransferClient] = []
        self._thread = threading.Thread(target=self._run, name="replicator", daemon=True)

    def send_to(self, addresses: Sequence[str]) -> None:
        """Who keeps the copies from now on; the newest snapshot is sent to whoever is new, and waited for again."""
        targets = tuple(addresses)
        if targets == self._targets:
            return
        with self._targets_lock:
            self._targets = targets
            with contextlib.suppress(OSError):  # the caller has a heartbeat to keep; a step may then not be waited for
                for _, path, _ in self._newest():
                    with _opened(path) as fd:
                        write_settled(fd, _NO_AGE)

    def go_on_from(self, base: tuple[int, int], generation: int) -> None:
        """A generation begins with the snapshot of age `base`: what older ones had beyond it is not sent any more."""
        self._begun = (base, generation)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> None:
        """Send nothing more: what is under way is cut off, and waited for by nobody."""
        self._stop.set()

    def stop(self) -> None:
        """End; what is being sent is cut off."""
        self.end()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="replicate") as pool:
            while not self._stop.wait(_POLL_S):
                try:
                    self._round(pool)
                except OSError as error:  # of this node's own files: too many are open, say
                    self._say([CopyEvent(behind=True, step=-1, generation=-1, rank=-1, detail=str(error))])
        for client in self._clients:
            client.close()

    def _round(self, pool: ThreadPoolExecutor) -> None:
        targets, due = self._targets, []
        for local_rank, path, control in self._newest():
            if self.interval_steps and control.step % self.interval_steps:
                continue
            lacking = self._lacking(local_rank, control, targets)
            if lacking:
                due.append((local_rank, path, control, targets, lacking))
            else:
                self._settle(path, control, targets)
        if due:
            events = pool.map(lambda work: self._send(*work), due)
            self._say([event for event in events if event is not None])

    def _newest(self) -> list[tuple[int, Path, Control]]:
        """(local rank, slot, control) of each local rank's newest whole snapshot that was not given up."""
        base, generation = self._begun
        found: dict[int, tuple[Path, Control]] = {}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.ram_dir):
                parsed = parse_segment_name(name)
                control = None if parsed is None or name.endswith(".tmp") else _control(self.ram_dir / name)
                if parsed is None or control is None or (control.generation < generation and control.age > base):
                    continue
                known = found.get(parsed[0])
                if known is None or known[1].age < control.age:
                    found[parsed[0]] = (self.ram_dir / name, control)
        return [(local_rank, path, control) for local_rank, (path, control) in found.items()]

    def _lacking(self, local_rank: int, control: Control, targets: Sequence[str]) -> list[str]:
        """Who is to get this snapshot now: all that have not got it, but for those that rest."""
        age, having = self._sent.get(local_rank, (_NO_AGE, frozenset[str]()))
        now_s = time.monotonic()
        return [
            address
            for address in targets
            if not (age == control.age and address in having)
            and not ((rest := self._resting.get((local_rank, address))) is not None and now_s < rest.until_s)
        ]

    def _send(
        self, local_rank: int, path: Path, control: Control, targets: tuple[str, ...], lacking: Sequence[str]
    ) -> CopyEvent | None:
        """One shard to those who lack it; None if a newer one overtook it, which says nothing about the peers.

        If one peer cannot take it the others still get it, nobody waits for that one, and it is tried again.
        """
        problems: list[str] = []
        with contextlib.suppress(FileNotFoundError), _opened(path) as fd:
            write_held(fd, True)
            try:
                for address in lacking:
                    if problem := self._push(local_rank, address, path, control):
                        problems.append(problem)
            finally:
                write_held(fd, False)
            if _control(path) != control:
                return None
            self._settle(path, control, targets)
        return CopyEvent(
            behind=bool(problems), step=control.step, generation=control.generation, rank=control.rank,
            detail="; ".join(problems),
        )  # fmt: skip

    def _push(self, local_rank: int, address: str, path: Path, control: Control) -> str:
        """Send to one peer; returns what went wrong, in words."""
        try:
            self._client().push(address, Located(path=path, start_bytes=CONTROL_BYTES, control=control))
        except TransferError as error:
            if _control(path) == control:  # else it was overtaken, and the peer is not to blame
                before = self._resting.get((local_rank, address))
                rest_s = _FIRST_REST_S if before is None else min(2 * before.rest_s, _LONGEST_REST_S)
                self._resting[local_rank, address] = _Rest(time.monotonic() + rest_s, rest_s)
            return str(error)
        self._resting.pop((local_rank, address), None)
        age, having = self._sent.get(local_rank, (_NO_AGE, frozenset[str]()))
        self._sent[local_rank] = (control.age, having | {address} if age == control.age else frozenset({address}))
        return ""

    def _settle(self, path: Path, control: Control, targets: tuple[str, ...]) -> None:
        """Let the worker go on, unless others keep the copies by now."""
        with self._targets_lock, contextlib.suppress(FileNotFoundError), _opened(path) as fd:
            if targets == self._targets and read_settled(os.pread(fd, CONTROL_BYTES, 0)) != control.age:
                write_settled(fd, control.age)

    def _say(self, events: Sequence[CopyEvent]) -> None:
        if not events:
            return
        event = next((each for each in events if each.behind), events[-1])
        failing = event.behind or any(address in self._targets for _, address in list(self._resting))
        now_s = time.monotonic()
        self._failing_since_s = (self._failing_since_s or now_s) if failing else 0.0
        # A peer that has just died is news of its own; only if nobody takes its place is this worth saying.
        worth_saying = event.behind and now_s - self._failing_since_s >= _BEHIND_S if failing else True
        if failing != self._behind and worth_saying:
            self._behind = failing
            self.report(event)

    def _client(self) -> TransferClient:
        client: TransferClient | None = getattr(self._local, "client", None)
        if client is None:
            client = TransferClient(self.key, self.limit, stop=self._stop.is_set)
            self._local.client = client
            self._clients.append(client)
        return client


def _control(path: Path) -> Control | None:
    """What a slot holds whole, None if nothing."""
    with contextlib.suppress(FileNotFoundError), _opened(path) as fd:
        state, control = read_control(fd)
        return control if state in READABLE else None
    return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)
