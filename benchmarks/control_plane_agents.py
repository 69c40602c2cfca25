"""`python -m benchmarks.control_plane_agents FOLDER AGENTS PORT FIRST LAST`: many agents of a large job in one process.

Each has a DEALER socket of its own under CURVE, and says and obeys what a real one does: eight ranks that train, a
heartbeat a second, a fresh readiness for every new generation, a report at once when something changes.
"""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections import deque
from pathlib import Path

import msgspec
import zmq

from benchmarks.control_plane_messages import (
    FILES_OF_AN_AGENT,
    INTERVAL_S,
    RANKS,
    Answers,
    Close,
    Command,
    Dead,
    Placed,
    Said,
    Silence,
    Summarise,
    allow_files,
    names,
)
from cluster.keys import JobKeys, read_keys
from cluster.messages import (
    MAX_MESSAGE_BYTES,
    AgentReport,
    AgentStatus,
    HeldInfo,
    Order,
    RankBeat,
    RankTimes,
    Readiness,
    decode_order,
    encode,
)
from trainer.events import Beat, Phase, StepTimes

STEP_S = 10.0
_PHASES = (Phase.FORWARD_BACKWARD, Phase.FORWARD_BACKWARD, Phase.FORWARD_BACKWARD, Phase.VOTE, Phase.OPTIMIZER)
_CONNECTING = 20
"""How many agents begin at a time, so that the kernel's queue of new connections does not overflow."""


class Agent:
    """One simulated agent."""

    def __init__(self, node: str, pid: int, members: int, socket: zmq.Socket[bytes]) -> None:
        self.node = node
        self.pid = pid
        self.members = members
        self.socket = socket
        self.address = f"10.{pid >> 16}.{(pid >> 8) & 255}.{pid & 255}:40000"
        self.seq = 0
        self.status = AgentStatus.READY
        self.generation = 0
        self.ready_for = 0
        self.place = -1
        self.sent_s = 0.0
        self.pending = False

    def report(self, now_s: float) -> AgentReport:
        """What it would say now."""
        self.seq += 1
        running = self.status is AgentStatus.RUNNING
        return AgentReport(
            node=self.node,
            host="10.0.0.1",
            pid=self.pid,
            seq=self.seq,
            status=self.status,
            generation=self.generation,
            finished_step=0,
            readiness=None if running else self._readiness(),
            beats=self._beats(now_s) if running else (),
            exits=(),
            facts=(),
            peer_address=self.address,
            times=self._times(now_s) if running else (),
            sent_wall_s=time.time(),
        )

    def obey(self, order: Order) -> bool:
        """Take in what the supervisor wants; whether that is worth a report at once."""
        plan = order.plan
        if plan is not None and plan.generation > self.generation and plan.place >= 0:
            self.generation, self.place, self.status = plan.generation, plan.place, AgentStatus.RUNNING
            return True
        if order.target_generation > max(self.generation, self.ready_for):
            self.ready_for, self.status = order.target_generation, AgentStatus.READY
            return True
        return False

    def _readiness(self) -> Readiness:
        """Two snapshots of its own ranks, and the newest one of the node before it, as copies go around."""
        held = []
        if self.place >= 0:
            before = (self.place - 1) % self.members
            for place, step, tier in ((self.place, 9, "ram"), (self.place, 10, "ram"), (before, 10, "peer")):
                ranks = range(place * RANKS, (place + 1) * RANKS)
                held += [HeldInfo(rank, self.members * RANKS, step, self.generation, tier) for rank in ranks]
        return Readiness(self.ready_for, "10.0.0.1", 40001, tuple(held))

    def _beats(self, now_s: float) -> tuple[RankBeat, ...]:
        step, into_s = int(now_s / STEP_S), now_s % STEP_S
        phase = _PHASES[int(into_s / STEP_S * len(_PHASES))]
        beat = Beat(step, phase, now_s - into_s, STEP_S, self.generation)
        return tuple(RankBeat(self.place * RANKS + local, self.pid + local, "R", beat) for local in range(RANKS))

    def _times(self, now_s: float) -> tuple[RankTimes, ...]:
        step = int(now_s / STEP_S) - 1
        return tuple(
            RankTimes(self.place * RANKS + local, (_step_times(step, self.pid + local),)) for local in range(RANKS)
        )


def _step_times(step: int, salt: int) -> StepTimes:
    noise_s = ((step * 2654435761 + salt * 40503) % 1000) / 1e5
    return StepTimes(
        step=step, data_s=0.01, forward_s=1.5 + noise_s, backward_s=3.0, wait_s=0.3 - noise_s, optimizer_s=0.1,
        snapshot_s=0.0, total_s=STEP_S,
    )  # fmt: skip


class Fleet:
    """Agents, and the loop that moves them."""

    def __init__(self, keys: JobKeys, agents: int, port: int, first: int) -> None:
        self.members = agents
        self._first = first
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, agents + 1000)
        self._poll = select.epoll()
        self._agents: dict[str, Agent] = {}
        self._by_fd: dict[int, Agent] = {}
        self._keys = keys
        self._port = port
        self._placed = Placed(0, 0, 0.0)
        self._said = self._placed
        self._sent = self._answered = self._order_bytes = self._report_bytes = 0
        self._seconds: list[float] = []
        self._mute: set[str] = set()

    def run(self, nodes: list[str]) -> None:
        """Connect, and go on until standard input ends."""
        self._poll.register(sys.stdin.fileno(), select.EPOLLIN)
        waiting, due = deque(nodes), deque[tuple[float, Agent]]()
        while True:
            now_s = time.monotonic()
            for _ in range(min(len(waiting), _CONNECTING)):
                due.append((now_s + INTERVAL_S, self._connect(waiting.popleft())))
            while due and due[0][0] <= now_s:
                due_s, agent = due.popleft()
                self._send(agent)
                due.append((max(due_s + INTERVAL_S, now_s), agent))
            if self._said != self._placed:
                self._said = self._placed
                say(self._said)
            for fd, _ in self._poll.poll(0.002, 1024):
                if fd == sys.stdin.fileno():
                    line = sys.stdin.buffer.readline()
                    if not line:
                        return
                    self._do(msgspec.json.decode(line, type=Command))
                else:
                    self._drain(self._by_fd[fd])

    def _connect(self, node: str) -> Agent:
        socket = self._context.socket(zmq.DEALER)
        socket.curve_serverkey = self._keys.server.public.encode()
        socket.curve_publickey = self._keys.client.public.encode()
        socket.curve_secretkey = self._keys.client.secret.encode()
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, 4)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://127.0.0.1:{self._port}")
        agent = Agent(node, 1000 + RANKS * (self._first + len(self._agents)), self.members, socket)
        self._agents[node] = self._by_fd[socket.getsockopt(zmq.FD)] = agent
        self._poll.register(socket.getsockopt(zmq.FD), select.EPOLLIN)
        self._send(agent)
        return agent

    def _send(self, agent: Agent) -> None:
        if agent.node in self._mute:
            return
        now_s = time.monotonic()
        data = encode(agent.report(now_s))
        with contextlib.suppress(zmq.Again):
            agent.socket.send(data, zmq.NOBLOCK)
            agent.sent_s, agent.pending = now_s, True
            self._sent += 1
            self._report_bytes += len(data)
        # Sending takes in what the socket's file descriptor would have told of.
        if agent.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._drain(agent)

    def _drain(self, agent: Agent) -> None:
        if agent.socket.closed:
            return
        tell = False
        while agent.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            data = agent.socket.recv(zmq.NOBLOCK)
            order = decode_order(data)
            self._order_bytes += len(data)
            if agent.pending and order.ack_seq == agent.seq:
                agent.pending = False
                self._answered += 1
                self._seconds.append(time.monotonic() - agent.sent_s)
            before = agent.generation
            if agent.node not in self._mute and agent.obey(order):
                tell = True
                if agent.generation != before:
                    self._count(agent.generation)
        if tell:
            self._send(agent)

    def _count(self, generation: int) -> None:
        before = self._placed.count if self._placed.generation == generation else 0
        self._placed = Placed(generation, before + 1, time.time())

    def _do(self, command: Command) -> None:
        match command:
            case Silence(node=node):
                self._mute.add(node)
                say(Dead(node, time.time()))
            case Close(node=node):
                self._mute.add(node)
                agent = self._agents[node]
                self._poll.unregister(agent.socket.getsockopt(zmq.FD))
                agent.socket.close(linger=0)
                say(Dead(node, time.time()))
            case Summarise():
                sample = tuple(sorted(self._seconds)[:: max(1, len(self._seconds) // 1000)])
                say(Answers(self._sent, self._answered, sample, self._order_bytes, self._report_bytes))
                self._sent = self._answered = self._order_bytes = self._report_bytes = 0
                self._seconds.clear()


def say(what: Said) -> None:
    """One line on standard output."""
    sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Entry point."""
    folder, (agents, port, first, last) = Path(sys.argv[1]), map(int, sys.argv[2:])
    allow_files(FILES_OF_AN_AGENT * (last - first))
    Fleet(read_keys(folder / "secrets" / "job.json"), agents, port, first).run(names(agents)[first:last])


if __name__ == "__main__":
    main()
