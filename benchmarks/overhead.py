"""`python -m benchmarks.overhead`: steps per second with everything on, against the bare loop."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import JOB, Workspace, console, show, small_corpus, tail, wait_for_quiet, wait_until, workspace
from benchmarks.processor import ROLES, processor_times, used_between
from benchmarks.ranks import TIMEOUT_S, run_ranks
from benchmarks.results import Result, Series, machine, now, ratio, series, settings, versions, write_result
from cluster.journal import read_steps

SKIP = 5
FIXED = {
    "layers": 6, "vocab_size": 2048, "seq_len": 128, "global_batch_size": 8, "microbatch_size": 2,
}  # fmt: skip
RANKS = (2, 4)

NOTES = (
    "everything on: supervisor, agent, heartbeats, a verified snapshot of every step in memory and of every 10th on "
    "disk, the vote, sample ledger, metrics of every step, wandb offline.",
    "bare loop: the same engine and data under torchrun; forward, backward, clipping and the optimizer, no more.",
    f"steps/s: of each round, by the median time between the ends of steps, without the first {SKIP}; rounds of both "
    "sides in turn. processor: seconds of processor time that a step costs, all processes of a role together.",
    "the two cores are all there is: what the supervisor and the agent use is taken from the ranks here, which a node "
    "with cores to spare would not notice.",
)


@dataclass
class Samples:
    """What was measured of one side: one rate a round; waits of every step; processor seconds a step, by role."""

    rates: list[float] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)
    data_s: list[float] = field(default_factory=list)
    processor_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="steps in each round")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of both sides")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for a quiet machine")
    options = parser.parse_args()
    if not options.no_wait:
        wait_for_quiet()
    here, taken_at, began_s = machine(), now(), time.monotonic()
    found: list[Series] = []
    with workspace("overhead") as place:
        corpus = small_corpus(place.disk / "corpus")
        for ranks in RANKS:
            job = place.disk / f"job-{ranks}.toml"
            job.write_text(JOB.format(corpus=corpus, steps=options.steps, ranks=ranks, **FIXED))
            bare, full = Samples(), Samples()
            for number in range(options.rounds):
                _bare(place, job, ranks, options.steps, bare)
                _everstep(place, job, f"overhead-{ranks}-{number}", options.steps, full)
                console.print(
                    f"{ranks} ranks, round {number + 1}: bare {bare.rates[-1]:.2f}, "
                    f"everything on {full.rates[-1]:.2f} steps/s"
                )
            found += [*_series("everstep", ranks, full), *_series("bare loop", ranks, bare)]
    result = Result(
        benchmark="overhead",
        taken_at=taken_at,
        seconds=round(time.monotonic() - began_s, 1),
        machine=here,
        versions=versions(),
        settings=settings({**FIXED, "steps": options.steps, "rounds": options.rounds}),
        series=tuple(sorted(found, key=lambda each: each.side, reverse=True)),
        ratios=tuple(
            ratio(f"{what}, {ranks} ranks", _named(found, "everstep", name), _named(found, "bare loop", name))
            for ranks in RANKS
            for what, name in (
                ("speed kept with everything on", f"{ranks} ranks"),
                ("processor time of the ranks themselves", f"{ranks} ranks: processor, ranks"),
            )
        ),
        notes=NOTES,
    )
    show(result)
    console.print(f"written to {write_result(result)}")


def _rate(ends: Sequence[float]) -> float:
    """Steps per second of a round, from times at which steps ended: by the median step, which a hiccup cannot move."""
    return 1.0 / statistics.median(later - earlier for earlier, later in itertools.pairwise(ends[SKIP:]))


def _bare(place: Workspace, job: Path, ranks: int, steps: int, into: Samples) -> None:
    """One round of the bare loop."""
    found = run_ranks(place, "benchmarks.overhead_ranks", ranks, str(job), str(steps), str(SKIP))
    into.rates.append(_rate(found["ends"]))
    into.processor_s["ranks"] += found["cpu_s"]


def _everstep(place: Workspace, job: Path, name: str, steps: int, into: Samples) -> None:
    """One round of a whole job."""
    run_dir, log = place.disk / "runs" / name, place.disk / f"{name}.out"
    words = ["-m", "cluster.cli", "run", str(job), "--run.dir", str(run_dir.parent), "--run.name", name]
    pid = place.start([*words, "--checkpoint.ram_dir", str(place.memory)], log)

    def reached(step: int) -> bool:
        if place.ended(pid) not in (None, 0):
            raise RuntimeError(tail(log))
        return place.ended(pid) is not None or len(read_steps(run_dir / "metrics.jsonl")) >= step

    wait_until(lambda: reached(SKIP), name, TIMEOUT_S, poll_s=0.05)
    began = len(read_steps(run_dir / "metrics.jsonl"))
    before = processor_times(pid, run_dir)
    wait_until(lambda: reached(steps - 1), name, TIMEOUT_S, poll_s=0.05)
    after = processor_times(pid, run_dir)
    counted = len(read_steps(run_dir / "metrics.jsonl")) - began
    wait_until(lambda: reached(steps) and place.ended(pid) is not None, name, TIMEOUT_S, poll_s=0.05)
    records = read_steps(run_dir / "metrics.jsonl")
    into.rates.append(_rate([record.t_wall_s for record in records]))
    into.stall_s += [record.stall_s for record in records[SKIP:]]
    into.data_s += [record.data_s for record in records[SKIP:]]
    for role, seconds in used_between(before, after).items():
        into.processor_s[role].append(seconds / counted)


def _series(side: str, ranks: int, samples: Samples) -> list[Series]:
    found = [series(side, f"{ranks} ranks", "steps/s", samples.rates)]
    if samples.stall_s:
        stalls, reads = ([1e3 * seconds for seconds in values] for values in (samples.stall_s, samples.data_s))
        found.append(series(side, f"{ranks} ranks: waiting for the snapshot", "ms", stalls))
        found.append(series(side, f"{ranks} ranks: waiting for data", "ms", reads))
    for role in ROLES:
        if values := samples.processor_s[role]:
            found.append(series(side, f"{ranks} ranks: processor, {role}", "cpu_s/step", values))
    return found


def _named(found: Sequence[Series], side: str, name: str) -> Series:
    return next(each for each in found if (each.side, each.name) == (side, name))


if __name__ == "__main__":
    main()
