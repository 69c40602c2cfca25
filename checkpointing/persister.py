"""The agent's background threads that empty the RAM tier onto disks, and read back what they wrote."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from checkpointing.store import NodeStore, StoreEvent, StoreEventKind


class Persister:
    """Runs a store's persisting and committing in one thread, and its reading back in another.

    `report` gets every event, in the thread it happened in. Slots are looked at every poll_interval_s: the hand-off
    is a byte in shared memory, which nothing can wait on.
    """

    def __init__(self, store: NodeStore, report: Callable[[StoreEvent], None], poll_interval_s: float = 0.05) -> None:
        self.store = store
        self.poll_interval_s = poll_interval_s
        self._loops = (
            _Loop("persister", lambda: [*store.persist_pending(), *store.commit_pending()], report, poll_interval_s),
            _Loop("verifier", store.verify_pending, report, poll_interval_s),
        )

    def start(self) -> Persister:
        """Begin."""
        for loop in self._loops:
            loop.thread.start()
        return self

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits to be persisted, committed or read back.

        False if that took longer or a thread died.
        """
        deadline = time.monotonic() + timeout_s
        targets = [loop.ask() for loop in self._loops]
        while self.store.pending() or any(map(_Loop.behind, self._loops, targets)):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not all(loop.thread.is_alive() for loop in self._loops):
                return False
            self._loops[-1].wait_for_round(min(left_s, self.poll_interval_s))
        return True

    def end(self) -> None:
        """No round after those under way; waits for nothing."""
        for loop in self._loops:
            loop.end()

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End the threads after the shard they are at; False if a stuck file system holds one longer than that."""
        deadline = time.monotonic() + timeout_s
        self.end()
        ended = [loop.join(deadline - time.monotonic()) for loop in self._loops]
        return all(ended)


class _Loop:
    """A thread that does one thing over and over, at once when asked to."""

    def __init__(
        self, name: str, work: Callable[[], Sequence[StoreEvent]], report: Callable[[StoreEvent], None], poll_s: float
    ) -> None:
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.rounds = 0
        self._work = work
        self._report = report
        self._poll_s = poll_s
        self._wanted = threading.Event()
        self._stopping = False
        self._idle = threading.Condition()

    def ask(self) -> int:
        """Have a round begin now; returns the number of rounds after which one has begun and ended since."""
        target = self.rounds + 2  # a round may be under way that looked before this call
        self._wanted.set()
        return target

    def behind(self, target: int) -> bool:
        """Whether it has not done so many rounds yet."""
        return self.rounds < target

    def wait_for_round(self, timeout_s: float) -> None:
        """Until a round ends, or the time is over."""
        with self._idle:
            self._idle.wait(timeout_s)

    def end(self) -> None:
        """No round after this one."""
        self._stopping = True
        self._wanted.set()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended in time."""
        if self.thread.ident is not None:
            self.thread.join(max(0.0, timeout_s))
        return not self.thread.is_alive()

    def _one_round(self) -> Sequence[StoreEvent]:
        """What happened; a defect of ours is said like any failure, and does not end all persisting in silence."""
        try:
            return self._work()
        except Exception as error:  # noqa: BLE001  the thread must outlive it, and it is reported
            detail = f"{self.thread.name} failed unexpectedly: {type(error).__name__}: {error}"
            return [StoreEvent(kind=StoreEventKind.FAILED, step=-1, generation=-1, rank=-1, seconds=0.0, detail=detail)]

    def _run(self) -> None:
        while not self._stopping:
            for event in self._one_round():
                self._report(event)
            with self._idle:
                self.rounds += 1
                self._idle.notify_all()
            self._wanted.wait(self._poll_s)
            self._wanted.clear()
