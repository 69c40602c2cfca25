"""Whatever comes over the network is a well-formed message or a ValueError, and the supervisor goes on listening."""

from __future__ import annotations

import contextlib
import socket as sockets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from cluster.keys import JobKeys, KeyPair, make_or_read_keys
from cluster.messages import (
    MAX_MESSAGE_BYTES,
    AgentReport,
    AgentStatus,
    Assignment,
    Evidence,
    HeldInfo,
    NumberedFact,
    Order,
    RankBeat,
    RankTimes,
    Readiness,
    Wish,
    WorkerExit,
    decode_order,
    decode_report,
    encode,
)
from cluster.rundir import Endpoint
from cluster.wire import SupervisorSocket
from tests.unit.garbage import altered, bounded, msgpack_bombs
from tests.unit.test_takeover import Played, take_over
from trainer.events import Beat, Fact, FactKind, Phase, StepTimes

FACT = Fact(kind=FactKind.LOADED, node="node0", rank=0, generation=1, step=9, t_wall_s=1.0, detail="d")
TIMES = StepTimes(
    step=9, data_s=0.1, forward_s=0.1, backward_s=0.1, wait_s=0.1, optimizer_s=0.1, snapshot_s=0.1, total_s=0.6
)
REPORT = AgentReport(
    node="node0", host="10.0.0.1", pid=7, seq=3, status=AgentStatus.RUNNING, generation=1, finished_step=0,
    readiness=Readiness(1, "10.0.0.1", 1, (HeldInfo(0, 4, 9, 1, "peer"),)),
    beats=(RankBeat(0, 8, "R", Beat(9, Phase.VOTE, 1.0, 0.5, 1)),),
    exits=(
        WorkerExit(
            rank=0, generation=1, exit_code=1, signal_number=None, error=None, log_tail=("x",), oom_kill=False,
            t_wall_s=1.0,
        ),
    ),
    facts=(NumberedFact(1, FACT),), times=(RankTimes(0, (TIMES,)),), evidence=Evidence(1, {"a": b"b"}),
)  # fmt: skip
ORDER = Order(
    ack_seq=3, wish=Wish.RUN, target_generation=1,
    plan=Assignment(
        generation=1, place=0, nodes=2, ranks_per_node=2, store_host="h", store_port=1, ram_step=9, ram_generation=1
    ),
    copy_to=("h:1",), keep_for=(1, 2), rejected=((1, 2),),
)  # fmt: skip


def refused_or_understood(data: bytes) -> None:
    """Neither decoder raises anything but ValueError, and what they give is what it says to be."""
    with contextlib.suppress(ValueError):
        assert isinstance(decode_report(data), AgentReport)
    with contextlib.suppress(ValueError):
        assert isinstance(decode_order(data), Order)


@given(st.binary(max_size=400))
def test_arbitrary_bytes(data: bytes) -> None:
    refused_or_understood(data)


@given(st.one_of(altered(encode(REPORT)), altered(encode(ORDER))))
def test_altered_messages(data: bytes) -> None:
    refused_or_understood(data)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30))  # fmt: skip
def test_well_formed_msgpack_of_another_shape(value: object) -> None:
    with contextlib.suppress(OverflowError):  # an integer that msgpack cannot hold
        data = msgspec.msgpack.encode(value)
        refused_or_understood(data)
        fields = msgspec.msgpack.encode({**msgspec.to_builtins(REPORT), "beats": value, "type": "report"})
        refused_or_understood(fields)


@pytest.mark.parametrize("data", msgpack_bombs(), ids=lambda data: f"{data[:12].hex()}x{len(data)}")
def test_bombs_cost_neither_time_nor_memory(data: bytes) -> None:
    """Promise: what a message claims is never allocated before it is there, and nesting ends in words."""
    with bounded():
        for decode in (decode_report, decode_order):
            with pytest.raises(ValueError):
                decode(data)


def test_a_message_over_the_limit_is_not_even_looked_at() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        decode_report(b"\x00" * (MAX_MESSAGE_BYTES + 1))


NUMBERS = st.integers(-(2**63), 2**63 - 1)
TEXTS = st.text(max_size=20)


@given(
    st.builds(
        AgentReport,
        node=st.sampled_from(["node0", "node1", "node2", "../../etc", ""]), host=TEXTS, pid=NUMBERS, seq=NUMBERS,
        status=st.sampled_from(AgentStatus), generation=st.integers(-1, 2) | NUMBERS, finished_step=NUMBERS,
        readiness=st.none() | st.builds(
            Readiness, st.integers(-1, 2), TEXTS, NUMBERS,
            st.lists(st.builds(HeldInfo, NUMBERS, NUMBERS, NUMBERS, NUMBERS, TEXTS), max_size=3).map(tuple),
        ),
        beats=st.lists(
            st.builds(
                RankBeat, st.integers(-2, 5) | NUMBERS, NUMBERS, TEXTS,
                st.none() | st.builds(Beat, NUMBERS, st.sampled_from(Phase), st.floats(), st.floats(), st.just(1)),
            ), max_size=4,
        ).map(tuple),
        exits=st.just(()), facts=st.just(()), peer_address=TEXTS, domain=TEXTS,
        evidence=st.none() | st.builds(Evidence, NUMBERS, st.dictionaries(TEXTS, st.binary(max_size=5), max_size=2)),
        sent_wall_s=st.floats(),
    )
)  # fmt: skip
def test_a_supervisor_survives_any_well_formed_report(report: AgentReport) -> None:
    """Promise: numbers and names that make no sense stop nothing."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        supervisor = take_over(Path(folder), lambda s: [])
        played = supervisor.socket
        assert isinstance(played, Played)
        for healthy in ("node0", "node1", "node2"):
            supervisor.take(played.ready(healthy, 1))
        supervisor.take(decode_report(encode(report)))
        now_s = time.monotonic()
        supervisor.watch(now_s)
        supervisor.deciding.act(now_s)
        supervisor.try_plan()
        assert len(list(Path(folder).parent.glob("etc"))) == 0


# Real sockets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> JobKeys:
    return make_or_read_keys(tmp_path / "secrets" / "job.json")


class Listening:
    """A supervisor's socket, and what it hears while a test goes on."""

    def __init__(self, keys: JobKeys) -> None:
        self.socket = SupervisorSocket(keys)
        self.endpoint = Endpoint(host=self.socket.host, port=self.socket.bind(), pid=0)
        self.heard: list[AgentReport] = []

    def listen(self, seconds: float) -> None:
        """Take what comes."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.heard += self.socket.receive(0.02)

    def hears(self, peer: zmq.Socket[bytes], seq: int) -> bool:
        """Whether an honest agent is heard now, within a few seconds."""
        peer.send(encode(msgspec.structs.replace(REPORT, seq=seq)))
        until_s = time.monotonic() + 10.0
        while time.monotonic() < until_s:
            self.heard += self.socket.receive(0.05)
            if any(report.seq == seq for report in self.heard):
                return True
        return False


@pytest.fixture
def supervisor(keys: JobKeys) -> Iterator[Listening]:
    listening = Listening(keys)
    yield listening
    listening.socket.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


def connect(
    context: zmq.Context[zmq.Socket[bytes]], at: Endpoint, server_public: str, client: KeyPair | None
) -> zmq.Socket[bytes]:
    """A DEALER with these keys, or with none."""
    peer = context.socket(zmq.DEALER)
    peer.linger = 0
    if client is not None:
        peer.curve_serverkey, peer.curve_publickey, peer.curve_secretkey = (
            server_public.encode(), client.public.encode(), client.secret.encode(),
        )  # fmt: skip
    peer.connect(f"tcp://{at.host}:{at.port}")
    return peer


def test_strangers_get_nothing_in(
    supervisor: Listening, keys: JobKeys, context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    """Promise: no key, another job's key, or the right public key with another secret: not one message is heard."""
    other = make_or_read_keys(tmp_path / "other" / "job.json")
    borrowed = KeyPair(public=keys.client.public, secret=other.client.secret)
    honest = connect(context, supervisor.endpoint, keys.server.public, keys.client)
    assert supervisor.hears(honest, 1)
    for client in (None, other.client, borrowed):
        stranger = connect(context, supervisor.endpoint, keys.server.public, client)
        stranger.send(encode(msgspec.structs.replace(REPORT, seq=666)))
    supervisor.listen(1.0)
    assert not any(report.seq == 666 for report in supervisor.heard)
    assert supervisor.hears(honest, 2)


class Recorder(threading.Thread):
    """A man in the middle who writes down what an agent sends, byte for byte."""

    def __init__(self, target: Endpoint) -> None:
        super().__init__(daemon=True)
        self.server = sockets.create_server(("127.0.0.1", 0))
        self.target = target
        self.recorded = b""
        self.newest = b""
        self._theirs: sockets.socket | None = None

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(host="127.0.0.1", port=self.server.getsockname()[1], pid=0)

    def run(self) -> None:
        ours, _ = self.server.accept()
        theirs = self._theirs = sockets.create_connection((self.target.host, self.target.port))
        threading.Thread(target=self._copy, args=(theirs, ours), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := ours.recv(1 << 16):
                self.recorded, self.newest = self.recorded + data, data
                theirs.sendall(data)

    def repeat(self) -> None:
        """Send what came last once more, over the same connection."""
        assert self._theirs is not None
        self._theirs.sendall(self.newest)

    @staticmethod
    def _copy(source: sockets.socket, target: sockets.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)


def test_a_recorded_conversation_is_worth_nothing(
    supervisor: Listening, keys: JobKeys, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """Promise: CURVE's keys are new in every connection: what was sent in one is refused in any other, and a message
    that is repeated within its own connection is, too."""
    recorder = Recorder(supervisor.endpoint)
    recorder.start()
    agent = connect(context, recorder.endpoint, keys.server.public, keys.client)
    assert supervisor.hears(agent, 5)
    supervisor.heard.clear()
    recorder.repeat()
    supervisor.listen(0.5)
    assert supervisor.heard == []
    with sockets.create_connection((supervisor.endpoint.host, supervisor.endpoint.port)) as replay:
        replay.sendall(recorder.recorded)
        supervisor.listen(1.0)
    assert supervisor.heard == []
    honest = connect(context, supervisor.endpoint, keys.server.public, keys.client)
    assert supervisor.hears(honest, 6)


def test_oversized_messages_and_parts_are_refused(
    supervisor: Listening, keys: JobKeys, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """Promise: nobody makes the supervisor keep more than a message's limit, not even with the key."""
    honest = connect(context, supervisor.endpoint, keys.server.public, keys.client)
    assert supervisor.hears(honest, 1)
    greedy = connect(context, supervisor.endpoint, keys.server.public, keys.client)
    greedy.send(b"\x91" * (MAX_MESSAGE_BYTES + 1000))
    supervisor.listen(0.5)
    parts = connect(context, supervisor.endpoint, keys.server.public, keys.client)
    parts.send_multipart([encode(msgspec.structs.replace(REPORT, seq=666))] * 3)
    supervisor.listen(0.5)
    assert not any(report.seq == 666 for report in supervisor.heard)
    assert supervisor.hears(honest, 2)


def test_a_flood_of_half_open_connections_is_survived(
    supervisor: Listening, keys: JobKeys, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """Promise: connections that say nothing, half a greeting or nonsense cost others nothing."""
    flood = []
    for index in range(300):
        peer = sockets.create_connection((supervisor.endpoint.host, supervisor.endpoint.port))
        peer.sendall([b"", b"\xff" + b"\x00" * 8 + b"\x7f\x03", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64][index % 4])
        flood.append(peer)
    try:
        honest = connect(context, supervisor.endpoint, keys.server.public, keys.client)
        began_s = time.monotonic()
        assert supervisor.hears(honest, 1)
        assert time.monotonic() - began_s < 5.0
    finally:
        for peer in flood:
            peer.close()


def test_a_connection_speaks_for_one_node(
    supervisor: Listening, keys: JobKeys, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """Promise: an agent that says to be another one over its own connection is refused; one that connects anew as
    itself is heard, and answered there."""
    agent = connect(context, supervisor.endpoint, keys.server.public, keys.client)
    assert supervisor.hears(agent, 1)
    agent.send(encode(msgspec.structs.replace(REPORT, node="node1", seq=666)))
    supervisor.listen(0.5)
    assert not any(report.seq == 666 for report in supervisor.heard)
    again = connect(context, supervisor.endpoint, keys.server.public, keys.client)
    assert supervisor.hears(again, 2)
    supervisor.socket.send("node0", ORDER)
    assert again.poll(5000)
    assert decode_order(again.recv()) == ORDER
    assert not agent.poll(100)


def test_malformed_messages_are_not_a_line_of_log_each(
    supervisor: Listening, keys: JobKeys, context: zmq.Context[zmq.Socket[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: whoever sends garbage does not fill the disk with words about it."""
    agent = connect(context, supervisor.endpoint, keys.server.public, keys.client)
    for _ in range(500):
        agent.send(b"\xc1garbage")
    assert supervisor.hears(agent, 1)
    assert 1 <= len(caplog.records) <= 10
