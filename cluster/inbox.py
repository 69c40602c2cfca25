"""What is new in a report: agents repeat themselves until they are answered, and everything counts once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from cluster.jobstate import life_of
from cluster.messages import AgentReport, NumberedVerdict, WorkerExit
from trainer.events import Fact

logger = logging.getLogger("everstep.supervisor")


class Inbox:
    """Remembers what was taken from each agent's life. An agent that was started anew counts from the beginning."""

    def __init__(self) -> None:
        self._facts: dict[tuple[str, str], int] = {}
        self._verdicts: dict[tuple[str, str], int] = {}
        self._exits: set[tuple[str, int, int]] = set()

    def facts(self, report: AgentReport) -> Iterator[Fact]:
        """Facts that were not taken before; each is, once it was given out."""
        life = (report.node, life_of(report))
        for numbered in report.facts:
            if numbered.number > self._facts.get(life, 0):
                self._facts[life] = numbered.number
                yield numbered.fact

    def verdicts(self, report: AgentReport) -> Iterator[NumberedVerdict]:
        """What the node's probes found since. They know that node alone: what one says of another is not believed."""
        life = (report.node, life_of(report))
        for numbered in report.verdicts:
            if numbered.number > self._verdicts.get(life, 0):
                self._verdicts[life] = numbered.number
                if numbered.verdict.node == report.node:
                    yield numbered
                else:
                    logger.warning("%s accuses %r, of which it knows nothing", report.node, numbered.verdict.node)

    def exits(self, report: AgentReport) -> Iterator[WorkerExit]:
        """Workers that ended badly since."""
        for death in report.exits:
            key = (report.node, death.rank, death.generation)
            if key not in self._exits:
                self._exits.add(key)
                yield death
