"""Copies of other nodes' shards: only whole ones count, the newest is never lost, and memory is used again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointing import segment
from checkpointing.copies import CopyRefusedError, CopyStore, Located, Refusal
from checkpointing.layout import HeldShard, ShardRef, Tier
from checkpointing.segment import CONTROL_BYTES, SlotState, read_control, write_state
from tests.transfer_helpers import LAYOUT, bytes_of, flip, ref_of, shard_in


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CopyStore]:
    made = CopyStore(tmp_path / "copies")
    yield made
    made.close()


def send(store: CopyStore, shard: Located, start: int = 0, end: int | None = None, alter: bytes = b"") -> int:
    """Give a part of a shard's bytes to a store, as a connection would."""
    end = shard.control.size_bytes if end is None else end
    data = memoryview((bytes_of(shard)[start:end])[: end - start - len(alter)] + alter)
    done = 0

    def read_into(view: memoryview) -> int:
        nonlocal done
        count = min(len(view), 1000, len(data) - done)
        view[:count] = data[done : done + count]
        done += count
        return count

    return store.receive(shard.control, start, end, read_into, lambda: None)


def steps(store: CopyStore) -> list[int]:
    return [held.step for held in store.held()]


def test_a_copy_is_found_whole_and_only_whole(tmp_path: Path, store: CopyStore) -> None:
    shard = shard_in(tmp_path, 5000)
    assert send(store, shard, 0, 3000) == 3000
    assert store.find(ref_of(shard)) is None
    assert store.held() == []
    assert send(store, shard, 0, 0) == 3000, "an empty range asks only"
    assert send(store, shard, 3000) == 5000
    found = store.find(ref_of(shard))
    assert found is not None
    assert bytes_of(found) == bytes_of(shard)
    assert store.held() == [HeldShard(rank=0, world_size=2, step=1, generation=1, layout=LAYOUT, tier=Tier.PEER)]
    assert store.find(ShardRef(1, 2, 0)) is None
    assert os.stat(store.dir).st_mode & 0o777 == 0o700


def test_a_part_that_does_not_follow_is_refused(tmp_path: Path, store: CopyStore) -> None:
    shard = shard_in(tmp_path, 5000)
    send(store, shard, 0, 3000)
    for start in (0, 2999, 3001):
        with pytest.raises(CopyRefusedError, match="3000 bytes are here") as refused:
            send(store, shard, start)
        assert refused.value.refusal is Refusal.GAP


def test_bytes_that_do_not_verify_are_thrown_away(tmp_path: Path, store: CopyStore) -> None:
    """The older copy stays, and the same push can come again from its start."""
    older, newer = shard_in(tmp_path, 5000, step=1), shard_in(tmp_path, 5000, step=2)
    send(store, older)
    with pytest.raises(CopyRefusedError) as refused:
        send(store, newer, alter=b"!")
    assert refused.value.refusal is Refusal.DAMAGED
    assert steps(store) == [1]
    assert send(store, newer, 0, 0) == 0
    assert send(store, newer) == 5000
    assert steps(store) == [1, 2]


def test_two_copies_a_rank_and_no_memory_anew(tmp_path: Path, store: CopyStore) -> None:
    """After the third push the same three files are used in turn; another rank has its own."""
    send(store, shard_in(tmp_path, 5000, step=100, rank=1))
    inodes = []
    for step in range(1, 9):
        send(store, shard_in(tmp_path, 5000, step=step))
        assert [held.step for held in store.held() if held.rank == 0] == [step - 1, step][-min(step, 2) :]
        inodes.append({entry.inode() for entry in os.scandir(store.dir)})
    assert len(inodes[-1]) == 4
    assert all(after == inodes[2] for after in inodes[3:])


def test_a_smaller_or_larger_shard_gets_a_file_of_its_size(tmp_path: Path, store: CopyStore) -> None:
    for step, size_bytes in enumerate([5000, 100, 0, 9000, 9000], 1):
        send(store, shard_in(tmp_path, size_bytes, step=step))
        found = store.find(ShardRef(1, step, 0))
        assert found is not None
        assert found.path.stat().st_size == CONTROL_BYTES + size_bytes
    assert steps(store) == [4, 5]


def test_the_newest_copy_survives_every_instant_of_a_push(tmp_path: Path, store: CopyStore) -> None:
    """While a newer one comes in, the newest whole one verifies at any moment, and the one before it too."""
    for step in (1, 2, 3):
        send(store, shard_in(tmp_path, 5000, step=step))
    newer = shard_in(tmp_path, 5000, step=4)
    for end in range(1000, 5000, 1000):
        send(store, newer, end - 1000, end)
        assert steps(store) == [2, 3]
    send(store, newer, 4000)
    assert steps(store) == [3, 4]


def test_a_generation_replaces_the_one_before(tmp_path: Path, store: CopyStore) -> None:
    """A later generation's lower step is newer; an older one comes in only where there is a place for it."""
    for generation, step in [(1, 9), (1, 10), (2, 8)]:
        send(store, shard_in(tmp_path, 100, step=step, generation=generation))
    assert [(held.generation, held.step) for held in store.held()] == [(1, 10), (2, 8)]
    with pytest.raises(CopyRefusedError) as refused:
        send(store, shard_in(tmp_path, 100, step=9, generation=1))
    assert refused.value.refusal is Refusal.OLD


@pytest.mark.parametrize("offset_bytes", [CONTROL_BYTES + 17, 20, 0, 8])
def test_a_flipped_bit_in_a_copy_is_noticed(tmp_path: Path, store: CopyStore, offset_bytes: int) -> None:
    """In the bytes, in the control block's fields, magic and state: left out and removed, the other copy stays."""
    good, bad = shard_in(tmp_path, 5000, step=1), shard_in(tmp_path, 5000, step=2)
    send(store, good)
    send(store, bad)
    flip(store.dir / "copy-0-1-2.seg", offset_bytes)
    assert steps(store) == [1]
    assert store.find(ref_of(bad)) is None
    assert len(list(store.dir.iterdir())) == 1


def test_a_copy_is_given_away(tmp_path: Path, store: CopyStore) -> None:
    """Its file is the caller's, a whole segment, and no later push touches it."""
    shard = shard_in(tmp_path, 5000)
    send(store, shard)
    path = store.take(ref_of(shard))
    assert path is not None
    assert store.take(ref_of(shard)) is None
    assert store.held() == []
    path = path.rename(tmp_path / "slot.seg")
    for step in range(2, 6):
        send(store, shard_in(tmp_path, 5000, step=step))
    with open(path, "rb") as file:
        assert read_control(file.fileno()) == (SlotState.COMPLETE, shard.control)
    assert bytes_of(Located(path, CONTROL_BYTES, shard.control)) == bytes_of(shard)


def test_an_unfinished_file_under_a_copy_s_name_is_nothing(tmp_path: Path, store: CopyStore) -> None:
    shard = shard_in(tmp_path, 5000)
    send(store, shard)
    with open(store.dir / "copy-0-1-1.seg", "r+b") as file:
        write_state(file.fileno(), SlotState.STAGING)
    assert store.find(ref_of(shard)) is None
    assert store.take(ref_of(shard)) is None
    assert store.held() == []


def full(*args: object) -> None:
    raise OSError(28, os.strerror(28))


def test_without_room_for_a_third_file_the_older_copy_makes_room(
    tmp_path: Path, store: CopyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest copy stays whole throughout; with one copy only, the push is refused in words."""
    for step in (1, 2):
        send(store, shard_in(tmp_path, 5000, step=step))
    later = [shard_in(tmp_path, 5000, step=step) for step in (3, 4)]
    larger = shard_in(tmp_path, 6000, step=5)
    monkeypatch.setattr(segment.os, "posix_fallocate", full)
    send(store, later[0], 0, 1000)
    assert steps(store) == [2]
    send(store, later[0], 1000)
    assert steps(store) == [2, 3]
    send(store, later[1])
    with pytest.raises(CopyRefusedError, match=r"snapshots in memory need 0\.0 MiB more") as refused:
        send(store, larger)
    assert refused.value.refusal is Refusal.NO_ROOM
    assert steps(store) == [4], "the older one had made room, which was not enough"
    with pytest.raises(CopyRefusedError):
        send(store, larger)
    assert steps(store) == [4]
    monkeypatch.undo()
    send(store, larger)
    assert steps(store) == [4, 5]


def test_copies_that_go_elsewhere_by_now_make_room(small_disk: Path, tmp_path: Path) -> None:
    """Promise: who keeps whose copies may change; what is left of before does not keep the new ones out.

    Not before a later generation has begun, though, nor what belongs to ranks that are still kept for.
    """
    store = CopyStore(small_disk / "copies")
    store.keep_for([1, 2])
    for rank in (1, 2):
        for step in (1, 2):
            send(store, shard_in(tmp_path, 20_000, step=step, rank=rank))
    store.keep_for([1, 3])
    with pytest.raises(CopyRefusedError) as refused:
        send(store, shard_in(tmp_path, 20_000, step=2, rank=3))
    assert refused.value.refusal is Refusal.NO_ROOM
    for step in (3, 4):
        send(store, shard_in(tmp_path, 20_000, step=step, rank=3, generation=2))
    assert [(held.rank, held.step) for held in store.held()] == [(1, 1), (1, 2), (3, 3), (3, 4)]
    store.close()


def test_what_was_given_up_does_not_take_the_place_of_what_is_needed(tmp_path: Path, store: CopyStore) -> None:
    """Promise: one rank may be a step ahead when another fails, twice in a row; what all go on from stays here."""
    for step in (6, 7, 8):
        send(store, shard_in(tmp_path, 5000, step=step))
    for generation in (2, 3):
        store.go_on_from((1, 7), generation)
        with pytest.raises(CopyRefusedError, match="step 8 was given up"):
            send(store, shard_in(tmp_path, 5000, step=8, generation=generation - 1))
        send(store, shard_in(tmp_path, 5000, step=8, generation=generation))
        assert [(held.generation, held.step) for held in store.held()] == [(1, 7), (generation, 8)]


def test_an_older_generation_is_dropped(tmp_path: Path, store: CopyStore) -> None:
    """Also one that is half here, and one whose last byte comes after the fence."""
    shard = shard_in(tmp_path, 5000, generation=3)
    send(store, shard, 0, 3000)
    store.forget_before(4)
    store.forget_before(2)
    with pytest.raises(CopyRefusedError, match="generation 3 is over, 4 has begun"):
        send(store, shard, 3000)
    late = shard_in(tmp_path, 5000, generation=4)

    def last_bytes(view: memoryview) -> int:
        store.forget_before(5)
        view[:] = bytes_of(late)
        return len(view)

    with pytest.raises(CopyRefusedError, match="generation 4 is over"):
        store.receive(late.control, 0, 5000, last_bytes, lambda: None)
    assert store.held() == []


def test_close_leaves_nothing(tmp_path: Path) -> None:
    store = CopyStore(tmp_path / "copies")
    for step in (1, 2, 3):
        send(store, shard_in(tmp_path, 5000, step=step))
    send(store, shard_in(tmp_path, 5000, step=4), 0, 100)
    store.close()
    assert not (tmp_path / "copies").exists()
    assert store.held() == []
    with pytest.raises(CopyRefusedError, match="no copies are taken any more"):
        send(store, shard_in(tmp_path, 5000, step=5))
