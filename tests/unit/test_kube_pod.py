"""Promise: a pod's entry starts the agents that it is told to, ends with the code that the Job's policy is to read, and
leaves no process behind. Its children are real processes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import kube_orders, kube_pod
from cluster.kube_orders import Ended, PodOrder, PodState, read_order, read_state, write_ended, write_order
from cluster.kube_pod import DOMAIN, PodEntry
from cluster.lease import Lease
from cluster.rundir import RunDir, write_atomically
from configs.load import load_job, resolve_toml
from tests.unit.kubejobs import POD, WITHIN_S, eventually

# An agent: says that it runs, and then does what the file beside it says; on SIGTERM it leaves.
AGENT = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
child = subprocess.Popen(["sleep", "300"])
print("agent", os.environ.get("EVERSTEP_FAILURE_DOMAIN"), sys.argv[1], child.pid, flush=True)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.02)
print("ending", flush=True)
os._exit(int(open(sys.argv[2]).read()))
"""


class Running:
    """A pod's entry in a thread."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run_dir = RunDir(home / "runs" / "demo")
        self.run_dir.create()
        words = ["--checkpoint.ram_dir", str(home / "ram")]
        self.run_dir.config.write_text(resolve_toml(load_job("debug_dense", words)))
        self.ends = home / "ends"
        self.log = io.BytesIO()
        program = home / "agent.py"
        program.write_text(AGENT)
        self.entry = PodEntry(
            self.run_dir, POD, "this", self.log, wrap=lambda node: [sys.executable, str(program), node, str(self.ends)]
        )
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        eventually(lambda: self.state is not None)

    def _run(self) -> None:
        self.code = self.entry.run()

    @property
    def state(self) -> PodState:
        """What the pod says of itself."""
        return read_state(self.run_dir.path, POD.name)  # type: ignore[return-value]

    @property
    def said(self) -> str:
        """The pod's log."""
        return self.log.getvalue().decode()

    def order(self, serial: int, action: kube_orders.Action, agent: str = "node7", domain: str = "") -> None:
        """Tell it, and wait until it was done."""
        told = PodOrder(agent_name=agent, serial=serial, action=action, domain=domain)
        write_order(self.run_dir.path, POD.name, told)
        eventually(lambda: self.state.serial == serial)

    def start(self, serial: int = 1, **more: str) -> list[int]:
        """Start an agent; returns its pid and that of a worker."""
        before = self.said
        self.order(serial, "start", **more)
        eventually(lambda: "\n" in self.said[len(before) :])
        assert self.state.running
        assert self.state.pid is not None
        return [self.state.pid, int(self.said[len(before) :].split()[3])]

    def join(self) -> int:
        """Wait for its end."""
        self._thread.join(WITHIN_S)
        assert self.code is not None
        assert self.state.leaving
        assert not self.state.running
        return self.code


def gone(pids: list[int]) -> bool:
    """Whether none of them runs."""
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """See `Running`."""
    monkeypatch.delenv(DOMAIN, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(kube_pod, "_TICK_S", 0.02)
    monkeypatch.setattr(kube_pod, "_ORDERS_S", 0.04)
    made = Running(tmp_path)
    yield made
    made.entry.terminate()
    made.ends.write_text("0")
    made._thread.join(WITHIN_S)


def test_a_pod_runs_what_it_is_told_to(running: Running) -> None:
    """Its first word is that it is up. An order counts once; a new one ends the agent before, and all of its processes.
    What the agent prints is in the pod's log and in the run's."""
    assert msgspec.structs.replace(running.state, t_wall_s=0.0) == PodState(
        serial=0, running=False, pod_uid="uid-1", node_name="node7"
    )
    first = running.start(1, domain="zone-a")
    assert "agent zone-a node7" in running.said
    second = running.start(2, agent="node8")
    eventually(lambda: gone(first))
    running.order(3, "stop")
    eventually(lambda: gone(second))
    assert (running.state.running, running.state.exit_code) == (False, 137)
    assert "node8" in (running.run_dir.logs("node8") / "agent.log").read_text()
    assert running.said.count("agent zone-a") == 2
    # An order that was carried out is not carried out again, nor is an older one.
    write_order(running.run_dir.path, POD.name, PodOrder(agent_name="node7", serial=2, action="start"))
    running.order(4, "stop")
    assert not running.state.running


@pytest.mark.parametrize(("code", "pod_ends"), [(75, True), (94, True), (0, False), (1, False)])
def test_an_agents_own_end(running: Running, code: int, pod_ends: bool) -> None:
    """Cut off, or on a bad node: the pod ends with its code, to be replaced. Else it waits for what comes next."""
    pids = running.start()
    running.ends.write_text(str(code))
    if pod_ends:
        assert running.join() == code
    else:
        eventually(lambda: not running.state.running)
        assert running.code is None
        running.ends.unlink()
        running.start(2)
    assert running.state.exit_code == (code if pod_ends else None)
    eventually(lambda: gone(pids))
    assert running.said.count("ending") == 1


def test_a_pod_that_is_taken_away_lets_its_agent_save(running: Running) -> None:
    """SIGTERM goes to the agent once; the pod ends after it, and not as if it were complete."""
    pids = running.start()
    running.entry.terminate()
    assert running.join() == 75
    assert "saved" in running.said
    assert gone(pids)


def test_a_pod_without_an_agent_goes_at_once(running: Running) -> None:
    """Nor does it start one any more."""
    running.entry.terminate()
    assert running.join() == 75


@pytest.mark.parametrize("code", [0, 2, 93])
def test_the_end_of_the_run_ends_the_pod(running: Running, code: int) -> None:
    """With the run's code; what an earlier submission left is not its end."""
    write_ended(running.run_dir.path, Ended(submission="earlier", exit_code=93))
    pids = running.start()
    write_ended(running.run_dir.path, Ended(submission="this", exit_code=code))
    assert running.join() == code
    assert gone(pids)


def test_what_cannot_be_read_or_started_is_no_reason_to_end(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Orders that are garbage are not obeyed; an agent that cannot start is one that failed."""
    kube_orders.order_path(running.run_dir.path, POD.name).write_bytes(b'{"serial": 1')
    running.run_dir.config.rename(running.home / "config.toml")
    eventually(lambda: "what to do cannot be read" in caplog.text)
    assert running.state.serial == 0
    running.order(2, "start")
    assert (running.state.running, running.state.exit_code, running.code) == (False, 1, None)
    (running.home / "config.toml").rename(running.run_dir.config)
    running.start(3)


def test_a_pod_that_nobody_gives_work_gives_its_node_back(tmp_path: Path) -> None:
    """Not while somebody renews the lease, nor while its agent runs: that knows by itself what to do."""
    run_dir = RunDir(tmp_path / "runs" / "demo")
    run_dir.create()
    entry = PodEntry(run_dir, POD, "this", io.BytesIO())
    began_s = time.monotonic()
    assert entry.tick(began_s + 590) is None
    for renewals in (1, 2):
        lease = Lease(supervisor="s", host="h", pid=1, renewals=renewals, rounds=1, t_wall_s=0.0)
        write_atomically(run_dir.lease, msgspec.json.encode(lease))
        assert entry.tick(began_s + 650 * renewals) is None
    entry._handle = "an agent"
    assert entry.tick(began_s + 5000) is None
    entry._handle = ""
    # As long as the run says, once there is one.
    run_dir.config.write_text(resolve_toml(load_job("debug_dense", ["--cluster.supervisor_lost_timeout_s", "700"])))
    assert entry.tick(began_s + 5690) is None
    assert entry.tick(began_s + 5710) == 1


def test_what_goes_on_is_said_once(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """A pod's log is not filled with one line while a volume is away."""
    kube_orders.order_path(running.run_dir.path, POD.name).write_bytes(b"{")
    eventually(lambda: "what to do cannot be read" in caplog.text)
    looks = running.entry._orders_due_s
    eventually(lambda: running.entry._orders_due_s > looks + 0.3)
    assert caplog.text.count("what to do cannot be read") == 1


@given(st.binary(max_size=60), st.text(max_size=20))
def test_orders_are_read_strictly(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    """Garbage is said to be that, and a name can be no path."""
    run = tmp_path_factory.getbasetemp() / "orders"
    path = kube_orders.order_path(run, POD.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        read_order(run, POD.name)
    with contextlib.suppress(ValueError):
        assert kube_orders.order_path(run, name).parent == path.parent
    for made in (f"../{name}", f"{name}/x", "x" * 254, f"{name}\n"):
        with pytest.raises(ValueError, match="no name of a pod"):
            kube_orders.order_path(run, made)
    for wrong in ({"agent_name": "../x"}, {"domain": "a\nb"}, {"domain": "$(x)"}):
        with pytest.raises(ValueError, match="use letters"):
            PodOrder(**{"agent_name": "node1", "serial": 1, "action": "start", **wrong})


# The supervisor's entry -------------------------------------------------------------------------------------------
