"""The agent's thread that sends every snapshot in this node's memory to the peers that keep its copies.

Nothing here ever holds up training for long: a slot that is being sent is only marked as such, a worker waits for the
mark a bounded time, and is let go at once when a peer will not take a copy.
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
    write_held,
    write_settled,
)
from checkpointing.transfer_client import TransferClient, TransferError

_POLL_S = 0.002
_RETRY_S = 1.0
_BEHIND_S = 3.0
_THREADS = 8


class CopyEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The copies fell behind (detail says why) or caught up again; said once each time."""

    behind: bool
    step: int
    generation: int
    rank: int
    detail: str


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
        self._sent: dict[int, tuple[tuple[int, int], tuple[str, ...]]] = {}
        self._behind = False
        self._retry_at_s = 0.0
        self._failing_since_s = 0.0
        self._stop = threading.Event()
        self._local = threading.local()
        self._clients: list[TransferClient] = []
        self._thread = threading.Thread(target=self._run, name="replicator", daemon=True)

    def send_to(self, addresses: Sequence[str]) -> None:
        """Who keeps the copies from now on; the newest snapshot is sent to whoever is new."""
        if tuple(addresses) != self._targets:
            self._targets, self._retry_at_s = tuple(addresses), 0.0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; what is being sent is cut off."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="replicate") as pool:
            while not self._stop.wait(_POLL_S):
                due = [work for work in self._newest() if self._is_due(*work)]
                if time.monotonic() < self._retry_at_s:
                    for work in due:
                        self._let_go(*work)
                elif due:
                    events = pool.map(lambda work: self._send(*work), due)
                    self._say([event for event in events if event is not None])
        for client in self._clients:
            client.close()

    def _newest(self) -> list[tuple[int, Path, Control]]:
        """(local rank, slot, control) of each local rank's newest whole snapshot."""
        found: dict[int, tuple[Path, Control]] = {}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.ram_dir):
                parsed = parse_segment_name(name)
                control = None if parsed is None or name.endswith(".tmp") else _control(self.ram_dir / name)
                if parsed is None or control is None:
                    continue
                known = found.get(parsed[0])
                if known is None or known[1].age < control.age:
                    found[parsed[0]] = (self.ram_dir / name, control)
        return [(local_rank, path, control) for local_rank, (path, control) in found.items()]

    def _is_due(self, local_rank: int, path: Path, control: Control) -> bool:
        if not self._targets or (self.interval_steps and control.step % self.interval_steps):
            return False
        return self._sent.get(local_rank) != (control.age, self._targets)

    def _let_go(self, _local_rank: int, path: Path, control: Control) -> None:
        """Have nobody wait for copies that are not even tried now."""
        with contextlib.suppress(FileNotFoundError), _opened(path) as fd:
            write_settled(fd, control.age)

    def _send(self, local_rank: int, path: Path, control: Control) -> CopyEvent | None:
        """One shard to all who keep it; None if it was overtaken by a newer one, which says nothing about the peers.

        If one peer cannot take it the others still get it, nobody waits for that one, and it is tried again.
        """
        targets, problems = self._targets, []
        with contextlib.suppress(FileNotFoundError), _opened(path) as fd:
            write_held(fd, True)
            try:
                for address in targets:
                    problems += self._push(address, path, control)
            finally:
                write_held(fd, False)
            if _control(path) != control:
                return None
            write_settled(fd, control.age)
            if not problems:
                self._sent[local_rank] = (control.age, targets)
        return CopyEvent(
            behind=bool(problems), step=control.step, generation=control.generation, rank=control.rank,
            detail="; ".join(problems),
        )  # fmt: skip

    def _push(self, address: str, path: Path, control: Control) -> list[str]:
        try:
            self._client().push(address, Located(path=path, start_bytes=CONTROL_BYTES, control=control))
        except TransferError as error:
            return [str(error)]
        return []

    def _say(self, events: Sequence[CopyEvent]) -> None:
        if not events:
            return
        event = next((each for each in events if each.behind), events[-1])
        now = time.monotonic()
        if event.behind:
            self._retry_at_s = now + _RETRY_S
            self._failing_since_s = self._failing_since_s or now
        else:
            self._failing_since_s = 0.0
        # A peer that has just died is news of its own; only if nobody takes its place is this worth saying.
        worth_saying = not event.behind or now - self._failing_since_s >= _BEHIND_S
        if event.behind != self._behind and worth_saying:
            self._behind = event.behind
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
