"""`python -m benchmarks.control_plane`: one real supervisor, and all agents of a large job in a second process.

How much processor and memory does it take, how soon does it notice a death, and how soon does everybody have ranks
again? For growing numbers of agents, until it no longer keeps up.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil

from benchmarks.common import REPO, child_environment, console, show, tail, wait_for_quiet, workspace
from benchmarks.control_plane_messages import (
    FILES_BESIDE,
    FILES_OF_AN_AGENT,
    INTERVAL_S,
    RANKS,
    TIMEOUT_S,
    Answers,
    Close,
    Command,
    Dead,
    Listening,
    Placed,
    Said,
    Silence,
    Summarise,
    files_allowed,
    names,
    percentile,
)
from benchmarks.results import Result, Series, machine, now, series, settings, versions, write_result
from cluster.events import ActionTaken, Event, GenerationPlanned, VerdictGiven
from cluster.journal import tail as read_on

AGENTS = (500, 1000, 2500, 5000, 12500)
STEADY_S = 20.0
SETTLE_S = 5.0
PATIENCE_S = 180.0
DEATHS = 3
NOTES = (
    f"each agent has {RANKS} ranks, a connection of its own under CURVE, and a heartbeat every {INTERVAL_S:g} s; they "
    "are in a second process, or, where that may not have so many files open, in as few as it takes. They share this "
    "machine's cores with the supervisor.",
    f"a silent agent is lost after {TIMEOUT_S:g} s without a heartbeat, counted from its last one; its silence begins "
    "somewhere between two. One that is gone is noticed as soon as whoever owns the machines says so, which is asked "
    "ten times a second here.",
    "ranks for all: from the decision in the journal until the last agent has its place in the new generation. Workers "
    "are not part of it.",
    "processor: user and system time of the supervisor's process over wall time, in percent of one core, while all "
    "agents train; answer: from a report to the order that answers it.",
)  # fmt: skip

Kind = TypeVar("Kind", bound=msgspec.Struct)
Told = TypeVar("Told", bound=Event)


class Child:
    """A process that speaks lines of JSON."""

    def __init__(self, module: str, *arguments: str, folder: Path) -> None:
        self.log = folder / f"{module}.log"
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{module}", *arguments], cwd=REPO, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, env=child_environment(folder),
            )  # fmt: skip
        self._said: queue.SimpleQueue[Said | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def say(self, what: Command) -> None:
        """One line to it."""
        stream = self.process.stdin
        assert stream is not None
        stream.write(msgspec.json.encode(what) + b"\n")
        stream.flush()

    def hear(self, kind: type[Kind], timeout_s: float = PATIENCE_S) -> Kind | None:
        """The next line of this kind, None if there is none in time; others before it are dropped. OSError if the
        process has ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                said = self._said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if said is None:
                raise OSError(f"it ended with {self.process.wait()}: {tail(self.log, 1)}")
            if isinstance(said, kind):
                return said

    def expect(self, kind: type[Kind]) -> Kind:
        """The same, where it must come. TimeoutError if it does not."""
        said = self.hear(kind)
        if said is None:
            raise TimeoutError(f"no {kind.__name__} in {PATIENCE_S:g} s")
        return said

    def close(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(msgspec.json.decode(line, type=Said))
        self._said.put(None)


class Bench:
    """One supervisor with its agents: in one process, or in as many as the limit of open files asks for."""

    def __init__(self, folder: Path, agents: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.agents = agents
        self.supervisor = Child("control_plane_supervisor", str(folder), str(agents), folder=folder)
        self.begun_wall_s = time.time()
        port = self.supervisor.expect(Listening).port
        self._nodes = names(agents)
        parts = math.ceil(len(self._nodes) * FILES_OF_AN_AGENT / (files_allowed() - FILES_BESIDE))
        self._part = math.ceil(len(self._nodes) / parts)
        self.fleets = [
            Child("control_plane_agents", str(folder), str(agents), str(port), str(first),
                  str(min(first + self._part, len(self._nodes))), folder=folder)
            for first in range(0, len(self._nodes), self._part)
        ]  # fmt: skip
        self._offset = 0

    def close(self) -> None:
        """End all."""
        for fleet in self.fleets:
            fleet.close()
        self.supervisor.close()

    def fleet_of(self, node: str) -> Child:
        """The process that plays a node."""
        return self.fleets[self._nodes.index(node) // self._part]

    def all_placed(self, generation: int) -> float:
        """When the last of all members got its ranks in a generation; waits for it."""
        counts, last_s = dict[int, int](), 0.0
        deadline = time.monotonic() + PATIENCE_S
        while sum(counts.values()) < self.agents:
            if time.monotonic() > deadline:
                raise TimeoutError(f"only {sum(counts.values())} of {self.agents} agents got ranks")
            for number, fleet in enumerate(self.fleets):
                said = fleet.hear(Placed, 0.01)
                if said is not None and said.generation == generation:
                    counts[number], last_s = said.count, max(last_s, said.t_wall_s)
        return last_s

    def event(self, kind: type[Told]) -> Told:
        """The first such event of the journal since events were forgotten. TimeoutError if it does not come."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = read_on(self.folder / "events.jsonl", self._offset)
            for each in found.records:
                if isinstance(each, kind):
                    return each
            time.sleep(0.02)
        raise TimeoutError(f"no {kind.__name__} in {PATIENCE_S:g} s")

    def forget_events(self) -> None:
        """Events up to now are not looked at any more."""
        self._offset = read_on(self.folder / "events.jsonl", self._offset).offset


def measure(folder: Path, agents: int, steady_s: float, found: list[Series]) -> None:
    """Add all figures for that many agents. OSError or TimeoutError if it does not keep up."""
    with _bench(folder, agents) as bench:
        side = f"{agents} agents"
        began_s = bench.all_placed(1) - bench.begun_wall_s
        found.append(series(side, "from nothing to ranks for all", "s", [began_s]))
        time.sleep(SETTLE_S)
        found += _steady(bench, side, steady_s)
        silent, gone, decided, ranks = [], [], [], []
        for number in range(2 * DEATHS):
            by_silence = number % 2 == 0
            noticed_s, decided_s, ranks_s = _death(bench, f"node{agents // 2 + number}", by_silence)
            (silent if by_silence else gone).append(noticed_s)
            decided.append(decided_s)
            ranks.append(ranks_s)
            time.sleep(SETTLE_S)
        found += [
            series(side, "notice an agent that is silent", "s", silent),
            series(side, "notice an agent that is gone", "s", gone),
            series(side, "decide", "s", decided),
            series(side, "ranks for all after a replacement", "s", ranks),
        ]


def _steady(bench: Bench, side: str, steady_s: float) -> list[Series]:
    supervisor = psutil.Process(bench.supervisor.process.pid)
    fleets = [psutil.Process(fleet.process.pid) for fleet in bench.fleets]
    _answers(bench)
    before_s, load_s, began_s = _used_s(supervisor), sum(map(_used_s, fleets)), time.monotonic()
    time.sleep(steady_s)
    used_s, load_s = _used_s(supervisor) - before_s, sum(map(_used_s, fleets)) - load_s
    wall_s = time.monotonic() - began_s
    said = _answers(bench)
    sent, answered = sum(each.sent for each in said), sum(each.answered for each in said)
    seconds = sorted(second for each in said for second in each.seconds)
    return [
        series(side, "processor", "percent", [100 * used_s / wall_s]),
        series(side, "processor of the agents", "percent", [100 * load_s / wall_s]),
        series(side, "resident memory", "MB", [supervisor.memory_info().rss / 1e6]),
        series(side, "reports", "1/s", [sent / wall_s]),
        series(side, "reports answered", "percent", [100 * answered / max(sent, 1)]),
        series(side, "median answer", "ms", [1000 * percentile(seconds, 0.5)]),
        series(side, "99% of answers", "ms", [1000 * percentile(seconds, 0.99)]),
    ]


def _answers(bench: Bench) -> list[Answers]:
    for fleet in bench.fleets:
        fleet.say(Summarise())
    return [fleet.expect(Answers) for fleet in bench.fleets]


def _used_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _death(bench: Bench, node: str, by_silence: bool) -> tuple[float, float, float]:
    """(until the verdict, from there to the decision, from there until all have ranks)."""
    bench.forget_events()
    fleet = bench.fleet_of(node)
    fleet.say(Silence(node) if by_silence else Close(node))
    dead = fleet.expect(Dead)
    if not by_silence:
        with (bench.folder / "dead").open("a") as file:
            file.write(f"{node}\n")
    verdict, action, plan = (bench.event(VerdictGiven), bench.event(ActionTaken), bench.event(GenerationPlanned))
    blamed = verdict.verdict
    assert blamed.node == node, f"{blamed.node} was blamed instead of {node}: {blamed.evidence}"
    placed_s = bench.all_placed(plan.generation)
    return verdict.t_wall_s - dead.t_wall_s, action.t_wall_s - verdict.t_wall_s, placed_s - action.t_wall_s


@contextlib.contextmanager
def _bench(folder: Path, agents: int) -> Iterator[Bench]:
    bench = Bench(folder, agents)
    try:
        yield bench
    finally:
        bench.close()


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", nargs="+", type=int, default=list(AGENTS))
    parser.add_argument("--steady-s", type=float, default=STEADY_S, help="how long the steady state is watched")
    parser.add_argument("--into", help="folder of the record, instead of benchmarks/results")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for a quiet machine")
    options = parser.parse_args()
    if not options.no_wait:
        wait_for_quiet()
    here, taken_at, began_s = machine(), now(), time.monotonic()
    found: list[Series] = []
    notes = list(NOTES)
    with workspace("control-plane") as place:
        for agents in options.agents:
            console.print(f"{agents} agents")
            try:
                measure(place.disk / str(agents), agents, options.steady_s, found)
            except (OSError, TimeoutError) as error:
                notes.append(f"{agents} agents were too many: {error}")
                console.print(f"[yellow]{notes[-1]}[/]")
                break
    result = Result(
        benchmark="control_plane", taken_at=taken_at, seconds=round(time.monotonic() - began_s, 1), machine=here,
        versions=versions(),
        settings=settings({"agents": options.agents, "ranks of an agent": RANKS, "heartbeat_interval_s": INTERVAL_S,
                           "heartbeat_timeout_s": TIMEOUT_S, "deaths of each kind": DEATHS}),
        series=tuple(found), ratios=(), notes=tuple(notes),
    )  # fmt: skip
    show(result)
    console.print(f"written to {write_result(result, Path(options.into)) if options.into else write_result(result)}")


if __name__ == "__main__":
    main()
