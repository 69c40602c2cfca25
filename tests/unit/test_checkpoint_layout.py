"""Promises: a shard is a plain safetensors file; no damaged document is ever believed; no path leaves its folder."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from checkpointing.checksum import checksum
from checkpointing.flatten import flatten
from checkpointing.layout import (
    Manifest,
    Shard,
    ShardMeta,
    SnapshotDamagedError,
    TensorSlice,
    decode_document,
    encode_document,
    parse_shard_name,
    parse_step_dir,
    shard_file_name,
)
from checkpointing.shardfile import SnapshotMeta, parse_header, plan_shard
from tests.checkpoint_helpers import Tensors, as_bytes, same_bits, sample_tensors


def shard(rank: int, **changes: object) -> Shard:
    fields = {
        "rank": rank,
        "file": shard_file_name(2, rank),
        "size_bytes": 1000,
        "checksum": "0" * 32,
        "data_start_bytes": 64,
        "tensors": (TensorSlice("w", "F32", (8, 4), (4 * rank, 0), (4, 4), 0, 64),),
        "scalars": {"step": msgspec.Raw(b"7")},
        "leaves": {},
    }
    return Shard(**{**fields, **changes})  # type: ignore[arg-type]


def manifest(*shards: Shard) -> Manifest:
    return Manifest(
        version=1, step=7, generation=2, world_size=2, mesh={"dp_shard": 2}, t_wall_s=1.5, shards=shards
    )  # fmt: skip


WHOLE = encode_document(manifest(shard(0), shard(1)))


def test_a_document_comes_back_as_it_was() -> None:
    assert decode_document(WHOLE, Manifest, "m") == manifest(shard(0), shard(1))


@given(st.integers(0, len(WHOLE) - 3))
def test_a_truncated_manifest_is_noticed(length: int) -> None:
    with pytest.raises(SnapshotDamagedError, match=r"step-7/manifest\.json: "):
        decode_document(WHOLE[:length], Manifest, "step-7/manifest.json")


@given(st.integers(0, len(WHOLE) - 2), st.integers(1, 255))
def test_a_manifest_with_a_changed_byte_is_noticed_or_means_the_same(position: int, change: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[position] ^= change
    try:
        document = decode_document(bytes(damaged), Manifest, "m")
    except SnapshotDamagedError:
        return
    assert document == manifest(shard(0), shard(1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"file": "../../etc/passwd"}, "names a file that is not a shard's"),
        ({"file": "/etc/passwd"}, "names a file that is not a shard's"),
        ({"file": shard_file_name(2, 9)}, "names a file that is not a shard's"),
        ({"tensors": (TensorSlice("w", "F32", (8, 4), (6, 0), (4, 4), 0, 64),)}, "impossible slice of w"),
        ({"tensors": (TensorSlice("w", "F32", (8, 4), (4, 0), (4,), 0, 64),)}, "impossible slice of w"),
        ({"tensors": (TensorSlice("w", "F32", (8, 4), (4, 0), (4, 4), 900, 964),)}, "impossible slice of w"),
        ({"tensors": (TensorSlice("w", "F32", (8, 4), (-1, 0), (4, 4), 0, 64),)}, "impossible slice of w"),
        ({"tensors": (TensorSlice("w", "F32", (8, 4), (4, 0), (4, 4), 0, 32),)}, "impossible slice of w"),
        ({"tensors": (TensorSlice("w", "F32", (10**9, 10**9), (0, 0), (10**9, 10**9), 0, 64),)}, "impossible slice"),
        ({"data_start_bytes": -64}, "impossible slice of w"),
        ({"tensors": (TensorSlice("w", "F4_X", (8, 4), (4, 0), (4, 4), 0, 64),)}, "w in .* unknown dtype 'F4_X'"),
    ],
)
def test_a_well_formed_document_that_cannot_be_true_is_refused(damage: dict[str, object], words: str) -> None:
    with pytest.raises(SnapshotDamagedError, match=words):
        decode_document(encode_document(manifest(shard(0), shard(1, **damage))), Manifest, "m")


def test_a_manifest_lists_every_rank_once() -> None:
    for shards in [(shard(0),), (shard(0), shard(0)), (shard(1), shard(0))]:
        with pytest.raises(SnapshotDamagedError, match="does not list one shard for each of 2 ranks"):
            decode_document(encode_document(manifest(*shards)), Manifest, "m")


@pytest.mark.parametrize("world_size", [0, -1, 10**15])
def test_no_number_of_ranks_that_a_manifest_claims_takes_memory(world_size: int) -> None:
    """Nor does a snapshot of no rank at all pass for one."""
    lying = msgspec.structs.replace(manifest(), world_size=world_size)
    with pytest.raises(SnapshotDamagedError, match=r"one shard|number of ranks"):
        decode_document(encode_document(lying), Manifest, "m")


def test_another_format_version_is_named() -> None:
    newer = msgspec.structs.replace(manifest(shard(0), shard(1)), version=99)
    with pytest.raises(SnapshotDamagedError, match="format version 99"):
        decode_document(encode_document(newer), Manifest, "m")


def test_another_format_version_is_named_whatever_its_fields() -> None:
    body = b'{"version":2,"pieces":[]}'
    data = b'{"checksum":"%s","body":%s}' % (checksum(body).encode(), body)
    with pytest.raises(SnapshotDamagedError, match="m: format version 2, this release of everstep reads 1"):
        decode_document(data, Manifest, "m")


def test_names_of_other_files_are_no_shards() -> None:
    assert parse_shard_name(shard_file_name(3, 12)) == (3, 12)
    assert parse_shard_name(shard_file_name(3, 12) + ".tmp") == (3, 12)
    for name in ("manifest.json", "g1-rank0.txt", "x-g1-rank00000.json", "g1-rank00000.safetensors/.."):
        assert parse_shard_name(name) is None
    assert parse_step_dir("step-120") == 120
    assert parse_step_dir("step--1") is None


def test_a_step_has_one_name_and_fits_64_bits() -> None:
    """Else one folder would be found under another's name, and ranks could not tell each other the step."""
    for name in ("step-07", "step-\N{ARABIC-INDIC DIGIT SEVEN}", "step-" + "9" * 20, "step-7\n", "step-"):
        assert parse_step_dir(name) is None
    for name in ("g01-rank00000.json", "g1-rank0.json", "g1-rank000001.json", "g" + "9" * 20 + "-rank00000.json"):
        assert parse_shard_name(name) is None
    assert parse_shard_name(shard_file_name(10, 123_456)) == (10, 123_456)


def _shard_bytes(tensors: dict[str, torch.Tensor]) -> tuple[bytes, ShardMeta]:
    flat = flatten({"model": Tensors(tensors)})
    plan = plan_shard([local.part for local in flat.tensors], 0, 1, {"dp_shard": 1}, 1000)
    scalars = {"note": msgspec.Raw(msgspec.json.encode('quotes " and \\ and ü'))}
    header = plan.header(SnapshotMeta(step=5, generation=2, scalars=scalars, leaves={}))
    data = header + b"".join(as_bytes(local.tensor).numpy().tobytes() for local in flat.tensors)
    assert len(data) == plan.size_bytes
    return data, parse_header(header, len(data), checksum(data), "shard")


def test_a_shard_is_a_safetensors_file_that_describes_itself() -> None:
    """The stock reader of the safetensors library sees every tensor; our header says where each belongs."""
    tensors = sample_tensors(3)
    data, meta = _shard_bytes(tensors)
    read = load(data)
    assert {name.removeprefix("model.") for name in read} == set(tensors)
    assert all(same_bits(read[f"model.{name}"], tensor) for name, tensor in tensors.items())
    assert meta.shard.data_start_bytes % 64 == 0
    assert (meta.step, meta.generation, meta.world_size, meta.mesh) == (5, 2, 1, {"dp_shard": 1})
    assert msgspec.json.decode(meta.shard.scalars["note"]) == 'quotes " and \\ and ü'
    by_name = {part.name: part for part in meta.shard.tensors}
    for name, tensor in tensors.items():
        part = by_name[f"model.{name}"]
        assert part.global_shape == part.sizes == tuple(tensor.shape)
        start = meta.shard.data_start_bytes
        assert data[start + part.start_bytes : start + part.end_bytes] == as_bytes(tensor).numpy().tobytes()


def test_scalars_that_outgrow_the_header_are_refused_in_words() -> None:
    plan = plan_shard([], 0, 1, {}, 100)
    huge = {"x": msgspec.Raw(b'"' + b"y" * 1000 + b'"')}
    with pytest.raises(ValueError, match="keep large values in tensors"):
        plan.header(SnapshotMeta(step=5, generation=2, scalars=huge, leaves={}))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), r"model\.values\.x is nan"),
        (object(), r"model\.values\.x is a object"),
        (torch.zeros(2, dtype=torch.complex64), r"model\.values\.x has dtype torch\.complex64"),
    ],
)
def test_state_that_would_need_pickle_is_refused_by_name(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        flatten({"model": Tensors({}, {"x": value})})
