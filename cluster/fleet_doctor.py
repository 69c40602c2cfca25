"""The supervisor's examinations of the whole fleet: are its nodes alike, and is the network between them well.

The network is examined when somebody asks (`everstep doctor --fleet`, through a file in the run directory) or when a
verdict says that the network is slow; the result is in `network.json`. To be called from the supervisor's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

import msgspec

from cluster.fleet import AgentView
from cluster.matrix import Matrix, NetworkReport
from cluster.messages import AgentReport, Measure
from cluster.rundir import GARBLED, RunDir, write_atomically
from configs.schema import HealthConfig
from health.examination import odd_versions, slow_devices
from health.verdict import Cause, Verdict

MEASURE_S = 0.3
LONGEST_MEASURE_S = 10.0
_LOOK_S = 0.5
# Ranks that hang may be cut off from each other; how fast the way is does not matter then.
_ON_SUSPICION = {Cause.SLOW_NETWORK: MEASURE_S, Cause.HANG: 0.0}

logger = logging.getLogger("everstep.fleet")


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody wants the network to be examined. id: told apart by it."""

    id: str
    for_s: float = MEASURE_S


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, in `network.json`. id: the wish's, "" if the supervisor had its own reason."""

    id: str
    report: NetworkReport


class FleetDoctor:
    """Holds nodes against each other, and runs one examination of the network at a time."""

    def __init__(self, run_dir: RunDir, health: HealthConfig) -> None:
        self._run_dir = run_dir
        self._health = health
        self._misfits: set[tuple[str, int]] = set()
        self._matrix = Matrix()
        self._looked_s = float("-inf")
        self._id = ""
        self._done_id = self._read_wish().id
        self._reason = ""
        self._for_s = 0.0

    def misfits(self, views: Mapping[str, AgentView]) -> list[Verdict]:
        """Nodes that do not fit with the others, by versions or by much slower GPUs; of each agent it is said once."""
        if not self._health.preflight:
            return []
        machines = {node: view.report.machine for node, view in views.items() if view.report.machine is not None}
        found = [*odd_versions(machines), *slow_devices(machines, self._health.preflight_slow_pct)]
        new = {each.node: each for each in reversed(found) if self._agent(each.node, views) not in self._misfits}
        self._misfits |= {self._agent(node, views) for node in new}
        return list(new.values())

    @staticmethod
    def _agent(node: str, views: Mapping[str, AgentView]) -> tuple[str, int]:
        return node, views[node].report.pid

    def order_for(self, node: str) -> Measure | None:
        """For `Order.measure`."""
        return self._matrix.order_for(node)

    def take(self, report: AgentReport) -> None:
        """Each report that comes."""
        self._matrix.take(report)

    def suspect(self, verdict: Verdict) -> None:
        """A verdict was given: one that may come from the network has the network examined."""
        if verdict.cause in _ON_SUSPICION and not self._matrix.running:
            self._for_s = _ON_SUSPICION[verdict.cause]
            self._reason = f"{verdict.cause}: {verdict.evidence[0] if verdict.evidence else verdict.fingerprint}"

    def tick(
        self, views: Mapping[str, AgentView], gone: Collection[str], now_s: float, t_wall_s: float, step: int
    ) -> tuple[bool, Sequence[Verdict]]:
        """(whether orders should go out now, what was found). gone: nodes that take no part any more."""
        if not self._matrix.running:
            return self._begin(views, gone, now_s, t_wall_s), ()
        changed, report = self._matrix.tick(now_s, t_wall_s, step)
        if report is None:
            return changed, ()
        try:
            answer = Answered(id=self._id, report=report)
            write_atomically(self._run_dir.network, msgspec.json.format(msgspec.json.encode(answer)))
        except OSError as error:
            logger.warning("the examination of the network could not be kept: %s", error)
        self._done_id = self._id or self._done_id
        return changed, report.verdicts

    def _begin(self, views: Mapping[str, AgentView], gone: Collection[str], now_s: float, t_wall_s: float) -> bool:
        wish = Wanted(id=self._done_id)
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s, wish = now_s, self._read_wish()
        asked = wish.id != self._done_id
        if not asked and not self._reason:
            return False
        addresses = {node: view.report.peer_address for node, view in views.items() if node not in gone}
        self._id, reason, self._reason = wish.id if asked else "", self._reason, ""
        why = "everstep doctor --fleet" if asked else reason
        for_s = min(max(wish.for_s, 0.0), LONGEST_MEASURE_S) if asked else self._for_s
        return self._matrix.begin(addresses, for_s, why, now_s, t_wall_s)

    def _read_wish(self) -> Wanted:
        try:
            return msgspec.json.decode(self._run_dir.network_wish.read_bytes(), type=Wanted)
        except (OSError, *GARBLED):
            return Wanted(id="")
