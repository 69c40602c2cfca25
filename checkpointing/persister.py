"""The agent's background thread that empties the RAM tier into the run directory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from checkpointing.store import NodeStore, StoreEvent, StoreEventKind


class Persister:
    """Runs a store's persisting and committing in one thread; `report` gets every event, in that thread.

    Slots are looked at every poll_interval_s: the hand-off is a byte in shared memory, which nothing can wait on.
    """

    def __init__(self, store: NodeStore, report: Callable[[StoreEvent], None], poll_interval_s: float = 0.05) -> None:
        self.store = store
        self.report = report
        self.poll_interval_s = poll_interval_s
        self._wanted = threading.Event()
        self._stopping = False
        self._idle = threading.Condition()
        self._rounds = 0
        self._pending = False
        self._thread = threading.Thread(target=self._run, name="persister", daemon=True)

    def start(self) -> Persister:
        """Begin."""
        self._thread.start()
        return self

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits to be persisted or committed; False if that took longer or the thread died."""
        deadline = time.monotonic() + timeout_s
        with self._idle:
            target = self._rounds + 2  # a round may be under way that looked before this call
            self._wanted.set()
            while self._rounds < target or self._pending:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._thread.is_alive():
                    return False
                self._idle.wait(min(left_s, self.poll_interval_s))
        return True

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End the thread after the shard it is writing; False if a stuck file system holds it longer than that."""
        self._stopping = True
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _one_round(self) -> list[StoreEvent]:
        """What happened; a defect of ours is said like any failure, and does not end all persisting in silence."""
        try:
            return self.store.persist_pending() + self.store.commit_pending()
        except Exception as error:  # noqa: BLE001  the thread must outlive it, and it is reported
            detail = f"persisting failed unexpectedly: {type(error).__name__}: {error}"
            return [StoreEvent(kind=StoreEventKind.FAILED, step=-1, generation=-1, rank=-1, seconds=0.0, detail=detail)]

    def _run(self) -> None:
        while not self._stopping:
            for event in self._one_round():
                self.report(event)
            with self._idle:
                self._rounds += 1
                self._pending = self.store.pending()
                self._idle.notify_all()
            self._wanted.wait(self.poll_interval_s)
            self._wanted.clear()
