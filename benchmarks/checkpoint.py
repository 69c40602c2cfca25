"""`python -m benchmarks.checkpoint`: the stall that a snapshot of every step puts into a step, against torch's own."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

from benchmarks.common import JOB, console, show, small_corpus, wait_for_quiet, workspace
from benchmarks.ranks import run_ranks
from benchmarks.results import Result, Series, machine, now, ratio, series, settings, versions, write_result

RANKS = 2
SAVERS = ("none", "everstep", "dcp.async_save", "dcp.save")
SIZES = {
    "small": {"layers": 6, "vocab_size": 2048},
    "large": {"layers": 6, "vocab_size": 49152},
}
FIXED = {"steps": 1000, "seq_len": 64, "global_batch_size": 4, "microbatch_size": 2, "ranks": RANKS}

NOTES = (
    "stall: time in which the training thread of the slowest rank is held up, begin and wait together; every step is "
    "snapshotted.",
    "everstep stages to shared memory with checksums in the background of the next step, and writes to disk (fsync, "
    "manifest last) as often as the disk allows; dcp writes every step, async_save after a blocking copy to memory.",
    "async_save refuses a second save before the first has ended: where the disk is slower than a step, the wait for "
    "it is part of its stall.",
    "limit: one plain copy of the same bytes in memory; a copy that overlaps with computing can stall less.",
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
                    folder, memory = place.disk / "checkpoints", place.memory
                    words = [str(job), str(folder), saver, str(options.steps), str(memory)]
                    found = run_ranks(place, "benchmarks.checkpoint_ranks", RANKS, *words)
                    for name, values in found.items():
                        figures[size, saver, name].extend(values)
                    console.print(f"{size} {saver}: {sum(found['stall_s']) / len(found['stall_s']) * 1e3:.1f} ms stall")
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
            for peer in ("dcp.async_save", "dcp.save")
        ),
        notes=NOTES,
    )
    show(result)
    console.print(f"written to {write_result(result)}")


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
