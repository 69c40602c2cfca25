"""An agent's examinations of its own node: before it joins, while it serves, and over again while it has no ranks."""

from __future__ import annotations

import logging
import threading
import time

import msgspec

from cluster.agent import AgentState
from cluster.doctor import SelfTestError, examine, forked_selftest, gpu_count_check, loopback_check, selftest_checks
from cluster.node import Node
from cluster.node_probe import Folder, NodeProbe, NodeWatch
from cluster.rundir import write_atomically
from health.examination import Check, Examination, Grade, Machine, preflight_verdict
from health.node import NodeJudge, Place
from health.verdict import Verdict
from parallelism.selftest import CPU, SelfTest, Settings

LONGEST_S = 120.0
REPORT = "preflight.json"
_CPU_MIB = 16
_GPU_MIB = 512

logger = logging.getLogger("everstep.preflight")


class Examiner:
    """A node's own doctor. The node must be open."""

    def __init__(self, node: Node) -> None:
        health, run_dir = node.config.health, node.run_dir
        folders = [Folder(Place.RUN, str(run_dir.logs(node.node))), Folder(Place.RAM, str(node.ram_dir))]
        if node.tiers.node_dir is not None:
            folders.append(Folder(Place.NODE, str(node.tiers.node_dir)))
        self._node = node
        self._health = health
        self._probe = NodeProbe(folders, str(run_dir.path))
        self.watch = NodeWatch(
            self._probe,
            NodeJudge(node.node, health),
            health.node_probe_interval_s,
            self._newest_step,
            node.state.accuse,
            [lambda step: node.state.clock.judge(node.node, step)],
        )
        self._rechecks = Rechecks(node.state, health.selftest_interval_minutes * 60)

    def fit(self) -> bool:
        """Examine the node, if that is wanted; a node that fails is accused, and may not join. In the meantime nothing
        else of this class may run."""
        if not self._health.preflight:
            return True
        examination = self._examine()
        self._node.state.machine = examination.machine
        for check in examination.checks:
            if check.grade is not Grade.PASS:
                logger.warning("preflight, %s %s: %s", check.name, check.device, check.detail or check.value)
        verdict = preflight_verdict(examination)
        if verdict is not None:
            self._node.state.accuse(verdict)
        return verdict is None

    def start(self) -> None:
        """Begin what goes on while the node serves."""
        if self._health.node_probe_interval_s:
            self.watch.start()
        if self._health.selftest_interval_minutes:
            self._rechecks.start()

    def stop(self) -> None:
        """End all of it, its processes too."""
        self._rechecks.stop()
        self.watch.stop()

    def _examine(self) -> Examination:
        """It takes half of startup_timeout_s at most, so that a spare still has the other half."""
        node, key = self._node, self._node.tiers.key
        timeout_s = min(LONGEST_S, self._health.startup_timeout_s / 2)
        ranks = len(node.local_ranks)
        settings = Settings(ranks=max(2, ranks), timeout_s=timeout_s, cpu_mib=_CPU_MIB, gpu_mib=_GPU_MIB)
        examination = examine(
            node.node,
            self._probe.read,
            lambda: forked_selftest(settings, _never),
            lambda tests: [loopback_check(node.state.peer_address, key), *gpu_count_check(tests, ranks)],
        )
        try:
            data = msgspec.json.format(msgspec.json.encode(examination))
            write_atomically(node.run_dir.logs(node.node) / REPORT, data)
        except OSError as error:
            logger.warning("the preflight's result could not be kept: %s", error)
        return examination

    def _newest_step(self) -> int:
        beats = [self._node.slots.read(local_rank) for local_rank in self._node.local_ranks]
        return max((beat.step for beat in beats if beat is not None), default=-1)


class Rechecks(threading.Thread):
    """Repeats the known-answer tests every interval_s while no worker runs here, at the lowest priority.

    A node that is given ranks meanwhile has its test ended at once.
    """

    def __init__(self, state: AgentState, interval_s: float) -> None:
        super().__init__(name="rechecks", daemon=True)
        self._state = state
        self._interval_s = interval_s
        self._leave = threading.Event()

    def run(self) -> None:
        """Until `stop`, or until a test fails."""
        settings = Settings(timeout_s=LONGEST_S, cpu_mib=_CPU_MIB, gpu_mib=_GPU_MIB, collective=False, nice=True)
        while not self._leave.wait(self._interval_s):
            if not self._state.idle:
                continue
            try:
                tests = forked_selftest(settings, lambda: self._leave.is_set() or not self._state.idle)
            except (SelfTestError, OSError, EOFError) as error:
                # No process to be had; or at the lowest priority on a busy machine, slowness is no proof of anything.
                logger.warning("the repeated known-answer tests gave no result: %s", error)
                continue
            verdict = None if tests is None else judge_recheck(self._state.node, tests)
            if verdict is not None:
                self._state.accuse(verdict)
                return

    def stop(self) -> None:
        """End the thread and a test that runs."""
        self._leave.set()
        if self.is_alive():
            self.join()


def judge_recheck(node: str, tests: SelfTest) -> Verdict | None:
    """The accusation of a node whose repeated tests came out wrong. A processor that was late had other work to do; a
    GPU of a node without ranks has none."""
    results = tuple(result for result in tests.results if not (result.late and result.device == CPU))
    checks: tuple[Check, ...] = tuple(selftest_checks(msgspec.structs.replace(tests, results=results)))
    examination = Examination(node=node, t_wall_s=time.time(), seconds=tests.seconds, checks=checks, machine=Machine())
    return preflight_verdict(examination)


def _never() -> bool:
    return False
