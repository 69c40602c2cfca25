"""The supervisor's lease on its run, and how an agent that hears nothing tells a cut cable from a dead supervisor.

While a supervisor lives, it renews `lease.json` in the run directory. An agent that hears nothing looks there. Nobody
renews it: the supervisor is dead, and training goes on without it. Somebody does: others are heard, this node is not,
and its ranks are being given away, so it must stop by itself. The same if the run directory is gone with the network.

No clocks of two machines are compared: a lease is alive if it changes between two looks, timed by whoever looks.
"""

from __future__ import annotations

import enum
import logging
import math
import os
import secrets
import threading
import time
from pathlib import Path

import msgspec

from cluster import events
from cluster.rundir import GARBLED

RENEW_S = 1.0
PAUSE_S = 4 * RENEW_S
"""A lease that did not change for so long is not renewed any more."""
_READ_TIMEOUT_S = 2.0

logger = logging.getLogger("everstep.lease")


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Who has the run. supervisor: drawn at random by each. renewals: since it began. rounds: how often it has
    listened to agents: one that is stuck hears nobody, and gives no ranks away either. t_wall_s: for people only."""

    supervisor: str
    host: str
    pid: int
    renewals: int
    rounds: int
    t_wall_s: float


class Unreadable(msgspec.Struct, frozen=True):
    """Why the lease could not be read. A file that is not there is None instead: nobody renews it."""

    why: str


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """What looking at the lease has shown, in the looker's monotonic seconds.

    since_s: since when it has been renewed, or could not be read, without a pause; infinity: it is not. last, looked_s:
    the newest that was read and when. changed_s: when it was last seen to change.
    """

    since_s: float = math.inf
    last: Lease | None = None
    looked_s: float = -math.inf
    changed_s: float = -math.inf


class Touch(enum.Enum):
    """How an agent stands with its supervisor."""

    HEARD = "heard"
    ORPHANED = "orphaned"
    CUT_OFF = "cut off"


def look(sight: Sight, found: Lease | Unreadable | None, now_s: float) -> Sight:
    """Take in one more look at the lease."""
    if found is None:
        return Sight()
    if isinstance(found, Unreadable):
        return msgspec.structs.replace(sight, since_s=min(sight.since_s, now_s), changed_s=now_s)
    last, since_s, changed_s = sight.last, sight.since_s, sight.changed_s
    if last is None:
        changed_s = now_s
    elif (found.supervisor, found.rounds) != (last.supervisor, last.rounds):
        since_s, changed_s = min(since_s, sight.looked_s), now_s
    elif now_s - changed_s > PAUSE_S:
        since_s = math.inf
    return Sight(since_s=since_s, last=found, looked_s=now_s, changed_s=changed_s)


def judge(silent_s: float, lease: Sight, now_s: float, timeout_s: float) -> Touch:
    """How an agent stands that has not heard its supervisor for silent_s.

    Cut off: for timeout_s somebody had the lease in hand, or nobody could know, and did not speak to it. That is
    counted from the first look that showed it, not from the beginning of the silence: a supervisor that has just taken
    over gets as long to be heard.
    """
    if silent_s <= timeout_s:
        return Touch.HEARD
    return Touch.CUT_OFF if now_s - lease.since_s > timeout_s else Touch.ORPHANED


def read_lease(path: Path) -> Lease | Unreadable | None:
    """The lease as it is now. May hang where the file system does."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Lease)
    except FileNotFoundError:
        # Only a run directory that can be looked into says that there is no lease.
        return None if path.parent.is_dir() else Unreadable("the run directory is not there")
    except OSError as error:
        return Unreadable(error.strerror or str(error))
    except GARBLED as error:
        return Unreadable(f"damaged: {error}")


class LeaseWatch:
    """The agent's side. To be asked often; looks at the lease only while nothing is heard, and never waits for it.

    timeout_s: see `judge`. look_after_s: how much silence makes it look.
    """

    def __init__(self, path: Path, timeout_s: float, look_after_s: float) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self.look_after_s = look_after_s
        self._sight = Sight()
        self._due_s = -math.inf
        self._asked_s = 0.0
        self._reader: threading.Thread | None = None
        self._found: Lease | Unreadable | None = None

    def cut_off(self, silent_s: float, now_s: float) -> bool:
        """Whether this node must stop by itself. silent_s: since the supervisor was heard; now_s: monotonic."""
        if silent_s <= self.look_after_s:
            self._sight = Sight()
            return False
        self._look(now_s)
        return judge(silent_s, self._sight, now_s, self.timeout_s) is Touch.CUT_OFF

    def _look(self, now_s: float) -> None:
        if self._reader is not None:
            if self._reader.is_alive():
                if now_s - self._asked_s > _READ_TIMEOUT_S:
                    self._sight = look(self._sight, Unreadable("the run directory does not answer"), now_s)
                return
            self._reader = None
            self._sight = look(self._sight, self._found, now_s)
        if now_s >= self._due_s:
            self._due_s, self._asked_s = now_s + RENEW_S, now_s
            self._reader = threading.Thread(target=self._read, name="lease", daemon=True)
            self._reader.start()

    def _read(self) -> None:
        self._found = read_lease(self.path)


class LeaseKeeper:
    """The supervisor's side; a `cluster.watchers.Watcher`, so that it knows whether the supervisor's loop goes round.

    Renews in a thread of its own: neither a busy loop nor a slow file system makes the other wait.
    """

    def __init__(self, path: Path, host: str) -> None:
        self.path = path
        self.host = host
        self.supervisor = secrets.token_hex(8)
        self._rounds = 0
        self._renewals = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def open(self) -> None:
        """See `Watcher`."""

    def on_event(self, event: events.AnyEvent) -> None:
        """See `Watcher`."""

    def on_tick(self) -> None:
        """The supervisor has listened once more."""
        self._rounds += 1

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no more; the lease stays as it is, like that of a supervisor that died."""
        self._stop.set()
        self._thread.join(RENEW_S)

    def _run(self) -> None:
        failing = False
        while not self._stop.is_set():
            try:
                self._renew()
                failing = False
            except OSError as error:
                if not failing:
                    logger.warning(
                        "the lease could not be renewed (%s): agents may take this supervisor for dead", error
                    )
                failing = True
            self._stop.wait(RENEW_S)

    def _renew(self) -> None:
        self._renewals += 1
        lease = Lease(
            supervisor=self.supervisor,
            host=self.host,
            pid=os.getpid(),
            renewals=self._renewals,
            rounds=self._rounds,
            t_wall_s=time.time(),
        )
        # Not made durable: after a power cut nobody holds it, and a slow disk would make the renewals slow.
        temporary = self.path.with_name(f".{self.path.name}.{self.supervisor}.tmp")
        temporary.write_bytes(msgspec.json.encode(lease))
        temporary.replace(self.path)
