"""`python -m benchmarks.overhead`: steps per second with everything on, with the probes off, and of a bare loop."""

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
# What looks at a step or at a node beside it, by family. What remains notices ends, silence and hangs.
PROBES: dict[str, tuple[str, ...]] = {
    "times of steps": ("--health.probe_steps", "false"),
    "record of collectives": ("--health.flight_record_entries", "0"),
    "checksums": ("--integrity.interval_steps", "0", "--integrity.replay_interval_steps", "0"),
    "numbers": ("--numbers.layers_interval_steps", "0", "--numbers.spike_z", "0"),
    "node": ("--health.node_probe_interval_s", "0", "--health.selftest_interval_minutes", "0"),
    "GPU": ("--health.gpu_interval_s", "0", "--health.dcgm_interval_s", "0"),
}
PROBES_OFF = tuple(word for words in PROBES.values() for word in words)

NOTES = (
    "everything on: supervisor, agent, heartbeats, a verified snapshot of every step in memory and of every 10th on "
    "disk, the vote, sample ledger, metrics of every step, wandb offline.",
    f"probes off: the same without {', '.join(PROBES)}.",
    "bare loop: the same engine and data under torchrun; forward, backward, clipping and the optimizer, no more.",
    f"steps/s: of each round, by the median time between the ends of steps, without the first {SKIP}; rounds of all "
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
    parser.add_argument("--rounds", type=int, default=4, help="rounds of all sides")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for a quiet machine")
    parser.add_argument("--quick", action="store_true", help="one short round on 2 ranks: whether it runs at all")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds, options.no_wait = 2 * SKIP, 1, True
    rank_counts = RANKS[:1] if options.quick else RANKS
    if not options.no_wait:
        wait_for_quiet()
    here, taken_at, began_s = machine(), now(), time.monotonic()
    found: list[Series] = []
    with workspace("overhead") as place:
        corpus = small_corpus(place.disk / "corpus")
        for ranks in rank_counts:
            found += _measure(place, corpus, ranks, options.steps, options.rounds)
    result = Result(
        benchmark="overhead",
        taken_at=taken_at,
        seconds=round(time.monotonic() - began_s, 1),
        machine=here,
        versions=versions(),
        settings=settings({**FIXED, "steps": options.steps, "rounds": options.rounds}),
        series=tuple(sorted(found, key=lambda each: each.side, reverse=True)),
        ratios=tuple(
            ratio(f"{what}, {ranks} ranks", _named(found, "everstep", name), _named(found, against, name))
            for ranks in rank_counts
            for what, against, name in (
                ("speed kept with everything on", "bare loop", f"{ranks} ranks"),
                ("processor time of the ranks themselves", "bare loop", f"{ranks} ranks: processor, ranks"),
                ("speed kept with the probes on", "probes off", f"{ranks} ranks"),
                ("processor time of the ranks with the probes on", "probes off", f"{ranks} ranks: processor, ranks"),
            )
        ),
        notes=NOTES,
    )
    show(result)
    if not options.quick:
        console.print(f"written to {write_result(result)}")


def _measure(place: Workspace, corpus: Path, ranks: int, steps: int, rounds: int) -> list[Series]:
    """All rounds of all sides at one number of ranks."""
    job = place.disk / f"job-{ranks}.toml"
    job.write_text(JOB.format(corpus=corpus, steps=steps, ranks=ranks, **FIXED))
    bare, full, unprobed = Samples(), Samples(), Samples()
    for number in range(rounds):
        _bare(place, job, ranks, steps, bare)
        # Which of the two comes first changes: the machine may get faster or slower while they run.
        sides = [("on", full, ()), ("off", unprobed, PROBES_OFF)]
        for name, into, words in sides if number % 2 == 0 else reversed(sides):
            _everstep(place, job, f"overhead-{ranks}-{number}-{name}", steps, into, words)
        console.print(
            f"{ranks} ranks, round {number + 1}: bare {bare.rates[-1]:.2f}, "
            f"everything on {full.rates[-1]:.2f}, probes off {unprobed.rates[-1]:.2f} steps/s"
        )
    sided = (("everstep", full), ("probes off", unprobed), ("bare loop", bare))
    return [each for side, samples in sided for each in _series(side, ranks, samples)]


def _rate(ends: Sequence[float]) -> float:
    """Steps per second of a round, from times at which steps ended: by the median step, which a hiccup cannot move."""
    return 1.0 / statistics.median(later - earlier for earlier, later in itertools.pairwise(ends[SKIP:]))


def _bare(place: Workspace, job: Path, ranks: int, steps: int, into: Samples) -> None:
    """One round of the bare loop."""
    found = run_ranks(place, "benchmarks.overhead_ranks", ranks, str(job), str(steps), str(SKIP))
    into.rates.append(_rate(found["ends"]))
    into.processor_s["ranks"] += found["cpu_s"]


def _everstep(
    place: Workspace, job: Path, name: str, steps: int, into: Samples, overrides: Sequence[str]
) -> None:  # fmt: skip
    """One round of a whole job."""
    run_dir, log = place.disk / "runs" / name, place.disk / f"{name}.out"
    words = ["-m", "cluster.cli", "run", str(job), "--run.dir", str(run_dir.parent), "--run.name", name]
    pid = place.start([*words, "--checkpoint.ram_dir", str(place.memory), *overrides], log)

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
