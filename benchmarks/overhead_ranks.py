"""The bare loop of `benchmarks.overhead`: `-m benchmarks.overhead_ranks OUT CONFIG STEPS`. Figures: `step_s`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch.distributed as dist

from benchmarks.plainloop import build, join_group, read_from
from benchmarks.ranks import write_figures
from configs.load import load_job


def main() -> None:
    """Train, and write when each step ended."""
    out, config, steps = Path(sys.argv[1]), load_job(sys.argv[2]), int(sys.argv[3])
    world = join_group()
    loop = read_from(config, build(config, world), 1)
    ends = []
    for step in range(1, steps + 1):
        loop.compute(step)
        loop.update(step)
        ends.append(time.time())
    loop.data.close()
    if world.rank == 0:
        write_figures(out, {"ends": ends})
    dist.barrier()


if __name__ == "__main__":
    main()
