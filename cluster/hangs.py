"""From workers that stand still to a verdict: evidence is asked for before anything is done to them.

At the first bound all agents of the plan are asked what their workers are at. If that leaves no doubt, it is a hang;
if it speaks for patience, it is asked for again, until the last bound. Whoever advances meanwhile ends it. An agent
that does not answer in its time is not waited for any longer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from cluster.fleet import AgentView
from configs.timeouts import Timeouts
from health.hang import judge_hang
from health.hang_evidence import read_evidence
from health.verdict import Verdict
from health.watchdog import Standing


@dataclass(frozen=True)
class Hang:
    """The verdict, and all that was collected for it."""

    verdict: Verdict
    files: Mapping[str, bytes]


class HangWatch:
    """One generation's. collect: the number for `Order.collect`, 0 while nothing is asked for."""

    def __init__(self, timeouts: Timeouts, nodes: Mapping[int, str]) -> None:
        self.collect = 0
        self._timeouts = timeouts
        self._nodes = nodes
        self._asked_s = 0.0
        self._since_s = float("-inf")
        self._look_again_s = 0.0

    def consider(
        self, standing: Standing | None, views: Mapping[str, AgentView], now_s: float, hushed: bool = False
    ) -> Hang | None:
        """What to make of ranks that stand still (None: they do not). Called many times a second.

        hushed: they were not looked at, as an agent is silent for a moment: what was asked for is still wanted.
        """
        if standing is None and hushed:
            return None
        if standing is None or standing.since_s != self._since_s:
            self.collect, self._look_again_s = 0, 0.0
            self._since_s = float("-inf") if standing is None else standing.since_s
        if standing is None:
            return None
        if not self.collect:
            if standing.still_s >= self._look_again_s:
                # Milliseconds, so that no other supervisor of this job ever used the number.
                self.collect, self._asked_s = int(time.time() * 1000), now_s
            return None
        answers = {
            node: evidence.files
            for node in set(self._nodes.values())
            if node in views and (evidence := views[node].report.evidence) and evidence.number == self.collect
        }
        if len(answers) < len(set(self._nodes.values())) and now_s - self._asked_s < self._timeouts.answer_s:
            return None
        return self._judge(standing, answers)

    def _judge(self, standing: Standing, answers: Mapping[str, Mapping[str, bytes]]) -> Hang | None:
        files = {name: data for of_node in answers.values() for name, data in of_node.items()}
        found = judge_hang(standing, self._nodes, read_evidence(files))
        self.collect = 0
        if found.sure:
            return Hang(found.verdict, files)
        if standing.still_s >= standing.last_s:
            line = f"called a hang after {standing.still_s:.1f} s (limit {standing.last_s:g} s) although {found.doubt}"
            evidence = (*found.verdict.evidence, line)
            return Hang(msgspec.structs.replace(found.verdict, evidence=evidence), files)
        self._look_again_s = min(standing.still_s + standing.bound_s / 2, standing.last_s)
        return None
