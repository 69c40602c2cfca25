"""Promise: a worker that is killed in the middle of staging leaves nothing that is ever loaded, and loses one step."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checkpointing.manager import SnapshotManager
from checkpointing.segment import SLOTS, SlotState, read_control, segment_name
from checkpointing.store import NodeStore
from tests.checkpoint_helpers import Tensors

pytestmark = pytest.mark.distributed

WORKER = """
import sys
from pathlib import Path
from tests.distributed.test_checkpoint_killed import manager_of, state_of
folder = Path(sys.argv[1])
manager = manager_of(folder, state_of(0), generation=1)
for step in range(1, 1_000_000):
    for tensor in manager.state["model"].tensors.values():
        tensor.fill_(step)
    manager.stage(step, False, {"step": step})
    manager.wait()
"""


def state_of(value: float) -> Tensors:
    """64 MiB that all say the same: a torn copy would show two values."""
    return Tensors({f"w{i}": torch.full((2**20,), value) for i in range(16)})


def manager_of(folder: Path, state: Tensors, generation: int) -> SnapshotManager:
    """A manager of a run of one rank."""
    manager = SnapshotManager({"model": state}, folder, 0, 0, 1, generation, folder / "run", {})
    manager.prepare()
    return manager


def slots(folder: Path) -> list[tuple[SlotState, int]]:
    """State and step of each slot, as an agent sees them."""
    seen = []
    for slot in range(SLOTS):
        path = folder / segment_name(0, slot)
        if path.exists():
            fd = os.open(path, os.O_RDONLY)
            try:
                state, control = read_control(fd)
            finally:
                os.close(fd)
            seen.append((state, control.step if control else -1))
    return seen


def kill_while_staging(worker: subprocess.Popen[bytes], folder: Path) -> None:
    """SIGKILL as soon as the worker stages its fourth step or a later one, over a slot that held a whole snapshot."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        seen = slots(folder)
        if (
            len(seen) == SLOTS
            and all(step > 0 for _, step in seen)
            and any(state is SlotState.STAGING for state, _ in seen)
        ):
            worker.kill()
            worker.wait()
            return
        assert worker.poll() is None, "the worker died by itself"
        time.sleep(0.0005)
    raise AssertionError(f"never seen staging: {slots(folder)}")


def test_a_worker_killed_while_staging(tmp_path: Path) -> None:
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(folder)])
        try:
            kill_while_staging(worker, folder)
        finally:
            worker.kill()
            worker.wait()
        left = slots(folder)
        if any(state is SlotState.STAGING for state, _ in left):
            break
    states = sorted(state for state, _ in left)
    assert states == [SlotState.STAGING, SlotState.COMPLETE, SlotState.COMPLETE]
    inventory = NodeStore(folder, folder / "run").inventory()
    newest = max(step for state, step in left if state is SlotState.COMPLETE)
    assert [shard.step for shard in inventory] == [newest - 1, newest]
    torn = next(step for state, step in left if state is SlotState.STAGING)
    state = state_of(-1)
    again = manager_of(folder, state, generation=2)
    assert again.load(torn, lambda ok: ok, lambda values: values) is None
    assert all(bool((tensor == -1).all()) for tensor in state.tensors.values())


def test_the_step_before_is_loaded_after_the_kill(tmp_path: Path) -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)])
    try:
        kill_while_staging(worker, tmp_path)
    finally:
        worker.kill()
        worker.wait()
    newest = max(shard.step for shard in NodeStore(tmp_path, tmp_path / "run").inventory())
    state = state_of(-1)
    again = manager_of(tmp_path, state, generation=2)
    loaded = again.load(newest, lambda ok: ok, lambda values: values)
    assert loaded is not None
    assert (loaded.step, loaded.tier, loaded.scalars) == (newest, "ram", {"step": newest})
    assert all(bool((tensor == newest).all()) for tensor in state.tensors.values())
    again.stage(newest + 1, False, {})
    again.wait()
    assert again.newest_complete == newest + 1
