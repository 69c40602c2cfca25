"""Whatever lies on a disk is what it should be or an error in words: no crash, no endless work, no memory by claim."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpointing import disk
from checkpointing.checksum import checksum
from checkpointing.fence import FENCE_NAME, fenced_below
from checkpointing.layout import (
    VERSION,
    Manifest,
    Shard,
    ShardMeta,
    ShardRef,
    SnapshotDamagedError,
    TensorSlice,
    decode_document,
    encode_document,
)
from checkpointing.segment import CONTROL_BYTES, Control, pack_control, read_control, unpack_control
from checkpointing.shardfile import header_size_bytes, layout_digest, parse_header
from checkpointing.transfer_wire import decode_control, encode_control
from checkpointing.verify import verify_snapshot
from cluster.backend import Submission, read_submission
from cluster.history import HistoryFile
from cluster.journal import read_events, read_steps
from cluster.keys import read_keys
from cluster.lease import Lease, Unreadable, read_lease
from cluster.rundir import RunDir
from tests.unit.garbage import altered, bounded, json_bombs

SHARD = Shard(
    rank=0, file="g1-rank00000.safetensors", size_bytes=4096 + 32, checksum="ab" * 16, data_start_bytes=4096,
    tensors=(TensorSlice("w", "F32", (4, 4), (0, 0), (2, 4), 0, 32),),
    scalars={"step": msgspec.Raw(b"20")}, leaves={"lr": msgspec.Raw(b"0.1")},
)  # fmt: skip
MANIFEST = Manifest(version=VERSION, step=20, generation=1, world_size=1, mesh={"dp": 1}, t_wall_s=1.0, shards=(SHARD,))
SIDECAR = ShardMeta(version=VERSION, step=20, generation=1, world_size=1, mesh={"dp": 1}, shard=SHARD)
CONTROL = Control(
    step=20, generation=1, rank=0, world_size=1, size_bytes=4128, checksum="ab" * 16, layout="cd" * 16
)  # fmt: skip
ON_A_DISK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def sealed(body: bytes) -> bytes:
    """A document with the right checksum: what somebody writes who means harm."""
    return b'{"checksum":"' + checksum(body).encode() + b'","body":' + body + b"}"


def read_document(data: bytes) -> None:
    for kind in (Manifest, ShardMeta):
        with contextlib.suppress(SnapshotDamagedError):
            found = decode_document(data, kind, "f")
            shards = found.shards if isinstance(found, Manifest) else (found.shard,)
            for shard in shards:
                assert "/" not in shard.file, "a name that leads out of its folder"
                assert all(part.end_bytes <= shard.size_bytes for part in shard.tensors)


@given(st.one_of(st.binary(max_size=300), altered(encode_document(MANIFEST)), altered(encode_document(SIDECAR))))
def test_damaged_documents(data: bytes) -> None:
    read_document(data)


@given(altered(msgspec.json.encode(MANIFEST)))
def test_documents_that_were_altered_and_sealed_again(body: bytes) -> None:
    """Promise: even with a right checksum, a manifest names no file elsewhere and no bytes that a file has not."""
    read_document(sealed(body))


NUMBERS = st.integers() | st.sampled_from([0, -1, 2**31, 2**63, 10**18, 10**400])
BOXES = st.lists(NUMBERS, max_size=3)


@given(st.fixed_dictionaries({
    "version": st.just(1), "step": NUMBERS, "generation": NUMBERS, "world_size": NUMBERS, "mesh": st.just({}),
    "t_wall_s": st.floats(), "shards": st.lists(st.fixed_dictionaries({
        "rank": NUMBERS, "file": st.text() | st.sampled_from(["g1-rank00000.safetensors", "../../x", "/etc/passwd"]),
        "size_bytes": NUMBERS, "checksum": st.text(), "data_start_bytes": NUMBERS, "scalars": st.just({}),
        "leaves": st.just({}), "tensors": st.lists(st.tuples(
            st.text(), st.sampled_from(["F32", "U8", "X"]), BOXES, BOXES, BOXES, NUMBERS, NUMBERS,
        ), max_size=2)}), max_size=2)}))  # fmt: skip
def test_documents_with_impossible_numbers(body: dict[str, Any]) -> None:
    with contextlib.suppress(OverflowError):  # a number that this test cannot write down
        read_document(sealed(msgspec.json.encode(body)))


@pytest.mark.parametrize("data", json_bombs("checksum"), ids=lambda data: f"{data[:16]!r}x{len(data)}")
@pytest.mark.parametrize("seal", [bytes, sealed], ids=["bare", "sealed"])
def test_bombs_in_documents(data: bytes, seal: Callable[[bytes], bytes]) -> None:
    with bounded(), pytest.raises(SnapshotDamagedError):
        decode_document(seal(data), Manifest, "f")


@ON_A_DISK
@given(st.binary(max_size=200) | altered(encode_document(MANIFEST)))
def test_a_run_with_a_damaged_manifest_is_listed_and_verified(tmp_path: Path, data: bytes) -> None:
    folder = disk.step_dir(tmp_path, 20)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    assert disk.committed_steps(tmp_path) == [20]
    assert isinstance(disk.named_generation(tmp_path, 20), int)
    assert verify_snapshot(tmp_path, 20), "its shards are not there"


@ON_A_DISK
@given(st.binary(max_size=CONTROL_BYTES) | altered(b"EVSTEP01\x02" + bytes(7) + pack_control(CONTROL)))
def test_damaged_control_blocks(tmp_path: Path, data: bytes) -> None:
    """Promise: a slot of any contents and any length is empty, or what it says."""
    path = tmp_path / "slot"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        _, found = read_control(fd)
        assert found is None or isinstance(found, Control)
    finally:
        os.close(fd)
    _, found = unpack_control(data.ljust(CONTROL_BYTES, b"\x00"))
    assert found is None or isinstance(found, Control)


@given(st.text() | altered(encode_control(CONTROL).encode()).map(lambda data: data.decode("latin-1")))
def test_damaged_control_headers(text: str) -> None:
    with contextlib.suppress(ValueError):
        found = decode_control(text, ShardRef(1, 20, 0))
        assert (found.generation, found.step, found.rank) == (1, 20, 0)


@given(st.binary(max_size=400))
def test_damaged_shard_headers(data: bytes) -> None:
    with contextlib.suppress(SnapshotDamagedError):
        header_size_bytes(data[:8], 10**9, "f")
    for read in (lambda: parse_header(data, 10**6, "ab" * 16, "f"), lambda: layout_digest(data, "f")):
        with contextlib.suppress(SnapshotDamagedError):
            read()


@pytest.mark.parametrize("data", json_bombs("__metadata__"), ids=lambda data: f"{data[:16]!r}x{len(data)}")
def test_bombs_in_shard_headers_and_control_headers(data: bytes) -> None:
    with bounded():
        with pytest.raises(SnapshotDamagedError):
            parse_header(b"\x00" * 8 + data, 10**6, "ab" * 16, "f")
        with pytest.raises(SnapshotDamagedError):
            layout_digest(b"\x00" * 8 + data, "f")
        with pytest.raises(ValueError):
            decode_control(data.decode("latin-1"), ShardRef(1, 20, 0))


def read_small_files(folder: Path, data: bytes) -> None:
    """All small files of a run that the control plane reads, with these contents."""
    run_dir = RunDir(folder)
    for name in (
        "submission.json",
        "lease.json",
        "supervisor.json",
        "events.jsonl",
        "metrics.jsonl",
        FENCE_NAME,
        "n.jsonl",
    ):
        (folder / name).write_bytes(data)
    keys = folder / "job.json"
    keys.touch(mode=0o600)
    keys.write_bytes(data)
    with contextlib.suppress(ValueError):
        read_submission(folder)
    assert isinstance(read_lease(folder / "lease.json"), Lease | Unreadable)
    run_dir.read_endpoint()
    assert isinstance(read_events(folder / "events.jsonl"), list)
    assert isinstance(read_steps(folder / "metrics.jsonl"), list)
    assert isinstance(fenced_below(folder), int)
    HistoryFile(folder / "n.jsonl").read()
    with pytest.raises(ValueError):
        read_keys(keys)


SUBMISSION = msgspec.json.encode(Submission(run="r", cluster="slurm", job_id="1", t_wall_s=1.0))
LEASE = msgspec.json.encode(Lease(supervisor="a", host="h", pid=1, renewals=1, rounds=1, t_wall_s=1.0))


@ON_A_DISK
@given(st.one_of(st.binary(max_size=200), altered(SUBMISSION), altered(LEASE)))
def test_damaged_small_files(tmp_path: Path, data: bytes) -> None:
    read_small_files(tmp_path, data)


@pytest.mark.parametrize("data", json_bombs("pid"), ids=lambda data: f"{data[:16]!r}x{len(data)}")
def test_bombs_in_small_files(tmp_path: Path, data: bytes) -> None:
    with bounded():
        read_small_files(tmp_path, data)
