"""`python -m benchmarks.overhead`: steps per second with everything on, against the bare loop."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

from benchmarks.common import JOB, Workspace, console, show, small_corpus, wait_for_quiet, wait_until, workspace
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
    f"times between the ends of steps, without the first {SKIP}; rounds of both sides in turn.",
    "the two cores are all there is: what the supervisor and the agent use is taken from the ranks here, which a node "
    "with cores to spare would not notice.",
)


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
            bare: list[float] = []
            full: list[float] = []
            for number in range(options.rounds):
                bare += _rates(
                    run_ranks(place, "benchmarks.overhead_ranks", ranks, str(job), str(options.steps))["ends"]
                )
                full += _rates(_everstep(place, job, f"overhead-{ranks}-{number}"))
                console.print(
                    f"{ranks} ranks, round {number + 1}: bare {statistics.median(bare):.2f}, "
                    f"everything on {statistics.median(full):.2f} steps/s"
                )
            found.append(series("everstep", f"{ranks} ranks", "steps/s", full))
            found.append(series("bare loop", f"{ranks} ranks", "steps/s", bare))
    result = Result(
        benchmark="overhead",
        taken_at=taken_at,
        seconds=round(time.monotonic() - began_s, 1),
        machine=here,
        versions=versions(),
        settings=settings({**FIXED, "steps": options.steps, "rounds": options.rounds}),
        series=tuple(sorted(found, key=lambda each: each.side, reverse=True)),
        ratios=tuple(
            ratio(f"speed kept with everything on, {ranks} ranks", found[2 * i], found[2 * i + 1])
            for i, ranks in enumerate(RANKS)
        ),
        notes=NOTES,
    )
    show(result)
    console.print(f"written to {write_result(result)}")


def _rates(ends: list[float]) -> list[float]:
    """Steps per second from times at which steps ended."""
    kept = ends[SKIP:]
    return [1.0 / (later - earlier) for earlier, later in itertools.pairwise(kept)]


def _everstep(place: Workspace, job: Path, name: str) -> list[float]:
    """Ends of the steps of a whole job."""
    runs = place.disk / "runs"
    words = ["-m", "cluster.cli", "run", str(job), "--run.dir", str(runs), "--run.name", name]
    pid = place.start([*words, "--checkpoint.ram_dir", str(place.memory)], place.disk / f"{name}.out")
    wait_until(lambda: place.ended(pid) is not None, name, TIMEOUT_S, poll_s=0.05)
    if place.ended(pid) != 0:
        raise RuntimeError((place.disk / f"{name}.out").read_text(errors="replace")[-3000:])
    return [record.t_wall_s for record in read_steps(runs / name / "metrics.jsonl")]


if __name__ == "__main__":
    main()
