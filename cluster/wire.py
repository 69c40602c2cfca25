"""The authenticated sockets between supervisor and agents: ZeroMQ ROUTER and DEALER under CURVE.

CURVE encrypts and authenticates both ends; the authenticator lets in the job's own client key and nothing else.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterator

import zmq
import zmq.auth.thread

from cluster.keys import JobKeys
from cluster.messages import MAX_MESSAGE_BYTES, AgentReport, Order, decode_order, decode_report, encode
from cluster.rundir import Endpoint

_LISTEN_S = 0.05
_GATHER_S = 0.01
_COMPLAIN_S = 1.0
_BACKLOG = 4096

logger = logging.getLogger("everstep.wire")


class _OnlyThisKey:
    """CURVE credentials: the job's client key is let in, any other is refused."""

    def __init__(self, public_key: str) -> None:
        self.public_key = public_key.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return hmac.compare_digest(key, self.public_key)


class SupervisorSocket:
    """The supervisor's end. Every connected agent is known by its node name."""

    def __init__(self, keys: JobKeys, host: str = "127.0.0.1") -> None:
        self.keys = keys
        self.host = host
        self._context = zmq.Context()
        self._auth = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._socket = self._context.socket(zmq.ROUTER)
        self._identities: dict[str, bytes] = {}
        self._displaced: dict[str, bytes | None] = {}
        self._speakers: dict[bytes, str] = {}
        self._refusals = 0
        self._complained_s = float("-inf")

    def bind(self, port: int | None = None) -> int:
        """Listen, on a free port unless one is given; returns the port."""
        self._auth.start()
        self._auth.configure_curve_callback(domain="*", credentials_provider=_OnlyThisKey(self.keys.client.public))
        self._socket.curve_server = True
        self._socket.curve_publickey = self.keys.server.public.encode()
        self._socket.curve_secretkey = self.keys.server.secret.encode()
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.LINGER, 500)
        # All agents of a job connect at once when a supervisor takes over.
        self._socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        if port is None:
            return self._socket.bind_to_random_port(f"tcp://{self.host}")
        self._socket.bind(f"tcp://{self.host}:{port}")
        return port

    def receive(self, timeout_s: float) -> Iterator[AgentReport]:
        """Yield the reports that are there, waiting at most timeout_s for the first; malformed ones are refused.

        Where they come faster than they are taken, it ends after a while all the same: there is more to do than listen.
        """
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return
        began_s = time.monotonic()
        while (now_s := time.monotonic()) - began_s < _LISTEN_S:
            try:
                identity = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                # What is done after each round costs more than a report, so a few are taken at a time.
                if not self._socket.poll(max(0, int((_GATHER_S - (now_s - began_s)) * 1000))):
                    return
                continue
            data = self._socket.recv()
            if self._socket.getsockopt(zmq.RCVMORE):
                self._drop_parts()
                self._refused("a message in parts", len(data))
                continue
            try:
                report = decode_report(data)
            except ValueError:
                self._refused("a malformed message", len(data))
                continue
            if self._speakers.setdefault(identity, report.node) != report.node:
                self._refused(f"a message of {self._speakers[identity]} that says to be {report.node}", len(data))
                continue
            if self._identities.get(report.node) != identity:
                self._displaced[report.node] = self._identities.get(report.node)
                self._forget(report.node)
                self._identities[report.node] = identity
            yield report

    def _drop_parts(self) -> None:
        while self._socket.getsockopt(zmq.RCVMORE):
            self._socket.recv()

    def _forget(self, node: str) -> None:
        """The node has connected anew: nothing comes over its old connection any more."""
        former = self._identities.get(node)
        if former is not None:
            self._speakers.pop(former, None)

    def _refused(self, what: str, size_bytes: int) -> None:
        """Say it once in a while: whoever sends such messages may send many."""
        self._refusals += 1
        now_s = time.monotonic()
        if now_s - self._complained_s >= _COMPLAIN_S:
            self._complained_s = now_s
            logger.warning("refused %s (%d bytes); refused so far: %d", what, size_bytes, self._refusals)

    def send(self, node: str, order: Order) -> None:
        """Send to a node if it ever spoke; one that is gone is dropped by ZeroMQ."""
        identity = self._identities.get(node)
        if identity is not None:
            self._socket.send(identity, zmq.SNDMORE)
            self._socket.send(encode(order))

    def dismiss(self, node: str, order: Order) -> None:
        """Send to the agent that spoke for a node last, and then to the one before it again, which is the right one."""
        self.send(node, order)
        self._forget(node)
        known = self._displaced.pop(node, None)
        if known is None:
            self._identities.pop(node, None)
        else:
            self._identities[node] = known

    def close(self) -> None:
        """Let go of the port."""
        self._socket.close()
        self._auth.stop()
        self._context.term()


class AgentLink(threading.Thread):
    """The agent's end, in a thread of its own: reports what `report` returns, hands orders to `on_order`.

    A report goes out every interval_s, and at once after `wake()`. When the supervisor has not answered for
    lost_after_s its endpoint is read again, since a new one may listen elsewhere.
    """

    def __init__(
        self,
        node: str,
        keys: JobKeys,
        find_endpoint: Callable[[], Endpoint | None],
        report: Callable[[], AgentReport],
        on_order: Callable[[Order], None],
        interval_s: float,
        lost_after_s: float,
    ) -> None:
        super().__init__(name="link", daemon=True)
        self.node = node
        self.keys = keys
        self.find_endpoint = find_endpoint
        self.report = report
        self.on_order = on_order
        self.interval_s = interval_s
        self.lost_after_s = lost_after_s
        self._context = zmq.Context()
        self._wake_in = self._context.socket(zmq.PAIR)
        self._wake_out = self._context.socket(zmq.PAIR)
        self._wake_lock = threading.Lock()
        self._leave = threading.Event()
        self.heard_at_s = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since the supervisor last spoke."""
        return time.monotonic() - self.heard_at_s

    def wake(self) -> None:
        """Report now."""
        # Without room, enough wakes wait already; without a peer, the thread has ended.
        with self._wake_lock, contextlib.suppress(zmq.Again):
            if not self._wake_in.closed:
                self._wake_in.send(b"", zmq.NOBLOCK)

    def stop(self) -> None:
        """Send a last report and end the thread."""
        self._leave.set()
        self.wake()
        self.join(timeout=5.0)
        with self._wake_lock:
            self._wake_in.close()
        self._context.destroy(linger=500)

    def start(self) -> None:
        """Connect the wake-up pair, then run."""
        self._wake_out.bind("inproc://wake")
        self._wake_in.connect("inproc://wake")
        super().start()

    def run(self) -> None:
        """Report and listen until stopped."""
        while not self._leave.is_set():
            endpoint = self.find_endpoint()
            if endpoint is None:
                self._drain_wakes(self.interval_s)
                continue
            socket = self._connect(endpoint)
            self._serve(socket)
            socket.close(linger=500)
        self._wake_out.close()

    def _connect(self, endpoint: Endpoint) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.curve_serverkey = self.keys.server.public.encode()
        socket.curve_publickey = self.keys.client.public.encode()
        socket.curve_secretkey = self.keys.client.secret.encode()
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        # Reports describe the present: old ones queued for a dead supervisor would only mislead its successor.
        socket.setsockopt(zmq.SNDHWM, 4)
        socket.connect(f"tcp://{endpoint.host}:{endpoint.port}")
        return socket

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake_out, zmq.POLLIN)
        connected_at = due_at = time.monotonic()
        while not self._leave.is_set():
            now = time.monotonic()
            if now >= due_at:
                self._send_report(socket)
                due_at = now + self.interval_s
            ready = dict(poller.poll(max(0, int((due_at - time.monotonic()) * 1000) + 1)))
            if self._wake_out in ready:
                self._drain_wakes(0)
                due_at = time.monotonic()
            if socket in ready:
                self.heard_at_s = time.monotonic()
                self._take_orders(socket)
            if time.monotonic() - max(self.heard_at_s, connected_at) >= self.lost_after_s:
                return
        self._send_report(socket)

    def _send_report(self, socket: zmq.Socket[bytes]) -> None:
        # A full queue means nobody listens: the next report says all of this one and more.
        with contextlib.suppress(zmq.Again):
            socket.send(encode(self.report()), zmq.NOBLOCK)

    def _take_orders(self, socket: zmq.Socket[bytes]) -> None:
        while socket.poll(0):
            try:
                self.on_order(decode_order(socket.recv()))
            except ValueError as error:
                logger.warning("ignored a malformed order: %s", error)

    def _drain_wakes(self, timeout_s: float) -> None:
        if self._wake_out.poll(int(timeout_s * 1000)):
            while self._wake_out.poll(0):
                self._wake_out.recv(zmq.NOBLOCK)
