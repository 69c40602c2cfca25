"""Looks at the node from a child process, `python -m cluster.node_probe`: what can hang, hangs there.

The child is asked with one JSON line and answers with several: what it is about to touch, then what it found. If it
falls silent, the place it named last is what hangs: it is killed, and if even that does not end it (the kernel holds
it) the place is not touched again until it has ended.
"""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from cluster.node_facts import LoadMeter, read_controllers, read_disk, read_memory, read_ports
from health.node import HUNG, DiskFacts, NodeFacts, NodeJudge, Place
from health.verdict import Verdict

SILENCE_S = 20.0
_GRACE_S = 1.0
_KILL_S = 1.0

logger = logging.getLogger("everstep.probe")


class Folder(msgspec.Struct, frozen=True):
    """A folder whose disk is looked at."""

    place: Place
    path: str


class Request(msgspec.Struct, frozen=True):
    """run_dir and session tell the run's own processes from others'."""

    folders: tuple[Folder, ...]
    run_dir: str
    session: int


class Touching(msgspec.Struct, frozen=True, tag="touching"):
    """The child is about to touch this place."""

    place: Place


Answer = Touching | DiskFacts | NodeFacts


class NodeProbe:
    """The parent's side. silence_s: how long the child may say nothing. To be used by one thread at a time."""

    def __init__(self, folders: Sequence[Folder], run_dir: str, silence_s: float = SILENCE_S) -> None:
        self._folders = tuple(folders)
        self._run_dir = run_dir
        self._silence_s = silence_s
        self._child: subprocess.Popen[bytes] | None = None
        self._held: dict[Place, subprocess.Popen[bytes]] = {}
        self._buffer = b""

    def read(self) -> NodeFacts:
        """Everything that can be known now. Takes at most silence_s for each place, and a little."""
        self._held = {place: child for place, child in self._held.items() if child.poll() is None}
        folders = tuple(folder for folder in self._folders if folder.place not in self._held)
        disks = [_hung(folder) for folder in self._folders if folder.place in self._held]
        touching: Place | None = None
        for answer in self._ask(Request(folders, self._run_dir, os.getsid(0))):
            if isinstance(answer, NodeFacts):
                return msgspec.structs.replace(answer, disks=tuple(disks))
            if isinstance(answer, Touching):
                touching = answer.place
            else:
                disks.append(answer)
                touching = None
        if self._child is None:
            logger.warning("the probe process ended by itself")
            return NodeFacts(t_mono_s=time.monotonic(), disks=tuple(disks))
        self._give_up(touching)
        disks += [_hung(folder) for folder in folders if folder.place is touching]
        return NodeFacts(t_mono_s=time.monotonic(), disks=tuple(disks))

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._give_up(None)

    def _ask(self, request: Request) -> Iterator[Answer]:
        """Answers until the child falls silent or dies."""
        if self._child is None or self._child.poll() is not None:
            self._buffer = b""
            self._child = subprocess.Popen(
                [sys.executable, "-m", "cluster.node_probe"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(msgspec.json.encode(request) + b"\n")
        except BrokenPipeError:
            return
        while (line := self._line(child.stdout.fileno())) is not None:
            yield msgspec.json.decode(line, type=Answer)

    def _line(self, fd: int) -> bytes | None:
        """The child's next line; None if there is none in time, or no child any more."""
        while b"\n" not in self._buffer:
            # Whoever was stopped together with the child looks once more before it blames a disk.
            if not any(select.select([fd], [], [], wait_s)[0] for wait_s in (self._silence_s, _GRACE_S)):
                return None
            data = os.read(fd, 1 << 16)
            if not data:
                self._give_up(None)
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _give_up(self, place: Place | None) -> None:
        child, self._child, self._buffer = self._child, None, b""
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        try:
            child.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            logger.warning("probe process %d survives SIGKILL: the kernel holds it (%s)", child.pid, place)
            if place is not None:
                self._held[place] = child


class NodeWatch(threading.Thread):
    """Reads and judges every interval_s, in a thread of the agent. newest: the last reading, for evidence.

    others: further judges of the node, asked at the same times.
    """

    def __init__(
        self,
        probe: NodeProbe,
        judge: NodeJudge,
        interval_s: float,
        newest_step: Callable[[], int],
        accuse: Callable[[Verdict], None],
        others: Sequence[Callable[[int], Verdict | None]] = (),
    ) -> None:
        super().__init__(name="node-watch", daemon=True)
        self.newest: NodeFacts | None = None
        self._probe = probe
        self._judge = judge
        self._interval_s = interval_s
        self._newest_step = newest_step
        self._accuse = accuse
        self._others = tuple(others)
        self._leave = threading.Event()

    def run(self) -> None:
        """Until `stop`."""
        while not self._leave.wait(self._interval_s):
            self.newest = self._read()
            step = self._newest_step()
            also = [verdict for judge in self._others if (verdict := judge(step)) is not None]
            for verdict in [*self._judge.judge(self.newest, step), *also]:
                logger.warning("%s: %s", verdict.cause.value, verdict.evidence[0])
                self._accuse(verdict)

    def _read(self) -> NodeFacts:
        """A reading, come what may: what makes a node ill (no processes, no memory, no files left) also keeps it from
        being looked at, and must not end the looking."""
        try:
            return self._probe.read()
        except (OSError, ValueError) as error:
            logger.warning("this node could not be looked at: %s", error)
            self._probe.close()
            return NodeFacts(t_mono_s=time.monotonic(), unread=str(error))

    def stop(self) -> None:
        """End the thread and its child; one that waits for a disk is left to end by itself."""
        self._leave.set()
        if self.is_alive():
            self.join(_KILL_S)
        if not self.is_alive():
            self._probe.close()


def _hung(folder: Folder) -> DiskFacts:
    return DiskFacts(place=folder.place, path=folder.path, error=HUNG)


def serve() -> None:
    """The child: answers requests from standard input until it ends, as it does when the agent dies."""
    meter = LoadMeter()
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line, type=Request)
        facts = NodeFacts(
            t_mono_s=time.monotonic(),
            memory=read_memory(),
            controllers=read_controllers(),
            ports=read_ports(),
            load=meter.read(request.run_dir, request.session),
        )
        for folder in request.folders:
            _say(Touching(folder.place))
            _say(read_disk(folder.place, Path(folder.path)))
        _say(facts)


def _say(answer: Answer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
