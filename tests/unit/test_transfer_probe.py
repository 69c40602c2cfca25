"""Promise: the way to another node is measured as it is, in bounded time, and a broken one is told in words."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointing.copies import CopyStore
from checkpointing.transfer_probe import PROBE_BYTES, PROBE_REF, make_probe, measure
from checkpointing.transfer_server import TransferServer
from tests.transfer_helpers import KEY, Node, a_node, cutting


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with a_node(tmp_path) as made:
        made.shards[PROBE_REF] = make_probe()
        yield made


def test_a_sound_way_is_measured(node: Node) -> None:
    """Speed and latency are there; asked for reachability alone, no body is fetched."""
    full = measure(node.address, KEY, for_s=0.2, timeout_s=10.0)
    assert (full.problem, full.mb_per_s > 1.0, 0 < full.latency_s < 10.0) == ("", True, True)
    with cutting(node.port, []) as proxy:
        only = measure(proxy.address, KEY, for_s=0.0, timeout_s=10.0)
        assert (only.problem, only.mb_per_s) == ("", -1.0)
        assert proxy.passed_bytes < 10_000


def test_a_way_that_breaks_is_tried_once_more(node: Node) -> None:
    """One cut connection is no bad link; a way that breaks each time is one."""
    with cutting(node.port, [PROBE_BYTES // 2]) as proxy:
        assert measure(proxy.address, KEY, 0.1, 10.0).problem == ""
        assert proxy.connections == 2
    with cutting(node.port, [1000] * 9) as proxy:
        assert measure(proxy.address, KEY, 0.1, 10.0).problem == "connection cut"


def test_nobody_and_strangers(node: Node) -> None:
    """A port without a listener, a listener that says nothing, and one without the key are bad, each in its words."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        begun_s = time.monotonic()
        assert measure(f"127.0.0.1:{port}", KEY, 1.0, 0.3).problem == "no answer within 0.3 s"
        assert time.monotonic() - begun_s < 5.0
    assert "refused" in measure(f"127.0.0.1:{port}", KEY, 1.0, 5.0).problem.lower()
    assert "key" in measure(node.address, bytes(32), 1.0, 5.0).problem


def test_bytes_that_change_on_the_way_are_noticed(node: Node) -> None:
    """A way that flips bits behind TCP's back is bad."""
    located = node.shards[PROBE_REF]
    data = bytearray(located.path.read_bytes())
    data[12345] ^= 4
    located.path.write_bytes(data)
    assert "not those that were sent" in measure(node.address, KEY, 0.1, 10.0).problem


def run(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True)


@pytest.fixture
def slow_wire() -> Iterator[str]:
    """A network namespace behind a veth of 8 Mbit/s; yields its name. 10.97.53.1 is here, 10.97.53.2 is there."""
    name = "everstep-test"
    try:
        run(
            f"ip netns add {name}", "ip link add es-here type veth peer name es-there",
            f"ip link set es-there netns {name}",
            "ip addr add 10.97.53.1/24 dev es-here", "ip link set es-here up",
            f"ip -n {name} addr add 10.97.53.2/24 dev es-there", f"ip -n {name} link set es-there up",
            f"ip -n {name} link set lo up",
            "tc qdisc add dev es-here root tbf rate 8mbit burst 16kb latency 100ms",
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"LOUD: network namespaces or tbf cannot be had here ({error})")
    yield name
    run(f"ip netns del {name}")


CLIENT = """
import sys
from checkpointing.transfer_probe import measure
print(measure(sys.argv[1], bytes(range(32)), 0.5, float(sys.argv[2])))
"""


def test_a_real_slow_wire_is_slow(tmp_path: Path, slow_wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a real link of 1 MB/s the speed comes out as that, and it takes no longer than it may; once the link is
    down, it is bad."""
    probe = make_probe()
    copies = CopyStore(tmp_path / "copies")
    server = TransferServer("10.97.53.1", KEY, lambda ref: probe if ref == PROBE_REF else None, copies)
    address = f"10.97.53.1:{server.start()}"
    client = ["ip", "netns", "exec", slow_wire, sys.executable, "-c", CLIENT, address]
    begun_s = time.monotonic()
    said = subprocess.run([*client, "1.5"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert time.monotonic() - begun_s < 30.0
    assert 0.3 < float(said.split("mb_per_s=")[1].rstrip(")\n")) < 2.0, said
    run("ip link set es-here down")
    said = subprocess.run([*client, "0.5"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "problem=''" not in said
    server.close()
    copies.close()
