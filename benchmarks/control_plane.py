"""`python -m benchmarks.control_plane`: one real supervisor, and all agents of a large job in a second process.

How much processor and memory does it take, how soon does it notice a death, and how soon does everybody have ranks
again? For growing numbers of agents, until it no longer keeps up.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import msgspec
import psutil

from benchmarks.common import REPO, child_environment, console, show, wait_for_quiet, workspace
from benchmarks.control_plane_messages import (
    INTERVAL_S,
    RANKS,
    TIMEOUT_S,
    Answers,
    Close,
    Command,
    Dead,
    Listening,
    Planned,
    Said,
    Silence,
    Summarise,
    percentile,
)
from benchmarks.results import Result, Series, machine, now, series, settings, versions, write_result
from cluster.events import ActionTaken, AnyEvent, GenerationPlanned, VerdictGiven
from cluster.journal import tail

AGENTS = (500, 1000, 2500, 5000, 12500)
STEADY_S = 20.0
SETTLE_S = 5.0
PATIENCE_S = 180.0
DEATHS = 3
NOTES = (
    f"each agent has {RANKS} ranks, a connection of its own under CURVE, and a heartbeat every {INTERVAL_S:g} s; all "
    "are in one second process. Sender and supervisor share this machine's cores.",
    f"a silent agent is lost after {TIMEOUT_S:g} s without a heartbeat, counted from its last one; its silence begins "
    "somewhere between two. One that is gone is noticed as soon as whoever owns the machines says so, which is asked "
    "ten times a second here.",
    "ranks for all: from the decision in the journal until the last agent has its place in the new generation. Workers "
    "are not part of it.",
    "processor: user and system time of the supervisor's process over wall time, in percent of one core, while all "
    "agents train; answer: from a report to the order that answers it.",
)  # fmt: skip

Kind = TypeVar("Kind", bound=Said)


class Child:
    """A process that speaks lines of JSON."""

    def __init__(self, module: str, *arguments: str, folder: Path) -> None:
        self.log = folder / f"{module}.log"
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{module}", *arguments], cwd=REPO, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, env=child_environment(folder),
            )  # fmt: skip

    def say(self, what: Command) -> None:
        """One line to it."""
        _pipe(self.process.stdin).write(msgspec.json.encode(what) + b"\n")
        _pipe(self.process.stdin).flush()

    def hear(self, kind: type[Kind], where: Callable[[Kind], bool] = lambda said: True) -> Kind:
        """The next line of this kind; others before it are dropped. OSError if the process ends."""
        while line := _pipe(self.process.stdout).readline():
            said = msgspec.json.decode(line, type=Said)
            if isinstance(said, kind) and where(said):
                return said
        raise OSError(f"it ended with {self.process.wait()}: {self.log.read_text()[-2000:]}")

    def close(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


class Bench:
    """One supervisor with its agents."""

    def __init__(self, folder: Path, agents: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.supervisor = Child("control_plane_supervisor", str(folder), str(agents), folder=folder)
        self.begun_wall_s = time.time()
        port = self.supervisor.hear(Listening).port
        self.agents = Child("control_plane_agents", str(folder), str(agents), str(port), folder=folder)
        self._offset = 0

    def close(self) -> None:
        """End both."""
        self.agents.close()
        self.supervisor.close()

    def event(self, kind: type[AnyEvent], where: Callable[[AnyEvent], bool]) -> AnyEvent:
        """The next such event of the journal. TimeoutError if it does not come."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = tail(self.folder / "events.jsonl", self._offset)
            for each in found.records:
                if isinstance(each, kind) and where(each):
                    return each
            # Read on from here, unless what was looked for shares its lines with what comes next.
            time.sleep(0.02)
        raise TimeoutError(f"no {kind.__name__} in {PATIENCE_S:g} s")

    def forget_events(self) -> None:
        """Events up to now are not looked at any more."""
        self._offset = tail(self.folder / "events.jsonl", self._offset).offset


def measure(folder: Path, agents: int, steady_s: float) -> list[Series]:
    """All figures for that many agents. OSError or TimeoutError if it does not keep up."""
    with _bench(folder, agents) as bench:
        side, found = f"{agents} agents", list[Series]()
        first = bench.agents.hear(Planned)
        found.append(series(side, "from nothing to ranks for all", "s", [first.t_wall_s - bench.begun_wall_s]))
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
        return [
            *found,
            series(side, "notice an agent that is silent", "s", silent),
            series(side, "notice an agent that is gone", "s", gone),
            series(side, "decide", "s", decided),
            series(side, "ranks for all after a replacement", "s", ranks),
        ]


def _steady(bench: Bench, side: str, steady_s: float) -> list[Series]:
    supervisor, agents = psutil.Process(bench.supervisor.process.pid), psutil.Process(bench.agents.process.pid)
    bench.agents.say(Summarise())
    bench.agents.hear(Answers)
    before, before_agents, began_s = supervisor.cpu_times(), agents.cpu_times(), time.monotonic()
    time.sleep(steady_s)
    after, after_agents, wall_s = supervisor.cpu_times(), agents.cpu_times(), time.monotonic() - began_s
    bench.agents.say(Summarise())
    said = bench.agents.hear(Answers)
    used = 100 * (after.user + after.system - before.user - before.system) / wall_s
    load = 100 * (after_agents.user + after_agents.system - before_agents.user - before_agents.system) / wall_s
    return [
        series(side, "processor", "percent", [used]),
        series(side, "processor of the agents' process", "percent", [load]),
        series(side, "resident memory", "MB", [supervisor.memory_info().rss / 1e6]),
        series(side, "reports that came in time", "percent", [100 * said.answered / max(said.sent, 1)]),
        series(side, "reports", "1/s", [said.sent / wall_s]),
        series(side, "median answer", "ms", [1000 * percentile(said.seconds, 0.5)]),
        series(side, "99% of answers", "ms", [1000 * percentile(said.seconds, 0.99)]),
    ]


def _death(bench: Bench, node: str, by_silence: bool) -> tuple[float, float, float]:
    """(until the verdict, from there to the decision, from there until all have ranks)."""
    bench.forget_events()
    bench.agents.say(Silence(node) if by_silence else Close(node))
    dead = bench.agents.hear(Dead)
    if not by_silence:
        with (bench.folder / "dead").open("a") as file:
            file.write(f"{node}\n")
    verdict = bench.event(VerdictGiven, lambda event: True)
    assert isinstance(verdict, VerdictGiven)
    assert verdict.verdict.node == node, (
        f"{verdict.verdict.node} was blamed instead of {node}: {verdict.verdict.evidence}"
    )
    action = bench.event(ActionTaken, lambda event: True)
    plan = bench.event(GenerationPlanned, lambda event: True)
    assert isinstance(plan, GenerationPlanned)
    all_have = bench.agents.hear(Planned, lambda said: said.generation == plan.generation)
    return verdict.t_wall_s - dead.t_wall_s, action.t_wall_s - verdict.t_wall_s, all_have.t_wall_s - action.t_wall_s


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
                found += measure(place.disk / str(agents), agents, options.steady_s)
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
