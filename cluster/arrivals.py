"""Nodes that come while a run works: their agents are started, and they are its new spares."""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

from cluster import events
from cluster.jobstate import JobState
from cluster.messages import AgentReport
from cluster.noticing import Noticing
from cluster.scheduler import Scheduler
from configs.schema import JobConfig

_LOOK_EVERY_S = 1.0
_AGAIN_S = 30.0
_Event = TypeVar("_Event", bound=events.AnyEvent)

logger = logging.getLogger("everstep.supervisor")


class Run(Protocol):
    """What it needs of the supervisor."""

    config: JobConfig
    state: JobState
    evicted: frozenset[str]
    handles: dict[str, str]
    noticing: Noticing
    scheduler: Scheduler

    def emit(self, kind: Callable[..., _Event], **fields: object) -> _Event:
        """Write an event to the journal, and only then believe it."""


class Arrivals:
    """Starting an agent may take long, and is done in a thread."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "arrivals")
        self._starting: dict[str, concurrent.futures.Future[str]] = {}
        self._refused: dict[str, float] = {}
        self._former: set[tuple[str, str]] = set()
        self._look_at_s = 0.0

    def is_former(self, report: AgentReport) -> bool:
        """Whether this is the agent that a node had before it was evicted: it is nobody's any more."""
        return (report.node, report.life) in self._former

    def look(self, now_s: float) -> None:
        """Have agents started on nodes that came, as long as spares are missing. now_s: monotonic."""
        for node in [name for name, asked in self._starting.items() if asked.done()]:
            self._take(node, self._starting.pop(node), now_s)
        if now_s < self._look_at_s:
            return
        self._look_at_s = now_s + _LOOK_EVERY_S
        run, cluster = self._run, self._run.config.cluster
        missing = cluster.nodes + cluster.spares - len(self._starting)
        missing -= sum(name not in run.evicted for name in run.handles)
        came = [node for node in self._fit() if now_s >= self._refused.get(node, 0.0)] if missing > 0 else []
        for node in came[:missing]:
            self._refused[node] = now_s + _AGAIN_S
            self._starting[node] = self._pool.submit(run.scheduler.start, node)

    def close(self) -> None:
        """Look no more; whoever was started meanwhile is among the handles."""
        self._pool.shutdown(wait=True)
        for node, asked in self._starting.items():
            if asked.exception() is None:
                self._run.handles[node] = asked.result()

    def _fit(self) -> list[str]:
        """Nodes that came and may be used: new ones, and evicted ones that were only lost or taken away."""
        run = self._run
        judged = {each.node for each in run.state.evictions if each.judged}
        used = (frozenset(run.handles) - run.evicted) | self._starting.keys() | (run.evicted & judged)
        return [node for node in run.scheduler.appeared() if node not in used]

    def _take(self, node: str, asked: concurrent.futures.Future[str], now_s: float) -> None:
        run, error = self._run, asked.exception()
        if error is not None:
            logger.warning("the agent of %s, which could be used, did not start: %s", node, error)
            return
        if node in run.evicted:
            known = run.state.nodes.get(node)
            if known is not None and known.life:
                self._former.add((node, known.life))
            run.emit(events.NodeReadmitted, node=node, reason="it is there again")
        run.handles[node] = asked.result()
        run.emit(events.AgentStarted, node=node, handle=run.handles[node])
        run.noticing.expected_since.pop(node, None)
        run.noticing.expect([node], now_s)
