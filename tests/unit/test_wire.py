"""The control plane's sockets: only the job's own key is heard, nothing malformed gets in, silence is survived."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from cluster.keys import JobKeys, make_or_read_keys, read_keys
from cluster.messages import AgentReport, AgentStatus, Order, Wish, dismissal, encode
from cluster.rundir import Endpoint
from cluster.wire import AgentLink, SupervisorSocket


def report(seq: int = 1) -> AgentReport:
    return AgentReport(
        node="node0",
        host="127.0.0.1",
        pid=1,
        seq=seq,
        status=AgentStatus.READY,
        generation=0,
        finished_step=0,
        readiness=None,
        beats=(),
        exits=(),
        facts=(),
    )


def link_to(endpoint: Endpoint | None, keys: JobKeys, orders: list[Order], **more: float) -> AgentLink:
    heard = threading.Event()

    def take(order: Order) -> None:
        orders.append(order)
        heard.set()

    link = AgentLink("node0", keys, lambda: endpoint, report, take, more.get("interval_s", 0.05), more.get("lost", 5.0))
    link.heard = heard  # type: ignore[attr-defined]
    return link


@pytest.fixture
def keys(tmp_path: Path) -> JobKeys:
    return make_or_read_keys(tmp_path / "secrets" / "job.json")


@pytest.fixture
def supervisor(keys: JobKeys) -> Iterator[tuple[SupervisorSocket, Endpoint]]:
    socket = SupervisorSocket(keys)
    port = socket.bind()
    yield socket, Endpoint(host=socket.host, port=port, pid=0)
    socket.close()


def reports_within(socket: SupervisorSocket, seconds: float) -> list[AgentReport]:
    return list(socket.receive(seconds))


def test_reports_come_in_and_orders_go_out(supervisor: tuple[SupervisorSocket, Endpoint], keys: JobKeys) -> None:
    socket, endpoint = supervisor
    orders: list[Order] = []
    link = link_to(endpoint, keys, orders)
    link.start()
    try:
        assert [each.node for each in reports_within(socket, 5.0)][:1] == ["node0"]
        socket.send("node0", Order(ack_seq=1, wish=Wish.RUN, target_generation=3, plan=None))
        assert link.heard.wait(5.0)  # type: ignore[attr-defined]
        assert orders[0].target_generation == 3
    finally:
        link.stop()


def test_an_agent_that_is_dismissed_gets_none_of_its_successors_orders(
    supervisor: tuple[SupervisorSocket, Endpoint], keys: JobKeys
) -> None:
    """Promise: both speak for the same node; what is sent to the node goes to the one that was not dismissed."""
    socket, endpoint = supervisor
    orders: tuple[list[Order], list[Order]] = ([], [])
    links = [link_to(endpoint, keys, taken, interval_s=60.0) for taken in orders]
    try:
        for link in reversed(links):
            link.start()
            assert [each.node for each in reports_within(socket, 5.0)] == ["node0"]
        socket.dismiss("node0", dismissal(3))
        socket.send("node0", Order(ack_seq=1, wish=Wish.RUN, target_generation=3, plan=None))
        for link in links:
            assert link.heard.wait(5.0)  # type: ignore[attr-defined]
    finally:
        for link in links:
            link.stop()
    assert [[order.wish for order in taken] for taken in orders] == [[Wish.SHUT_DOWN], [Wish.RUN]]


def test_a_stranger_is_not_heard(supervisor: tuple[SupervisorSocket, Endpoint], keys: JobKeys, tmp_path: Path) -> None:
    """A peer that knows the supervisor's public key but has not the job's client key gets nothing through."""
    socket, endpoint = supervisor
    others = make_or_read_keys(tmp_path / "other" / "job.json")
    stranger = link_to(endpoint, JobKeys(server=keys.server, client=others.client), [])
    stranger.start()
    try:
        assert reports_within(socket, 0.5) == []
    finally:
        stranger.stop()


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 100, encode(report())[:-3]])
def test_malformed_messages_are_refused_and_the_next_is_heard(
    supervisor: tuple[SupervisorSocket, Endpoint], keys: JobKeys, data: bytes
) -> None:
    socket, endpoint = supervisor
    context = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.curve_serverkey, peer.curve_publickey, peer.curve_secretkey = (
        keys.server.public.encode(),
        keys.client.public.encode(),
        keys.client.secret.encode(),
    )
    peer.connect(f"tcp://{endpoint.host}:{endpoint.port}")
    peer.send(data)
    peer.send(encode(report(seq=7)))
    try:
        heard: list[AgentReport] = []
        for _ in range(50):
            heard += reports_within(socket, 0.1)
            if heard:
                break
        assert [each.seq for each in heard] == [7]
    finally:
        peer.close(linger=0)
        context.term()


def test_keys_are_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "job.json"
    made = make_or_read_keys(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert read_keys(path) == made
    assert made.server.secret not in repr(made)
    path.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        read_keys(path)


def test_a_wake_that_nobody_can_take_is_no_error(keys: JobKeys) -> None:
    """Promise: an agent's threads may wake the link before it runs, ever so often, and while it ends."""
    link = link_to(None, keys, [])
    link.wake()
    link.start()
    for _ in range(5000):
        link.wake()
    link.stop()
    link.wake()
