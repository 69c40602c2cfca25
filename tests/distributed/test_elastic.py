"""Torch elastic under our own agent: no death of a worker goes unreported, whoever looks first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cluster.elastic import AssignedRendezvous, NodeElasticAgent, WorkerDeath
from cluster.messages import Assignment

pytestmark = pytest.mark.distributed


def sleep_through_sigterm(_argument: str) -> None:
    """A worker in a collective that never ends: politeness does not reach it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


class OnePlan:
    """A supervisor that plans one generation on one node, and then lets it go."""

    def __init__(self) -> None:
        self.generations = 0

    def await_plan(self, store_port: int) -> Assignment | None:
        """See `cluster.elastic.Planner`."""
        self.generations += 1
        if self.generations > 1:
            return None
        return Assignment(
            generation=1, place=0, nodes=1, ranks_per_node=2, store_host="127.0.0.1", store_port=store_port, ram_step=-1
        )

    def wants_restart(self) -> bool:
        """See `cluster.elastic.Planner`."""
        return False


class LooksLate(NodeElasticAgent):
    """One that torch elastic's own look always comes before."""

    blind = False

    def _processes(self):  # type: ignore[no-untyped-def]
        return () if self.blind else super()._processes()


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Torch elastic and our agent set handlers, which a process that ends with them need not take back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("kind", [NodeElasticAgent, LooksLate])
def test_a_death_is_reported_and_the_others_end_at_once(kind: type[NodeElasticAgent], tmp_path: Path) -> None:
    """Promise: a killed worker is reported as such, also where torch elastic sees it first, and nobody gets 30 s."""
    deaths: list[WorkerDeath] = []
    killed_s: list[float] = []

    def on_deaths(found: Sequence[WorkerDeath]) -> None:
        deaths.extend(found)

    def kill_one() -> None:
        deadline = time.monotonic() + 30
        while len(agent.worker_pids()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        agent.blind = True  # type: ignore[attr-defined]
        killed_s.append(time.monotonic())
        os.kill(agent.worker_pids()[1], signal.SIGKILL)

    rendezvous = AssignedRendezvous("node0", "127.0.0.1", OnePlan())
    agent = kind(
        rendezvous, sleep_through_sigterm, 2, tmp_path, lambda plan: "", on_deaths, lambda: False, lambda: None, 0.02
    )
    killer = threading.Thread(target=kill_one)
    killer.start()
    agent.run()
    killer.join()
    assert deaths == [WorkerDeath(local_rank=1, exit_code=None, signal_number=signal.SIGKILL)]
    assert time.monotonic() - killed_s[0] < 15.0
