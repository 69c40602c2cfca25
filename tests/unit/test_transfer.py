"""Peer transfer: what arrives is what was sent, wherever the connection was cut; what does not verify is refused."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointing.layout import Shard, ShardRef
from checkpointing.ratelimit import RateLimit
from checkpointing.segment import CONTROL_BYTES
from checkpointing.sources import SourceError
from checkpointing.transfer_client import PeerSource, TransferClient, TransferError
from tests.transfer_helpers import (
    KEY,
    Node,
    a_node,
    bytes_of,
    cutting,
    flip,
    ref_of,
    shard_in,
)

MIB = 2**20


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with a_node(tmp_path) as made:
        yield made


@pytest.fixture
def client() -> Iterator[TransferClient]:
    with contextlib.closing(TransferClient(KEY, timeout_s=5.0)) as made:
        yield made


@pytest.mark.parametrize("size_bytes", [0, 1, 4095, MIB, 3 * MIB + 17])
def test_push_and_fetch_are_exact(tmp_path: Path, node: Node, client: TransferClient, size_bytes: int) -> None:
    """A shard that goes to a peer and comes back is the same, and its control block too."""
    shard = shard_in(tmp_path, size_bytes)
    client.push(node.address, shard)
    copy = node.copies.find(ref_of(shard))
    assert copy is not None
    assert copy.control == shard.control
    assert bytes_of(copy) == bytes_of(shard)
    into = tmp_path / "into"
    assert client.fetch(node.address, ref_of(shard), into, CONTROL_BYTES) == shard.control
    assert into.read_bytes()[CONTROL_BYTES:] == bytes_of(shard)


def test_a_connection_is_kept(tmp_path: Path, node: Node, client: TransferClient) -> None:
    """Many transfers, whole or asked for in vain by push, go over one connection."""
    with cutting(node.port, []) as proxy:
        for step in range(1, 5):
            shard = shard_in(tmp_path, MIB, step)
            client.push(proxy.address, shard)
            client.push(proxy.address, shard)
            client.fetch(proxy.address, ref_of(shard), tmp_path / "into", 0)
        assert proxy.connections == 1


def test_push_goes_on_where_it_was_cut(tmp_path: Path, node: Node, client: TransferClient) -> None:
    """Three cut connections cost little more than the shard's own bytes on the wire."""
    shard = shard_in(tmp_path, 16 * MIB)
    with cutting(node.port, [5 * MIB, 4 * MIB + 333, 3 * MIB]) as proxy:
        client.push(proxy.address, shard)
        assert proxy.connections == 4
        assert proxy.passed_bytes < 23 * MIB
    copy = node.copies.find(ref_of(shard))
    assert copy is not None
    assert bytes_of(copy) == bytes_of(shard)


def test_push_goes_on_from_what_an_earlier_client_sent(tmp_path: Path, node: Node) -> None:
    """The receiver keeps what came of this very shard: another client, later, sends only the rest."""
    shard = shard_in(tmp_path, 16 * MIB)
    with cutting(node.port, [12 * MIB, 0, 0, 0, 0]) as proxy, contextlib.closing(TransferClient(KEY)) as first:
        with pytest.raises(TransferError, match="tries"):
            first.push(proxy.address, shard)
        assert proxy.connections == 4
    assert node.copies.find(ref_of(shard)) is None
    with cutting(node.port, []) as proxy, contextlib.closing(TransferClient(KEY)) as second:
        second.push(proxy.address, shard)
        assert proxy.passed_bytes < 8 * MIB
    assert node.copies.find(ref_of(shard)) is not None


def test_fetch_goes_on_where_it_was_cut(tmp_path: Path, node: Node, client: TransferClient) -> None:
    shard = shard_in(tmp_path, 16 * MIB)
    node.shards[ref_of(shard)] = shard
    with cutting(node.port, [5 * MIB, 4 * MIB + 333, 3 * MIB]) as proxy:
        client.fetch(proxy.address, ref_of(shard), tmp_path / "into", 7)
        assert proxy.connections == 4
        assert proxy.passed_bytes < 23 * MIB
    assert (tmp_path / "into").read_bytes()[7:] == bytes_of(shard)


def test_a_peer_that_is_gone_is_said(tmp_path: Path, client: TransferClient) -> None:
    """Unreachable, and cut off again and again: one line with the address."""
    shard = shard_in(tmp_path, MIB)
    with a_node(tmp_path) as node, cutting(node.port, [1000] * 9) as proxy:
        with pytest.raises(TransferError, match=proxy.address):
            client.push(proxy.address, shard)
        assert proxy.connections == 4
    with pytest.raises(TransferError, match=rf"{node.address}: Connection refused \(4 tries\)"):
        client.push(node.address, shard)
    with pytest.raises(TransferError, match=f"{node.address}: "):
        client.fetch(node.address, ref_of(shard), tmp_path / "into", 0)


def test_a_peer_that_says_nothing_is_waited_for_once(tmp_path: Path) -> None:
    """A node without power takes no connections and refuses none: one wait of timeout_s, not one for each try."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            contextlib.closing(TransferClient(KEY, timeout_s=0.2)) as client,
            pytest.raises(TransferError, match=rf"{address}: no answer within 0.2 s"),
        ):
            client.push(address, shard_in(tmp_path, MIB))
        listener.settimeout(0)
        listener.accept()[0].close()
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_source_that_changed_on_the_way_is_refused(tmp_path: Path, node: Node, client: TransferClient) -> None:
    """A slot that its worker overwrites while it is sent never becomes a copy, and the older copy stays."""
    older, newer = shard_in(tmp_path, 2 * MIB, step=1), shard_in(tmp_path, 2 * MIB, step=2)
    client.push(node.address, older)
    flip(newer.path, CONTROL_BYTES + MIB)
    with pytest.raises(TransferError, match="do not have the shard's checksum"):
        client.push(node.address, newer)
    assert node.copies.find(ref_of(newer)) is None
    assert [held.step for held in node.copies.held()] == [1]
    flip(newer.path, CONTROL_BYTES + MIB)
    client.push(node.address, newer)
    assert [held.step for held in node.copies.held()] == [1, 2]


def test_a_source_that_is_gone_or_short_is_said(tmp_path: Path, node: Node, client: TransferClient) -> None:
    shard = shard_in(tmp_path, MIB)
    with open(shard.path, "r+b") as file:
        file.truncate(CONTROL_BYTES + 1000)
    with pytest.raises(TransferError, match="ended early"):
        client.push(node.address, shard)
    shard.path.unlink()
    with pytest.raises(TransferError, match="cannot be read"):
        client.push(node.address, shard)
    assert node.copies.held() == []


def test_fetched_bytes_that_do_not_verify_are_refused(tmp_path: Path, node: Node, client: TransferClient) -> None:
    shard = shard_in(tmp_path, MIB)
    node.shards[ref_of(shard)] = shard
    flip(shard.path, CONTROL_BYTES + 5)
    with pytest.raises(TransferError, match="checksum"):
        client.fetch(node.address, ref_of(shard), tmp_path / "into", 0)
    with pytest.raises(TransferError, match="has no such shard"):
        client.fetch(node.address, ShardRef(1, 99, 0), tmp_path / "into", 0)


def test_an_older_generation_is_refused(tmp_path: Path, node: Node, client: TransferClient) -> None:
    """An orphan from before a partition cannot replace its successor's copies."""
    before = shard_in(tmp_path, MIB, step=5, generation=1)
    client.push(node.address, before)
    node.copies.forget_before(2)
    with pytest.raises(TransferError, match=r"generation 1 is over, 2 has begun \(status 409\)"):
        client.push(node.address, shard_in(tmp_path, MIB, step=6, generation=1))
    assert [held.step for held in node.copies.held()] == [5], "what was whole stays until newer ones replace it"
    client.push(node.address, shard_in(tmp_path, MIB, step=4, generation=2))
    client.push(node.address, shard_in(tmp_path, MIB, step=5, generation=2))
    assert [(held.generation, held.step) for held in node.copies.held()] == [(2, 4), (2, 5)]


def test_a_push_under_way_is_cut_by_a_new_generation(tmp_path: Path, node: Node) -> None:
    """forget_before does not wait for the orphan: it is cut off, and told why when it comes back."""
    shard = shard_in(tmp_path, 8 * MIB)
    under_way = threading.Event()

    def fence() -> bool:
        if not under_way.is_set() and node.copies._incoming.get(0) and node.copies._incoming[0].received_bytes:
            under_way.set()
            node.copies.forget_before(2)
        return False

    with (
        contextlib.closing(TransferClient(KEY, RateLimit(40e6), stop=fence)) as client,
        pytest.raises(TransferError, match="generation 1 is over"),
    ):
        client.push(node.address, shard)
    assert under_way.is_set()
    assert node.copies.held() == []


def test_a_new_push_takes_over_from_one_that_hangs(tmp_path: Path, node: Node) -> None:
    """A connection that went silent in the middle does not block the next push of the rank."""
    first, second = shard_in(tmp_path, 8 * MIB, step=1), shard_in(tmp_path, 8 * MIB, step=2)
    hanging, go_on = threading.Event(), threading.Event()

    def hang() -> bool:
        if node.copies._incoming.get(0) and node.copies._incoming[0].received_bytes:
            hanging.set()
            go_on.wait(10)
        return False

    errors: list[TransferError] = []

    def push_first() -> None:
        with contextlib.closing(TransferClient(KEY, RateLimit(40e6), stop=hang)) as client:
            try:
                client.push(node.address, first)
            except TransferError as error:
                errors.append(error)

    thread = threading.Thread(target=push_first)
    thread.start()
    assert hanging.wait(10)
    with contextlib.closing(TransferClient(KEY)) as client:
        client.push(node.address, second)
    go_on.set()
    thread.join()
    assert [held.step for held in node.copies.held()] in ([2], [1, 2])


def test_close_cuts_what_is_under_way(tmp_path: Path) -> None:
    """Closing the server ends a transfer at once; no copy comes of it and nothing stays in memory."""
    shard = shard_in(tmp_path, 8 * MIB)
    with a_node(tmp_path) as node:

        def close() -> bool:
            if node.copies._incoming.get(0) and node.copies._incoming[0].received_bytes:
                node.close()
            return False

        with (
            contextlib.closing(TransferClient(KEY, RateLimit(40e6), stop=close)) as client,
            pytest.raises(TransferError),
        ):
            client.push(node.address, shard)
    assert not (tmp_path / "copies").exists()


def test_stop_ends_a_transfer(tmp_path: Path, node: Node) -> None:
    calls = iter(range(100))
    with (
        contextlib.closing(TransferClient(KEY, stop=lambda: next(calls) > 2)) as client,
        pytest.raises(TransferError, match="stopped"),
    ):
        client.push(node.address, shard_in(tmp_path, 32 * MIB))
    assert node.copies.held() == []


def manifest_shard(size_bytes: int, checksum: str) -> Shard:
    return Shard(
        rank=0, file="g1-rank00000.safetensors", size_bytes=size_bytes, checksum=checksum, data_start_bytes=0,
        tensors=(), scalars={}, leaves={},
    )  # fmt: skip


def test_a_peer_source_asks_in_turn(tmp_path: Path) -> None:
    """Peers that are gone, have nothing or have other bytes under the same name are passed over."""
    with a_node(tmp_path / "a") as gone:
        pass
    right = shard_in(tmp_path, MIB, seed=1)
    with a_node(tmp_path / "b") as empty, a_node(tmp_path / "c") as other, a_node(tmp_path / "d") as good:
        (tmp_path / "other").mkdir()
        another = shard_in(tmp_path / "other", MIB, seed=2)
        other.shards[ref_of(another)] = another
        good.shards[ref_of(right)] = right
        wanted = manifest_shard(MIB, right.control.checksum)
        source = PeerSource(KEY, [gone.address, empty.address, other.address, good.address])
        source.fetch(1, 1, wanted, tmp_path / "into")
        assert (tmp_path / "into").read_bytes() == bytes_of(right)
        without = PeerSource(KEY, [empty.address, other.address])
        with pytest.raises(SourceError, match=r"no such shard.*other bytes than the manifest"):
            without.fetch(1, 1, wanted, tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()
        with pytest.raises(SourceError, match="no peer is known"):
            PeerSource(KEY, []).fetch(1, 1, wanted, tmp_path / "nothing")
        with pytest.raises(SourceError, match="cannot be written"):
            source.fetch(1, 1, wanted, tmp_path / "missing" / "into")
