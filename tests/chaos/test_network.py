"""A node that peers cannot reach any more is found by having the nodes measure the ways between them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from cluster.events import VerdictGiven
from cluster.matrix import NetworkReport
from health.examination import Examination
from health.verdict import Cause
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job

pytestmark = [pytest.mark.chaos, pytest.mark.long]


class OwnNetwork:
    """A network namespace with a loopback of its own, on which what goes to a port can be made to get lost."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, command: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.name, *command.split()], check=True, capture_output=True)

    def open(self) -> None:
        subprocess.run(["ip", "netns", "add", self.name], check=True, capture_output=True)
        self.run("ip link set lo up")
        self.run("tc qdisc add dev lo root handle 1: htb default 1")
        self.run("tc class add dev lo parent 1: classid 1:1 htb rate 10gbit")
        self.run("tc class add dev lo parent 1: classid 1:2 htb rate 8bit")

    def lose(self, port: int) -> None:
        """From now on nothing reaches this port."""
        self.run(f"tc filter add dev lo parent 1: protocol ip prio 1 u32 match ip dport {port} 0xffff flowid 1:2")


@pytest.fixture
def network() -> Iterator[OwnNetwork]:
    own = OwnNetwork("everstep-test-job")
    try:
        own.open()
    except (OSError, subprocess.CalledProcessError) as error:
        with contextlib.suppress(OSError):
            subprocess.run(["ip", "netns", "del", own.name], capture_output=True)
        pytest.skip(f"LOUD: network namespaces or htb cannot be had here ({error})")
    yield own
    subprocess.run(["ip", "netns", "del", own.name], check=True)


def ask(job: Job) -> tuple[int, NetworkReport]:
    """What `everstep doctor --fleet` says."""
    command = [sys.executable, "-m", "cluster.cli", "doctor", "--fleet", job.name, "--json"]
    done = subprocess.run(command, cwd=job.home, capture_output=True, text=True, timeout=200)
    assert done.stdout, done.stderr
    return done.returncode, msgspec.json.decode(done.stdout, type=NetworkReport)


def test_a_node_that_is_cut_off_from_its_peers_is_found(make_job: MakeJob, network: OwnNetwork) -> None:
    """Promise: of a sound network the fleet says so; once nothing reaches one node, that node is named, in the journal
    too, although its heartbeats come as ever."""
    job = make_job(
        "cut-off", ("--health.preflight", "true", "--training.steps", "1000", "--checkpoint.peer_copies", "0")
    )
    job.launcher = ("ip", "netns", "exec", network.name)
    job.start()
    job.wait_for_step(2)
    code, sound = ask(job)
    assert (code, sound.findings.nodes, sound.silent) == (0, (), ()), sound
    assert {way.target for way in sound.ways} == {"node0", "node1", "node2"}
    assert all(way.mb_per_s > 0 for way in sound.ways)
    log = job.run_dir / "logs" / "node1" / "preflight.json"
    checks = msgspec.json.decode(log.read_bytes(), type=Examination).checks
    (address,) = [check.device for check in checks if check.name == "loopback"]
    network.lose(int(address.rpartition(":")[2]))
    code, broken = ask(job)
    assert code == 94
    assert broken.findings.nodes == ("node1",), broken
    assert any("cannot fetch from node1: no answer within" in each.words for each in broken.findings.bad)
    job.wait_until(lambda: Cause.LINK_FAULT in job.causes(), "the accusation")
    given = [event.verdict for event in job.events() if isinstance(event, VerdictGiven)]
    assert {verdict.node for verdict in given} == {"node1"}
    assert job.process is not None
    job.process.terminate()
    assert job.finish() == 75, job.said()
