"""Which reports are answered at once. Most ask nothing, and say no more than that all goes on."""

from __future__ import annotations

from cluster.messages import AgentReport, AgentStatus
from configs.timeouts import ANSWERED_INTERVALS


class Answering:
    """When each agent was last answered, in monotonic seconds, and whether it is owed another.

    What changes in the orders is sent to all when it changes; an agent that missed it gets it with its next answer.
    """

    def __init__(self, interval_s: float) -> None:
        self._every_s = (ANSWERED_INTERVALS - 0.5) * interval_s
        self._answered_s: dict[str, float] = {}

    def owed(self, report: AgentReport, generation: int, now_s: float) -> bool:
        """Whether to answer now; generation: the one that is wanted."""
        if asks_something(report, generation):
            return True
        return now_s - self._answered_s.get(report.node, float("-inf")) >= self._every_s

    def answered(self, node: str, now_s: float) -> None:
        """The node was sent its order."""
        self._answered_s[node] = now_s


def asks_something(report: AgentReport, generation: int) -> bool:
    """Whether the agent waits for the answer: it has no work, or says what it repeats until it is heard."""
    if report.status is not AgentStatus.RUNNING or report.generation != generation or report.notice:
        return True
    return bool(report.facts or report.verdicts or report.exits or report.evidence or report.measured)
