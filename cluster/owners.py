"""What the owner of the machines says of those that a run works on: which are bad, and which will be taken away."""

from __future__ import annotations

import logging
import time
from typing import Protocol

import msgspec

from cluster.deciding import Deciding
from cluster.messages import AgentReport
from cluster.noticing import Noticing, Suspicion
from cluster.scheduler import Scheduler
from health.verdict import Cause, Severity

logger = logging.getLogger("everstep.supervisor")


class Run(Protocol):
    """What it needs of the supervisor."""

    evicted: frozenset[str]
    handles: dict[str, str]
    noticing: Noticing
    deciding: Deciding
    scheduler: Scheduler


class Owners:
    """Asks the scheduler, which waits for nobody, and remembers notices until their nodes are gone."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._notices: dict[str, str] = {}

    def listen(self) -> None:
        """Take in what is new: a verdict, weighed like one of the node's own probes, or a notice to leave."""
        run = self._run
        # Only of those whose verdicts count now: what is said once is not said again. A node that comes back is among
        # them when it was readmitted, not as soon as its agent is started.
        for verdict in run.scheduler.verdicts(run.noticing.progress.newest_step, run.handles.keys() - run.evicted):
            if verdict.cause is Cause.PREEMPTED and verdict.severity is Severity.NODE:
                logger.warning("%s", verdict.evidence[0])
                self._notices[verdict.node] = verdict.evidence[0]
            else:
                run.deciding.accuse(Suspicion(verdict, time.time()))
        if self._notices:
            self._notices = {node: words for node, words in self._notices.items() if node not in run.evicted}

    def informed(self, report: AgentReport) -> AgentReport:
        """The report, with the notice that its node must go, if the owner gave one that the agent does not know of."""
        notice = self._notices.get(report.node, "")
        return msgspec.structs.replace(report, notice=notice) if notice and not report.notice else report
