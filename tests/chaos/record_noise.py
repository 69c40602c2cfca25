"""`python -m tests.chaos.record_noise OUT`: records where the time of the steps of an undisturbed 4-rank run went.

What tests of `health.straggler` draw their noise from. A line a step; in it, for each rank, microseconds of data,
forward, backward, waiting, optimizer, snapshot, and of the whole step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

from cluster.rundir import RunDir
from tests.chaos.conftest import CONFIG
from tests.chaos.jobs import Job
from trainer.events import StepTimes
from trainer.paths import times_path
from trainer.prepare import PrepareSettings, prepare
from trainer.timings import TimesFile

RANKS = 4
FIRST_STEP = 3


def main() -> None:
    """Record, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="noise-") as folder:
        steps = _record(Path(folder), options.steps)
    lines = [" ".join(_words(by_rank[rank]) for rank in range(RANKS)) for _, by_rank in sorted(steps.items())]
    options.out.write_text("\n".join(lines) + "\n")


def _record(home: Path, steps: int) -> dict[int, dict[int, StepTimes]]:
    prepare((), home / "corpus", PrepareSettings(vocab_size=512, library_max_bytes=1 << 20))
    (home / "job.toml").write_text(CONFIG.format(corpus=home / "corpus"))
    small = ["--parallelism.tp", "1", "--parallelism.dp_shard", str(RANKS), "--cluster.nodes", "1"]
    small += ["--cluster.ranks_per_node", str(RANKS), "--cluster.spares", "0", "--training.steps", str(steps)]
    small += ["--training.global_batch_size", "8", "--training.seq_len", "64"]
    job = Job(home, "noise", "job.toml", [*small, "--checkpoint.persist_interval_steps", "100"]).start()
    try:
        return _follow(job, steps)
    finally:
        job.end()


def _follow(job: Job, last: int) -> dict[int, dict[int, StepTimes]]:
    found: dict[int, dict[int, StepTimes]] = defaultdict(dict)
    path = times_path(RunDir(job.run_dir.absolute()).ram_root("/dev/shm") / "node0")
    job.wait_until(path.exists, "the file of times")
    file = TimesFile(path, RANKS).open()

    def complete() -> bool:
        for rank in range(RANKS):
            for times in file.read(rank, 1):
                found[times.step][rank] = times
        return len(found.get(last - 1, ())) == RANKS

    job.wait_until(complete, f"step {last - 1}", 3600.0)
    file.close()
    assert job.finish() == 0
    assert set(found) >= set(range(FIRST_STEP, last)), "steps were missed"
    return {step: by_rank for step, by_rank in found.items() if FIRST_STEP <= step < last}


def _words(times: StepTimes) -> str:
    parts = (times.data_s, times.forward_s, times.backward_s, times.wait_s, times.optimizer_s, times.snapshot_s)
    return ",".join(str(round(1e6 * seconds)) for seconds in (*parts, times.total_s))


if __name__ == "__main__":
    main()
