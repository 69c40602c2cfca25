"""`python -m benchmarks.detection`: faults at random instants of real jobs of four ranks. How soon is each noticed, and
is the cause, the rank and the action right? And how many false alarms does an undisturbed job raise?"""

from __future__ import annotations

import argparse
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.common import JOB, console, show, small_corpus, wait_for_quiet, workspace
from benchmarks.detection_faults import (
    RANKS,
    RANKS_PER_NODE,
    Fault,
    GpuLost,
    GradientFlipped,
    MemoryFlipped,
    NodeDead,
    Signalled,
    Slowed,
    Struck,
)
from benchmarks.results import (
    RESULTS,
    Result,
    Series,
    machine,
    now,
    read_result,
    series,
    settings,
    versions,
    write_result,
)
from cluster.events import ActionTaken, VerdictGiven
from cluster.state import replay
from health.verdict import Cause
from tests.chaos.jobs import Job
from tests.fake_gpus import FakeGpus

SETTLE_STEPS = 8
PATIENCE_S = 60.0
STRIKES_A_JOB = 4
MODEL = {
    "layers": 4, "vocab_size": 2048, "steps": 1_000_000, "seq_len": 128, "global_batch_size": 16,
    "microbatch_size": 4, "ranks": RANKS,
}  # fmt: skip
OVERRIDES = (
    "--cluster.nodes", str(RANKS // RANKS_PER_NODE), "--cluster.ranks_per_node", str(RANKS_PER_NODE),
    "--cluster.spares", str(STRIKES_A_JOB), "--health.max_evictions_per_hour", "1000",
    "--checkpoint.persist_interval_steps", "50", "--health.preflight", "false",
)  # fmt: skip
NOTES = (
    "time to notice: from the fault to the verdict in the journal (for a flipped gradient from the beginning of its "
    "step). A hang's verdict comes after all stacks and flight records were collected.",
    "a node dies: its processes are frozen, so that only its silence tells. GPUs are a library of our own that the "
    "unmodified driver binding loads. A slow rank's forward takes 0.5 s longer for 20 "
    "steps.",
    "steps to notice: 0 is the step in which it happened.",
)


@dataclass
class Trials:
    """What came of one fault."""

    seconds: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    cause: list[bool] = field(default_factory=list)
    rank: list[bool] = field(default_factory=list)
    action: list[bool] = field(default_factory=list)
    missed: int = 0


class Record:
    """What was found so far, written after every fault: a job that fails in the second hour takes nothing with it."""

    def __init__(self, strikes: int, minutes: float, folder: Path, before: Result | None) -> None:
        """before: a record whose other series stay."""
        self.settings = settings({**MODEL, "strikes": strikes, "minutes undisturbed": minutes})
        self.folder = folder
        self.machine, self.taken_at, self._began_s = machine(), now(), time.monotonic()
        self._before = before
        self._found: list[Series] = []

    def add(self, found: Sequence[Series]) -> None:
        """Write all that there is."""
        self._found += found
        console.print(f"{len(self._found)} series written to {write_result(self.result(), self.folder)}")

    def result(self) -> Result:
        """The benchmark's record."""
        kept: tuple[Series, ...] = ()
        notes: tuple[str, ...] = NOTES
        if self._before is not None:
            what = {_subject(each) for each in self._found}
            kept = tuple(each for each in self._before.series if _subject(each) not in what)
            version, load = self._before.versions.revision, self._before.machine.load_average
            told = f"of a run before, {self._before.taken_at}, revision {version}, load {load:g}: "
            told += ", ".join(dict.fromkeys(map(_subject, kept)))
            notes = (*NOTES, *(note for note in self._before.notes if note not in NOTES), told)
        return Result(
            benchmark="detection", taken_at=self.taken_at, seconds=round(time.monotonic() - self._began_s, 1),
            machine=self.machine, versions=versions(), settings=self.settings, series=(*kept, *self._found), ratios=(),
            notes=notes,
        )  # fmt: skip


def _subject(each: Series) -> str:
    return each.name.partition(":")[0]


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strikes", type=int, default=20, help="of each fault")
    parser.add_argument("--undisturbed-minutes", type=float, default=60.0, help="a job with no fault at all")
    parser.add_argument("--faults", nargs="+", help="only those whose name has one of these words")
    parser.add_argument("--into", help="folder of the record, instead of benchmarks/results")
    parser.add_argument("--add", action="store_true", help="what the record has of other faults stays in it")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for a quiet machine")
    options = parser.parse_args()
    if not options.no_wait:
        wait_for_quiet()
    folder = Path(options.into) if options.into else RESULTS
    before = read_result(folder / "detection.json") if options.add else None
    record = Record(options.strikes, options.undisturbed_minutes, folder, before)
    dice = random.Random(1)
    with workspace("detection") as place:
        corpus = small_corpus(place.disk / "corpus")
        config = place.disk / "job.toml"
        config.write_text(JOB.format(corpus=corpus, **MODEL))
        for number, fault in enumerate(_faults(place.disk / "gpus", options.faults or [""])):
            trials = Trials()
            for first in range(0, options.strikes, STRIKES_A_JOB):
                count = min(STRIKES_A_JOB, options.strikes - first)
                _one_job(Job(place.disk, f"job-{number}-{first}", str(config), OVERRIDES + fault.overrides), fault,
                         count, trials, dice)  # fmt: skip
            record.add(_series(fault, trials))
        undisturbed = Job(place.disk, "undisturbed", str(config), OVERRIDES)
        record.add(_false_alarms(undisturbed, options.undisturbed_minutes))
    show(record.result())


def _faults(folder: Path, words: Sequence[str]) -> list[Fault]:
    everything: list[Fault] = [
        Signalled("a worker is killed", signal.SIGKILL, Cause.WORKER_KILLED, "0.2 s"), NodeDead(),
        Signalled("a worker hangs", signal.SIGSTOP, Cause.HANG, "max(5 s, 3 steps)"), Slowed(), GradientFlipped(),
        MemoryFlipped("a weight's bit flips", "model.layers"),
        MemoryFlipped("an optimizer state's bit flips", "optimizer."), GpuLost(FakeGpus(folder)),
    ]  # fmt: skip
    return [fault for fault in everything if any(word in fault.name for word in words)]


def _one_job(job: Job, fault: Fault, strikes: int, trials: Trials, dice: random.Random) -> None:
    """One job that is struck several times, each time when it has settled again."""
    fault.prepare(job, strikes, dice)
    job.start()
    try:
        for number in range(strikes):
            _settle(job)
            seen = len(job.events())
            with fault.strike(job, number, dice) as struck:
                given = _noticed(job, fault, seen)
                _record(job, fault, struck, given, seen, trials)
    except psutil.NoSuchProcess as error:
        raise RuntimeError(f"{fault.name}: {error}: something else happened:\n{job.said()[-3000:]}") from error
    finally:
        job.end()


def _settle(job: Job) -> None:
    """Until the newest generation has done some steps."""

    def settled() -> bool:
        state = replay(job.events())  # type: ignore[arg-type]
        # An incident is open until a later generation has done a step.
        steps = [row for row in job.steps() if row.generation == state.generation]
        return not state.open_incidents and len(steps) >= SETTLE_STEPS

    job.wait_until(settled, "steps of the newest generation", 120.0)


def _noticed(job: Job, fault: Fault, seen: int) -> VerdictGiven | None:
    """The first verdict of the right cause, or the first incident, whichever it is; None in vain."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for event in job.events()[seen:]:
            right = isinstance(event, VerdictGiven) and event.verdict.cause in fault.aim.causes
            if isinstance(event, VerdictGiven) and (right or event.incident):
                return event
        time.sleep(0.02)
    return None


def _record(
    job: Job, fault: Fault, struck: Struck, given: VerdictGiven | None, seen: int, trials: Trials
) -> None:  # fmt: skip
    if given is None:
        trials.missed += 1
        console.print(f"{fault.name}: NOT noticed in {PATIENCE_S:g} s ({struck})", highlight=False)
        return
    verdict, aim = given.verdict, fault.aim

    def acted() -> list[str]:
        return [e.action for e in job.events()[seen:] if isinstance(e, ActionTaken) and e.incident == given.incident]

    job.wait_until(lambda: bool(acted()), "an action", PATIENCE_S)
    trials.seconds.append(given.t_wall_s - struck.t_wall_s)
    trials.steps.append(float(max(0, _step_at(job, given.t_wall_s) - struck.step)))
    trials.cause.append(verdict.cause in aim.causes)
    trials.rank.append(verdict.node == struck.node and (not aim.rank_matters or verdict.rank == struck.rank))
    trials.action.append(acted()[0] in aim.actions)
    wrong = "" if trials.cause[-1] and trials.rank[-1] and trials.action[-1] else "  WRONG"
    console.print(
        f"{fault.name}: rank {struck.rank} on {struck.node}; after {trials.seconds[-1]:.2f} s: {verdict.cause.value}, "
        f"rank {verdict.rank} on {verdict.node}, {acted()[0]}{wrong}", highlight=False,
    )  # fmt: skip


def _step_at(job: Job, t_wall_s: float) -> int:
    """The step that was under way."""
    return max((row.step for row in job.steps() if row.t_wall_s <= t_wall_s), default=0) + 1


def _series(fault: Fault, trials: Trials) -> list[Series]:
    name = fault.name
    if not trials.seconds:
        return [series("everstep", f"{name}: not noticed", "ratio", [1.0])]
    missed = [False] * trials.missed
    return [
        series("everstep", f"{name}: time to notice (aim: {fault.aim.within})", "s", trials.seconds),
        series("everstep", f"{name}: steps to notice", "steps", trials.steps),
        *(
            series("everstep", f"{name}: right {what}", "ratio", [sum(right) / len(right)])
            for what, marks in (("cause", trials.cause), ("rank", trials.rank), ("action", trials.action))
            if (right := [*marks, *missed])
        ),
    ]


def _false_alarms(job: Job, minutes: float) -> list[Series]:
    """Verdicts in a job that nothing is done to, for an hour of training."""
    if minutes <= 0:
        return []
    job.start()
    try:
        _settle(job)
        began_s = time.monotonic()
        while time.monotonic() - began_s < 60 * minutes:
            assert job.process is not None
            if job.process.poll() is not None:
                raise RuntimeError(f"the undisturbed job ended: {job.said()[-2000:]}")
            time.sleep(1.0)
        given = [event.verdict for event in job.events() if isinstance(event, VerdictGiven)]
    finally:
        job.end()
    hours = (time.monotonic() - began_s) / 3600
    for verdict in given:
        console.print(f"FALSE ALARM: {verdict.cause.value}: {'; '.join(verdict.evidence[:2])}", highlight=False)
    loud = [verdict for verdict in given if verdict.severity != "notice"]
    return [
        series("everstep", "undisturbed: verdicts an hour", "ratio", [len(given) / hours]),
        series("everstep", "undisturbed: verdicts that do something an hour", "ratio", [len(loud) / hours]),
        series("everstep", "undisturbed: steps", "steps", [float(len(job.steps()))]),
    ]


if __name__ == "__main__":
    main()
