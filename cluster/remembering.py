"""A run's part in the memory of nodes: what its journal says against them, and how long they served, for later runs."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping, Sequence

from cluster import events
from cluster.evidence import GONE, speaks_against
from cluster.history import AnyEntry, Evicted, HistoryFile, Judged, NodeId, Served
from cluster.jobstate import EVICTING_ACTIONS
from cluster.lemons import Standing
from cluster.policy_words import quote
from cluster.watchers import Watcher
from health.verdict import Cause, Certainty, Severity, Verdict

_SERVED_EVERY_S = 6 * 3600.0
_TRY_AGAIN_S = 1.0
_LAST_TRIES_S = 2.0
_POLL_S = 0.05

logger = logging.getLogger("everstep.history")


def identify(node: str, hardware: Sequence[str] = (), here: bool = True) -> NodeId:
    """A node across runs. here: it is a part of this machine, by the name that a run gives it; else a machine itself,
    by the name that its owner gives it: wherever the supervisor runs, it is the same."""
    return NodeId(socket.gethostname() if here else node, node, tuple(hardware))


def remembered(nodes: Sequence[str], known: Sequence[Standing]) -> Mapping[str, Standing]:
    """What is known of nodes of this run, by their names in it."""
    by_place = {(each.node.host, each.node.name): each for each in known}
    this = socket.gethostname()
    found = {node: by_place.get((node, node)) or by_place.get((this, node)) for node in nodes}
    return {node: standing for node, standing in found.items() if standing is not None}


class Remembering:
    """A watcher that hands everything on to another one, and writes the history of nodes beside. here: see `identify`.

    A file that cannot be written, or that another process holds, delays its lines and nothing else.
    """

    def __init__(self, inner: Watcher, file: HistoryFile, run: str, here: bool = True) -> None:
        self.here = here
        self.inner = inner
        self.file = file
        self.run = run
        self._nodes: dict[str, NodeId] = {}
        self._since: dict[str, float] = {}
        self._given: dict[int, events.VerdictGiven] = {}
        self._waiting: list[AnyEntry] = []
        self._try_at_s = 0.0
        self._complained = False

    def open(self) -> None:
        """This process has the run now."""
        self.inner.open()

    def on_event(self, event: events.AnyEvent) -> None:
        """Hand it on; keep what it says about nodes."""
        self.inner.on_event(event)
        self._waiting += self._entries(event)
        if isinstance(event, events.RunStopped):
            self._write_last()
        elif self._waiting:
            self._write()

    def on_tick(self) -> None:
        """Hand it on; note hours that were served, and write what waits."""
        self.inner.on_tick()
        now_s = time.time()
        if self._since and now_s - min(self._since.values()) > _SERVED_EVERY_S:
            self._waiting += self._served(list(self._since), now_s, stay=True)
        if self._waiting:
            self._write()

    def adopt(self, nodes: Sequence[str], now_wall_s: float) -> None:
        """These nodes serve already; their hours count from here on."""
        self._since.update(dict.fromkeys(nodes, now_wall_s))

    def _entries(self, event: events.AnyEvent) -> list[AnyEntry]:
        match event:
            case events.NodeReady():
                self._nodes[event.node] = identify(event.node, event.hardware, self.here)
                self._since.setdefault(event.node, event.t_wall_s)
            case events.VerdictGiven():
                self._given[event.incident] = event
                return [
                    self._judged(event, each)
                    for each in (event.verdict, *event.others)
                    if each.node and each.severity is not Severity.NOTICE
                    if speaks_against(each) or each.certainty is Certainty.HINT
                ]
            case events.ActionTaken() if event.action in EVICTING_ACTIONS and event.node:
                return self._evicted(event)
            case events.NodeEvicted():
                return self._served([event.node], event.t_wall_s)
            case events.RunStopped():
                return self._served(list(self._since), event.t_wall_s)
        return []

    def _judged(self, event: events.VerdictGiven, verdict: Verdict) -> Judged:
        certainty = verdict.certainty if verdict.severity is Severity.NODE else Certainty.HINT
        return Judged(
            t_wall_s=event.t_wall_s, run=self.run, node=self._identify(verdict.node), incident=event.incident,
            cause=verdict.cause, severity=verdict.severity, certainty=certainty, words=quote(verdict),
            device=verdict.device,
        )  # fmt: skip

    def _evicted(self, event: events.ActionTaken) -> list[AnyEntry]:
        given = self._given.get(event.incident)
        about = [each for each in (given.verdict, *given.others) if each.node == event.node] if given else []
        if any(each.cause is Cause.PREEMPTED for each in about):
            return []
        proof = any(each.severity is Severity.NODE and each.certainty is Certainty.PROOF for each in about)
        gone = any(each.cause in GONE for each in about)
        return [
            Evicted(
                t_wall_s=event.t_wall_s, run=self.run, node=self._identify(event.node), incident=event.incident,
                certainty=Certainty.PROOF if proof else Certainty.LIKELY, gone=gone, reason=event.reason,
            )
        ]  # fmt: skip

    def _served(self, nodes: Sequence[str], now_s: float, stay: bool = False) -> list[AnyEntry]:
        """Hours of nodes up to now, those of equal length in one entry."""
        by_start: dict[float, list[str]] = {}
        for node in nodes:
            if node in self._since:
                by_start.setdefault(self._since.pop(node), []).append(node)
            if stay:
                self._since[node] = now_s
        return [
            Served(
                t_wall_s=now_s, run=self.run, nodes=tuple(map(self._identify, names)),
                hours=max(0.0, now_s - start) / 3600.0,
            )
            for start, names in sorted(by_start.items())
        ]  # fmt: skip

    def _identify(self, node: str) -> NodeId:
        return self._nodes.get(node) or identify(node, here=self.here)

    def _write(self) -> None:
        now_s = time.monotonic()
        if now_s < self._try_at_s:
            return
        try:
            written = self.file.append(self._waiting)
        except OSError as error:
            if not self._complained:
                logger.warning("%s cannot be written, what it is to say of nodes waits: %s", self.file.path, error)
            self._complained, written = True, False
        if written:
            self._waiting.clear()
        else:
            self._try_at_s = now_s + _TRY_AGAIN_S

    def _write_last(self) -> None:
        """The run ends: wait a moment for whoever holds the file."""
        give_up_s = time.monotonic() + _LAST_TRIES_S
        while self._waiting and time.monotonic() < give_up_s:
            self._try_at_s = 0.0
            self._write()
            if self._waiting:
                time.sleep(_POLL_S)  # a lock cannot be waited for with a bound
        if self._waiting:
            logger.warning("%s: %d entries about nodes are lost", self.file.path, len(self._waiting))
