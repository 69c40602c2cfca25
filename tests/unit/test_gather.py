"""Bringing shards into memory before workers start: from wherever they are whole, leaving nothing of what failed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from checkpointing.gather import Gathered, Gatherer, Need
from checkpointing.layout import ShardRef
from checkpointing.ratelimit import never
from checkpointing.store import NodeStore
from tests.transfer_helpers import KEY, Node, a_node, bytes_of, flip, ref_of, shard_in


def gather(folder: Path, need: Need, stop: Callable[[], bool] = never) -> tuple[Gathered, NodeStore]:
    """What becomes of a need on a node without anything."""
    (folder / "slots").mkdir(parents=True)
    (folder / "run").mkdir()
    with a_node(folder / "own") as own:
        store = NodeStore(folder / "slots", folder / "run")
        results: list[Gathered] = []
        Gatherer(store, own.copies, KEY, folder, stop).gather([need], results.append)
    return results[0], store


def address_of(node: Node, ref: ShardRef, damaged: bool = False) -> str:
    if damaged:
        flip(node.shards[ref].path, node.shards[ref].start_bytes + 2000)
    return node.address


def test_a_damaged_shard_is_had_from_the_next_peer(tmp_path: Path) -> None:
    shard = shard_in(tmp_path, 5000)
    ref = ref_of(shard)
    with a_node(tmp_path / "bad") as bad, a_node(tmp_path / "good") as good:
        (tmp_path / "b").mkdir()
        bad.shards[ref] = shard_in(tmp_path / "b", 5000)
        good.shards[ref] = shard
        addresses = (address_of(bad, ref, damaged=True), address_of(good, ref))
        result, store = gather(tmp_path / "node", Need(ref, 1, addresses))
    assert result.origin == f"peer {good.address}"
    found = store.find(ref)
    assert found is not None
    assert found.path.name == "snapshot-1-0.seg"
    assert bytes_of(found) == bytes_of(shard)


def test_what_could_not_be_had_takes_no_memory(tmp_path: Path) -> None:
    """Promise: half a shard, or a false one, does not stay in shared memory for as long as the generation runs."""
    shard = shard_in(tmp_path, 5000)
    ref = ref_of(shard)
    with a_node(tmp_path / "bad") as bad:
        bad.shards[ref] = shard
        result, _ = gather(tmp_path / "node", Need(ref, 0, (address_of(bad, ref, damaged=True),)))
    assert "checksum" in result.problem
    assert [name for name in os.listdir(tmp_path / "node") if name.endswith(".seg")] == []


def test_a_plan_that_is_over_is_not_gathered_for(tmp_path: Path) -> None:
    """Promise: when a newer generation is wanted, nobody sits out the transfer of a shard for the older one."""
    shard = shard_in(tmp_path, 5 * 2**20)
    asked = iter([False, False, False])
    with a_node(tmp_path / "peer") as peer:
        peer.shards[ref_of(shard)] = shard
        need = Need(ref_of(shard), 0, (peer.address,))
        result, _ = gather(tmp_path / "node", need, lambda: next(asked, True))
    assert "stopped" in result.problem
    assert [name for name in os.listdir(tmp_path / "node") if name.endswith(".seg")] == []
