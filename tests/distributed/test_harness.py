"""The harness that other tests stand on: it returns in rank order, tells who failed, and leaves nothing running."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from parallelism.mesh import World
from tests.harness import RanksFailedError, run_ranks

pytestmark = pytest.mark.distributed


def summed(world: World, base: int) -> tuple[int, int]:
    """This rank, and the sum of base plus rank over all."""
    value = torch.tensor(base + world.rank)
    dist.all_reduce(value)
    return world.rank, int(value)


def failing(world: World, folder: Path) -> None:
    """Rank 1 raises while rank 0 waits for it."""
    (folder / str(world.rank)).write_text(str(os.getpid()))
    if world.rank == 1:
        raise RuntimeError("rank one is broken")
    dist.barrier()


def killed(world: World, folder: Path) -> None:
    """Rank 1 dies without a word."""
    (folder / str(world.rank)).write_text(str(os.getpid()))
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def hanging(world: World, folder: Path) -> None:
    """Nobody comes back."""
    (folder / str(world.rank)).write_text(str(os.getpid()))
    signal.pause()


def assert_all_gone(folder: Path) -> None:
    """Every process that left its pid in the folder has ended."""
    pids = [int(path.read_text()) for path in folder.iterdir()]
    deadline = time.monotonic() + 5.0
    while alive := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.01)


def test_results_come_in_rank_order() -> None:
    """Arguments arrive, collectives work, results are ordered."""
    assert run_ranks(3, summed, 10) == [(0, 33), (1, 33), (2, 33)]


def test_error_is_told_and_peers_are_killed(tmp_path: Path) -> None:
    """The failing rank's traceback is in the message, and its peer does not stay behind."""
    with pytest.raises(RanksFailedError, match="rank one is broken"):
        run_ranks(2, failing, tmp_path)
    assert_all_gone(tmp_path)


def test_silent_death_is_told(tmp_path: Path) -> None:
    """A rank killed by a signal fails the job although it says nothing."""
    with pytest.raises(RanksFailedError, match="rank 1: died without a word"):
        run_ranks(2, killed, tmp_path)
    assert_all_gone(tmp_path)


def test_hang_ends_at_the_timeout(tmp_path: Path) -> None:
    """Ranks that do not end are named and killed."""
    with pytest.raises(RanksFailedError, match=r"ranks \[0, 1\] did not end"):
        run_ranks(2, hanging, tmp_path, timeout_s=5.0)
    assert_all_gone(tmp_path)
