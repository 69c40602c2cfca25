"""Sending copies: each keeper counts by itself, and a worker waits for those that can come, and no longer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from checkpointing.checksum import checksum
from checkpointing.copies import Located
from checkpointing.layout import ShardRef
from checkpointing.replicator import CopyEvent, Replicator
from checkpointing.segment import CONTROL_BYTES, Control, SlotState, open_segment, read_settled, segment_name
from tests.transfer_helpers import KEY, LAYOUT, Node, a_node, some_bytes


class Slots:
    """A worker's slots, written in turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def stage(self, step: int, generation: int = 1) -> Path:
        data = some_bytes(3000, step)
        control = Control(
            step=step, generation=generation, rank=0, world_size=2, size_bytes=3000, checksum=checksum(data),
            layout=LAYOUT,
        )  # fmt: skip
        segment = open_segment(self.folder / segment_name(0, step % 4), 3000)
        segment.state = SlotState.STAGING
        segment.data[:] = data
        segment.complete(control)
        segment.close()
        return segment.path


def settled(path: Path) -> tuple[int, int] | None:
    return read_settled(path.read_bytes()[:CONTROL_BYTES])


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Seconds until it holds."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < timeout_s, "it never came to hold"
        time.sleep(0.001)
    return time.monotonic() - began_s


@contextlib.contextmanager
def replicating(slots: Slots, targets: Sequence[str], events: list[CopyEvent]) -> Iterator[Replicator]:
    replicator = Replicator(slots.folder, KEY, 0, None, events.append)
    replicator.send_to(targets)
    replicator.start()
    try:
        yield replicator
    finally:
        replicator.stop()


def has(node: Node, step: int) -> bool:
    return isinstance(node.copies.find(ShardRef(1, step, 0)), Located)


def test_one_keeper_that_refuses_keeps_no_other_from_its_copy(tmp_path: Path) -> None:
    """Promise: with k copies each keeper counts by itself; of two, one that is full does not undo the other."""
    slots, events = Slots(tmp_path / "slots"), list[CopyEvent]()
    with a_node(tmp_path / "full") as full, a_node(tmp_path / "good") as good:
        full.copies.close()
        with replicating(slots, (full.address, good.address), events):
            for step in range(1, 4):
                slots.stage(step)
                until(lambda step=step: has(good, step))
    assert events == [], "a refusal that has just begun is not worth saying"


def test_nobody_waits_again_and_again_for_a_keeper_that_refuses(tmp_path: Path) -> None:
    """Promise: a peer that takes no copies does not make every step wait for the next try."""
    slots = Slots(tmp_path / "slots")
    with a_node(tmp_path / "full") as full:
        full.copies.close()
        with replicating(slots, (full.address,), []):
            waits = []
            for step in range(1, 7):
                path = slots.stage(step)
                waits.append(until(lambda path=path, step=step: settled(path) == (1, step)))
    assert sum(waits) < 0.8, waits


def test_without_keepers_nobody_waits_and_with_the_first_one_everybody_does(tmp_path: Path) -> None:
    """Promise: a spare that comes up after the workers keeps copies from then on, and steps wait for them."""
    slots = Slots(tmp_path / "slots")
    with a_node(tmp_path / "late") as late, replicating(slots, (), []) as replicator:
        path = slots.stage(1)
        until(lambda: settled(path) == (1, 1))
        replicator.send_to((late.address,))
        until(lambda: settled(path) == (1, 1))
        assert has(late, 1)


def test_a_new_keeper_is_waited_for(tmp_path: Path) -> None:
    """Promise: that an earlier keeper had a snapshot says nothing once another one keeps the copies."""
    slots = Slots(tmp_path / "slots")
    with a_node(tmp_path / "old") as old, a_node(tmp_path / "new") as new:
        path = slots.stage(1)
        with replicating(slots, (old.address,), []) as replicator:
            until(lambda: settled(path) == (1, 1))
            assert has(old, 1)
            replicator.send_to((new.address,))
            until(lambda: settled(path) == (1, 1))
            assert has(new, 1)


def test_what_was_given_up_is_not_sent(tmp_path: Path) -> None:
    """Promise: a new keeper gets the state that all go on from, not one rank's step beyond it."""
    slots, events = Slots(tmp_path / "slots"), list[CopyEvent]()
    with a_node(tmp_path / "node") as node:
        base, _ = slots.stage(1), slots.stage(2)
        with replicating(slots, (), events) as replicator:
            replicator.go_on_from((1, 1), 2)
            replicator.send_to((node.address,))
            until(lambda: has(node, 1) and settled(base) == (1, 1))
            assert not has(node, 2)
            slots.stage(2, generation=2)
            until(lambda: node.copies.find(ShardRef(2, 2, 0)) is not None)
    assert events == []


def test_a_keeper_that_recovers_gets_what_it_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: falling behind and catching up are each said once, and what was missed is sent."""
    monkeypatch.setattr("checkpointing.replicator._BEHIND_S", 0.1)
    monkeypatch.setattr("checkpointing.replicator._FIRST_REST_S", 0.05)
    slots, events = Slots(tmp_path / "slots"), list[CopyEvent]()
    with a_node(tmp_path / "node") as node:
        node.copies.dir.rename(tmp_path / "away")
        slots.stage(1)
        with replicating(slots, (node.address,), events):
            until(lambda: bool(events))
            (tmp_path / "away").rename(node.copies.dir)
            until(lambda: has(node, 1) and len(events) == 2)
    assert [event.behind for event in events] == [True, False]
