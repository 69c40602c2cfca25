"""The bare loop of `benchmarks.overhead`: `-m benchmarks.overhead_ranks OUT CONFIG STEPS SKIP`.

Figures: `ends`, wall times at which steps ended; `cpu_s`, processor time of all ranks a step, without the first SKIP.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.plainloop import build, join_group, read_from
from benchmarks.ranks import write_figures
from configs.load import load_job


def main() -> None:
    """Train, and write when each step ended."""
    out, config, steps, skip = Path(sys.argv[1]), load_job(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    world = join_group()
    loop = read_from(config, build(config, world), 1)
    ends: list[float] = []
    before_s = time.process_time()
    for step in range(1, steps + 1):
        loop.compute(step)
        loop.update(step)
        ends.append(time.time())
        if step == skip:
            before_s = time.process_time()
    cpu_s = torch.tensor([(time.process_time() - before_s) / (steps - skip)], dtype=torch.float64)
    dist.all_reduce(cpu_s)
    loop.data.close()
    if world.rank == 0:
        write_figures(out, {"ends": ends, "cpu_s": [float(cpu_s.item())]})
    dist.barrier()


if __name__ == "__main__":
    main()
