"""`python -m benchmarks.checkpoint`: the stall that a snapshot of every step puts into a step, against torch's own."""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.common import JOB, Workspace, console, show, small_corpus, wait_for_quiet, workspace
from benchmarks.ranks import run_ranks
from benchmarks.results import Result, Series, machine, now, ratio, series, settings, versions, write_result
from checkpointing.persister import Persister
from checkpointing.store import NodeStore, StoreEvent, StoreEventKind

RANKS = 2
WARM_UP = 3
SAVERS = ("none", "everstep", "dcp.async_save, tuned", "dcp.async_save", "dcp.save")
SIZES = {
    "small": {"layers": 6, "vocab_size": 2048},
    "large": {"layers": 6, "vocab_size": 73728},
}
FIXED = {"steps": 1000, "seq_len": 64, "global_batch_size": 4, "microbatch_size": 2, "ranks": RANKS}

NOTES = (
    "stall: time in which the training thread of the slowest rank is held up, call and wait together; every step is "
    "snapshotted.",
    "everstep: to shared memory with checksums while the next step computes, and to disk (read back from memory, "
    "verified, fsync, manifest last) as often as the disk allows; a step that finds the disk busy is kept in memory "
    "only, and training does not wait.",
    "dcp.async_save refuses a second save before the first is on disk: where that takes longer than a step, waiting is "
    "part of its stall. Tuned: plan cached, staging in a thread by a stager that is kept, written by a process from "
    "shared memory: the fastest of those tried on CPU. dcp.save has its plan cached too.",
    "limit: one plain copy of the same bytes, by all ranks at once; a copy that overlaps with computing can stall "
    "less, but costs the two cores as much.",
)


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="measured steps in each round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds over all savers")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for a quiet machine")
    options = parser.parse_args()
    if not options.no_wait:
        wait_for_quiet()
    here, taken_at, began_s = machine(), now(), time.monotonic()
    figures: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    with workspace("checkpoint") as place:
        for size, model in SIZES.items():
            corpus = small_corpus(place.disk / "corpus")
            job = place.disk / f"{size}.toml"
            job.write_text(JOB.format(corpus=corpus, **FIXED, **model))
            for _ in range(options.rounds):
                for saver in SAVERS:
                    found = _run(place, job, saver, options.steps)
                    for name, values in found.items():
                        figures[size, saver, name].extend(values)
                    console.print(
                        f"{size} {saver}: {1e3 * statistics.median(found['stall_s']):.1f} ms stall in a step of "
                        f"{1e3 * statistics.median(found['step_s']):.0f} ms"
                    )
    result = Result(
        benchmark="checkpoint",
        taken_at=taken_at,
        seconds=round(time.monotonic() - began_s, 1),
        machine=here,
        versions=versions(),
        settings=settings({**FIXED, "sizes": SIZES, "rounds": options.rounds, "measured steps": options.steps}),
        series=tuple(_series(figures)),
        ratios=tuple(
            ratio(f"stall, everstep of {peer}, {size}", _stall(figures, size, "everstep"), _stall(figures, size, peer))
            for size in SIZES
            for peer in SAVERS[2:]
        ),
        notes=NOTES,
    )
    show(result)
    console.print(f"written to {write_result(result)}")


def _run(place: Workspace, job: Path, saver: str, steps: int) -> dict[str, list[float]]:
    """One round of one saver. This process plays the agent's part: it persists what is in shared memory."""
    folder, segments = place.disk / "checkpoints", place.memory / "segments"
    committed: dict[int, float] = {}

    def on_event(event: StoreEvent) -> None:
        if event.kind is StoreEventKind.COMMITTED:
            committed[event.step] = time.monotonic()
        elif event.kind is StoreEventKind.FAILED:
            console.print(f"[bold red]{event.detail}[/]")

    persister = Persister(NodeStore(segments, folder), on_event).start()
    try:
        words = [str(job), str(folder), saver, str(steps), str(place.memory), str(WARM_UP)]
        found = run_ranks(place, "benchmarks.checkpoint_ranks", RANKS, *words)
        persister.flush(60.0)
    finally:
        persister.stop()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(segments, ignore_errors=True)
    begun = dict(zip(found.pop("begun_step", []), found.pop("begun_s", []), strict=True))
    durable = found.get("durable_s") or [at_s - begun[step] for step, at_s in committed.items()]
    if durable:
        on_disk_pct = 100.0 * len(durable) / (steps + WARM_UP)
        found |= {"durable_s": durable, "on_disk_pct": [on_disk_pct]}
    return found


def _stall(figures: dict[tuple[str, str, str], list[float]], size: str, saver: str) -> Series:
    return series(saver, f"{size}: stall", "ms", [1e3 * value for value in figures[size, saver, "stall_s"]])


def _series(figures: dict[tuple[str, str, str], list[float]]) -> list[Series]:
    found = []
    for saver in SAVERS:
        for size in SIZES:
            if saver != "none":
                found.append(_stall(figures, size, saver))
                durable = figures[size, saver, "durable_s"]
                if durable:
                    found.append(series(saver, f"{size}: begun to on disk", "s", durable))
                    reached = figures[size, saver, "on_disk_pct"]
                    found.append(series(saver, f"{size}: steps that reached the disk", "percent", reached))
            lengths = figures[size, saver, "step_s"]
            found.append(series(saver, f"{size}: step", "ms", [1e3 * value for value in lengths]))
    for size in SIZES:
        copies = [1e3 * value for value in figures[size, "none", "memcpy_s"]]
        found.append(series("limit", f"{size}: one copy in memory", "ms", copies))
        state = [value / 1e6 for value in figures[size, "none", "state_bytes"]]
        found.append(series("limit", f"{size}: state of a rank", "MB", state))
    return found


if __name__ == "__main__":
    main()
