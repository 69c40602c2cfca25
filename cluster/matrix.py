"""The supervisor's side of an examination of the network: who measures whom, round by round, and what that shows.

Level-triggered like everything else: the wish of the round that runs is in every order, its answer in every report. A
node that does not answer at all is left to the heartbeats and drops out here.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cluster.messages import AgentReport, Measure, PeerAt
from health.network import Findings, Pair, Way, find_bad, first_rounds, judge_network, next_round
from health.verdict import Verdict

ROUNDS_AT_MOST = 24
PATIENCE_S = 20.0


class NetworkReport(msgspec.Struct, frozen=True, kw_only=True):
    """One finished examination. silent: nodes that did not answer, and of which nothing is said therefore."""

    why: str
    t_wall_s: float
    seconds: float
    rounds: int
    ways: tuple[Way, ...]
    findings: Findings
    verdicts: tuple[Verdict, ...]
    silent: tuple[str, ...] = ()


class Matrix:
    """One examination at a time. All times are the supervisor's: now_s monotonic, t_wall_s since the epoch."""

    def __init__(self) -> None:
        self._number = 0
        self._why = ""
        self._for_s = 0.0
        self._begun_s = 0.0
        self._round_s = 0.0
        self._addresses: dict[str, str] = {}
        self._nodes: list[str] = []
        self._waiting: list[list[Pair]] = []
        self._partner: dict[str, str] = {}
        self._answered: set[str] = set()
        self._ways: list[Way] = []
        self._silent: list[str] = []
        self._rounds = 0

    @property
    def running(self) -> bool:
        """Whether an examination is under way."""
        return bool(self._partner)

    def begin(self, addresses: Mapping[str, str], for_s: float, why: str, now_s: float, t_wall_s: float) -> bool:
        """Begin with these nodes (name to `host:port`); False if one runs already or there are no two nodes.

        for_s: seconds of each measurement, 0: only whether nodes reach each other.
        """
        reachable = {node: address for node, address in addresses.items() if address}
        if self.running or len(reachable) < 2:
            return False
        # A supervisor that takes over numbers on: by the clock, its numbers are higher than its predecessor's.
        self._number = max(self._number, int(t_wall_s * 1000))
        self._why, self._for_s, self._begun_s = why, for_s, now_s
        self._addresses, self._nodes = reachable, sorted(reachable)
        self._ways, self._silent, self._rounds = [], [], 0
        self._waiting = first_rounds(self._nodes)
        self._next_round(now_s)
        return True

    def order_for(self, node: str) -> Measure | None:
        """What the node's next order should ask of it."""
        partner = self._partner.get(node)
        if partner is None:
            return None
        return Measure(number=self._number, peers=(PeerAt(partner, self._addresses[partner]),), for_s=self._for_s)

    def take(self, report: AgentReport) -> None:
        """Take in a report, whose answer may be to this round."""
        measured = report.measured
        if measured is None or measured.number != self._number or report.node not in self._partner:
            return
        if report.node not in self._answered:
            self._answered.add(report.node)
            # Only what was asked for is believed, and under the reporter's own name.
            partner = self._partner[report.node]
            self._ways += [
                msgspec.structs.replace(way, target=report.node) for way in measured.ways if way.source == partner
            ]

    def tick(self, now_s: float, t_wall_s: float, step: int) -> tuple[bool, NetworkReport | None]:
        """(whether orders changed and should go out now, the report once the examination is done)."""
        if not self.running:
            return False, None
        patience_s = self._for_s + PATIENCE_S
        if self._answered < set(self._partner) and now_s - self._round_s < patience_s:
            return False, None
        silent = sorted(set(self._partner) - self._answered)
        self._silent += silent
        self._nodes = [node for node in self._nodes if node not in silent]
        if not self._waiting and self._rounds < ROUNDS_AT_MOST and (more := next_round(self._nodes, self._ways)):
            self._waiting = [more]
        self._next_round(now_s)
        if self.running:
            return True, None
        findings = find_bad(self._ways)
        verdicts = tuple(judge_network(findings, self._ways, step))
        report = NetworkReport(
            why=self._why, t_wall_s=t_wall_s, seconds=now_s - self._begun_s, rounds=self._rounds,
            ways=tuple(self._ways), findings=findings, verdicts=verdicts, silent=tuple(self._silent),
        )  # fmt: skip
        return True, report

    def _next_round(self, now_s: float) -> None:
        self._partner = {}
        self._answered = set()
        while self._waiting and not self._partner:
            pairs = [pair for pair in self._waiting.pop(0) if set(pair) <= set(self._nodes)]
            self._partner = {one: other for a, b in pairs for one, other in ((a, b), (b, a))}
        if self._partner:
            self._number += 1
            self._rounds += 1
            self._round_s = now_s
