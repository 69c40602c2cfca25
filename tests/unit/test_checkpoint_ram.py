"""Promises of the RAM tier: what is loaded is what was staged, bit for bit, and nothing damaged is ever loaded."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
import torch

from checkpointing.checksum import checksum
from checkpointing.manager import SnapshotManager
from checkpointing.segment import CONTROL_BYTES, SLOTS_WITH_COPIES, SlotState, segment_name, write_settled
from checkpointing.store import NodeStore
from tests.checkpoint_helpers import OneRank, Tensors, flip_byte, sample_tensors


def slot_of(run: OneRank, step: int) -> Path:
    return next(s.segment.path for s in run.manager._slots if s.segment.control and s.segment.control.step == step)


def test_a_snapshot_is_the_state_at_the_moment_of_staging(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.stage(10)
    run.change()
    again = OneRank(tmp_path, seed=2, generation=2)
    loaded = again.load(ram_step=10)
    assert loaded is not None
    assert (loaded.step, loaded.tier, loaded.rejections) == (10, "ram", ())
    assert loaded.scalars == {"step": 10, "tokens": 10240}
    assert again.equals(seed=1)
    assert again.state.values == {"lr": 0.1, "betas": (0.9, 0.95), "name": "adamw"}


def test_volatile_tensors_are_copied_before_stage_returns(tmp_path: Path) -> None:
    """A buffer that the next forward changes is staged as it was when stage() was called."""
    run = OneRank(tmp_path, seed=1, volatile=lambda name: name == "model.weight")
    held = threading.Event()
    run.manager._thread.submit(held.wait)  # the background copy cannot begin before the change below
    run.manager.stage(10, False, {})
    run.state.tensors["weight"].zero_()
    held.set()
    run.manager.wait()
    again = OneRank(tmp_path, seed=2, generation=2)
    again.load(ram_step=10)
    assert again.equals(seed=1)


def test_plain_values_are_read_anew_for_every_snapshot(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.stage(1)
    assert run.state.values is not None
    run.state.values["lr"] = 0.7
    run.stage(2)
    run.load(ram_step=1)
    assert run.state.values["lr"] == 0.1
    run.state.values["lr"] = 0.0
    assert run.load(ram_step=2) is None, "steps after the loaded one are forgotten"


@pytest.mark.parametrize("offset_bytes", [CONTROL_BYTES + 20, CONTROL_BYTES + 20_000, -1, 20, 60])
def test_a_flipped_byte_in_memory_is_never_loaded(tmp_path: Path, offset_bytes: int) -> None:
    """In the header, in a tensor, in the last byte, in the control block's step, in its checksum."""
    run = OneRank(tmp_path, seed=1)
    run.stage(10)
    path = slot_of(run, 10)
    flip_byte(path, offset_bytes if offset_bytes >= 0 else path.stat().st_size - 1)
    again = OneRank(tmp_path, seed=2, generation=2)
    assert again.store.inventory() == []
    refused: list[str] = []
    if offset_bytes in (20, 60):
        assert again.manager.load(10, lambda ok: ok, lambda v: v, lambda r: refused.append(r.reason)) is None
        assert again.equals(seed=2), "nothing was written into the state"
    else:
        with pytest.raises(OSError, match="nothing but memory had step 10"):
            again.manager.load(10, lambda ok: ok, lambda v: v, lambda r: refused.append(r.reason))
    assert len(refused) == 1
    assert "snapshot" in refused[0]


def test_the_inventory_lists_whole_snapshots_only(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.stage(10)
    run.stage(11)
    digest = run.manager._plan.digest
    assert [(s.rank, s.step, s.generation, s.layout) for s in run.store.inventory()] == [
        (0, 10, 1, digest), (0, 11, 1, digest)
    ]  # fmt: skip
    run.manager._slots[0].segment.state = SlotState.STAGING
    assert len(run.store.inventory()) == 1


def test_every_rank_takes_the_generation_that_rank_0_has(tmp_path: Path) -> None:
    """Step 11 was made twice; rank 0 has only the first. This rank must not load its second."""
    run = OneRank(tmp_path, seed=1)
    run.stage(11)
    later = OneRank(tmp_path, seed=2, generation=2)
    later.stage(11)
    third = OneRank(tmp_path, seed=3, generation=3)
    third.manager.load(11, agree=lambda ok: ok, broadcast=lambda values: [1])
    assert third.equals(seed=1)


def test_one_slot_is_always_free_while_the_agent_is_slow(tmp_path: Path) -> None:
    """Ten steps with one snapshot stuck at the agent: it stays untouched, and so does the newest before each step."""
    run = OneRank(tmp_path, seed=1)
    run.stage(10, persist=True)
    stuck = slot_of(run, 10)
    before = stuck.read_bytes()
    for step in range(11, 21):
        assert run.manager.persist_busy
        run.change()
        run.stage(step)
        assert run.manager.newest_complete == step
    assert stuck.read_bytes() == before
    run.store.persist_pending()
    assert not run.manager.persist_busy


def test_another_layout_is_not_loaded_from_memory(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.stage(10)
    other = SnapshotManager(
        {"model": run.state}, run.ram_dir, 0, 0, 1, 2, run.run_dir, {"dp_shard": 1, "tp": 1}
    )  # fmt: skip
    other.prepare()
    refused: list[str] = []
    assert other.load(10, lambda ok: ok, lambda v: v, lambda r: refused.append(r.reason)) is None
    assert len(refused) == 1


def test_after_a_failed_agreement_nobody_goes_on_from_nothing(tmp_path: Path) -> None:
    """This rank's memory was whole, another's was not, and no other tier has anything: the state is worthless."""
    run = OneRank(tmp_path, seed=1)
    run.stage(10)
    again = OneRank(tmp_path, seed=2, generation=2)
    with pytest.raises(OSError, match="damaged on some rank"):
        again.manager.load(10, agree=lambda ok: False, broadcast=lambda values: values)


def test_shared_memory_that_is_too_small_is_an_error_in_words_and_no_sigbus(tmp_path: Path) -> None:
    """A file size limit stands in for a full file system; nothing half-made stays behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(ValueError, match=r"MiB more in .*set checkpoint\.ram_dir"):
            OneRank(tmp_path, seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "ram") == []


def test_closing_the_store_leaves_nothing_of_ours_and_everything_else(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    (run.ram_dir / "heartbeats").write_bytes(b"x")
    (run.ram_dir / (segment_name(0, 0) + ".tmp")).write_bytes(b"half made")
    run.manager.close()
    run.store.close()
    assert os.listdir(run.ram_dir) == ["heartbeats"]


def test_an_error_while_staging_reaches_wait_and_the_slot_is_never_loaded(tmp_path: Path) -> None:
    tensors = sample_tensors(1)
    run = OneRank(tmp_path, seed=1)
    run.manager._copier.tensors[0] = torch.zeros(3, 3, 3)
    run.manager.stage(10, False, {})
    with pytest.raises(RuntimeError):
        run.manager.wait()
    assert run.store.inventory() == []
    assert tensors.keys() == run.state.tensors.keys()


def test_slots_are_private_to_their_user(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    assert {path.stat().st_mode & 0o777 for path in run.ram_dir.iterdir()} == {0o600}


def test_bytes_in_memory_are_the_bytes_on_disk(tmp_path: Path) -> None:
    run = OneRank(tmp_path, seed=1)
    run.persist(10)
    in_memory = slot_of(run, 10).read_bytes()[CONTROL_BYTES:]
    on_disk = (run.run_dir / "checkpoints/step-10/g1-rank00000.safetensors").read_bytes()
    assert checksum(in_memory) == checksum(on_disk)


def test_an_empty_state_and_an_empty_folder_are_fine(tmp_path: Path) -> None:
    manager = SnapshotManager({"model": Tensors({})}, tmp_path, 0, 0, 1, 1, tmp_path, {})
    manager.prepare()
    assert manager.newest_complete is None
    assert manager.wait() == 0.0
    assert manager.load(-1, lambda ok: ok, lambda v: v) is None
    assert NodeStore(tmp_path / "absent", tmp_path).inventory() == []


def test_the_last_snapshot_that_peers_have_stays(tmp_path: Path) -> None:
    """Promise: if peers get every n-th step only, each rank still has the newest of those when a node is lost."""
    run = OneRank(tmp_path, seed=1, slots=SLOTS_WITH_COPIES)
    for step in range(1, 20):
        run.stage(step)
        if step % 6 == 0:
            with slot_of(run, step).open("r+b") as file:
                write_settled(file.fileno(), (1, step))
        in_memory = {shard.step for shard in run.store.inventory()}
        assert {step, step - step % 6} - {0} <= in_memory
