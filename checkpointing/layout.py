"""What a snapshot looks like from outside: structs of the manifest and of a shard's description, and file names.

A document (manifest or sidecar) is JSON of the form `{"checksum": ..., "body": {...}}`: the checksum is that of the
body's very bytes, so that a cut or altered document is noticed before a word of it is believed.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from checkpointing.checksum import checksum

VERSION = 1
MANIFEST_NAME = "manifest.json"
LATEST_NAME = "latest"
# Numbers as they are written here and nothing else: a step of two folders would be two snapshots, and one that fits no
# 64 bits could not be agreed upon.
_NUMBER = r"0|[1-9][0-9]{0,17}"
_SHARD_NAME = re.compile(
    rf"g({_NUMBER})-rank([0-9]{{5}}|[1-9][0-9]{{5,17}})\.(safetensors|json|verified)(\.[0-9]+)?(\.tmp)?"
)
_STEP_NAME = re.compile(rf"step-({_NUMBER})")
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

GARBLED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are not what they should be, nested without end among them."""

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


class Tier(enum.StrEnum):
    """Where a snapshot's bytes can lie, from near to far."""

    RAM = "ram"
    PEER = "peer"
    NODE = "node"
    RUN = "run"
    S3 = "s3"


class ShardRef(msgspec.Struct, frozen=True, order=True):
    """Names one rank's shard of one snapshot, in any tier."""

    generation: int
    step: int
    rank: int


class HeldShard(msgspec.Struct, frozen=True, kw_only=True):
    """One verified shard that a node holds. layout: digest that a rank must have to load it as it is.

    tier: RAM for a slot of a worker of this node, PEER for another node's shard, NODE for this node's disk.
    """

    rank: int
    world_size: int
    step: int
    generation: int
    layout: str
    tier: Tier

    @property
    def ref(self) -> ShardRef:
        """Its name."""
        return ShardRef(self.generation, self.step, self.rank)


class SnapshotDamagedError(ValueError):
    """A snapshot cannot be trusted; the message is one line that names the file."""


class TensorSlice(msgspec.Struct, frozen=True, array_like=True):
    """One rank's part of a logical tensor: a box at `offsets` of `sizes` inside `global_shape`.

    dtype is safetensors' name for it. start_bytes and end_bytes count from the start of the file's tensor bytes; the
    box lies there row by row.
    """

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start_bytes: int
    end_bytes: int


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's file. data_start_bytes: where the tensor bytes begin; scalars: the caller's; leaves: the state's."""

    rank: int
    file: str
    size_bytes: int
    checksum: str
    data_start_bytes: int
    tensors: tuple[TensorSlice, ...]
    scalars: dict[str, msgspec.Raw]
    leaves: dict[str, msgspec.Raw]


class ShardMeta(msgspec.Struct, frozen=True, kw_only=True):
    """The sidecar of a shard: written after the shard's bytes are safe; all sidecars together make the manifest."""

    version: int
    step: int
    generation: int
    world_size: int
    mesh: dict[str, int]
    shard: Shard


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A committed snapshot. shards are in order of rank; t_wall_s: when it was committed."""

    version: int
    step: int
    generation: int
    world_size: int
    mesh: dict[str, int]
    t_wall_s: float
    shards: tuple[Shard, ...]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    checksum: str
    body: msgspec.Raw


class _Versioned(msgspec.Struct, frozen=True):
    version: int


_Document = TypeVar("_Document", ShardMeta, Manifest)


def encode_document(document: ShardMeta | Manifest) -> bytes:
    """JSON bytes of a document with its checksum."""
    body = msgspec.json.encode(document)
    return msgspec.json.encode(_Envelope(checksum=checksum(body), body=msgspec.Raw(body))) + b"\n"


def decode_document(data: bytes, kind: type[_Document], file: str) -> _Document:
    """The document in `data`, checked; SnapshotDamagedError (naming `file`) if a byte of it cannot be right."""
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
        if checksum(bytes(envelope.body)) != envelope.checksum:
            raise SnapshotDamagedError(f"{file}: checksum of its contents does not match")
        version = msgspec.json.decode(envelope.body, type=_Versioned).version
        if version != VERSION:
            raise SnapshotDamagedError(f"{file}: format version {version}, this release of everstep reads {VERSION}")
        document = msgspec.json.decode(envelope.body, type=kind)
    except GARBLED as error:
        raise SnapshotDamagedError(f"{file}: cut off or garbled ({error})") from error
    _check_contents(document, file)
    return document


def _check_contents(document: ShardMeta | Manifest, file: str) -> None:
    shards = (document.shard,) if isinstance(document, ShardMeta) else document.shards
    # Names of files hold no other ones, and all ranks agree on them as numbers of 64 bits.
    if not all(0 <= number < 10**18 for number in (document.step, document.generation, document.world_size)):
        raise SnapshotDamagedError(f"{file}: impossible step, generation or number of ranks")
    for shard in shards:
        if shard.file != shard_file_name(document.generation, shard.rank):
            raise SnapshotDamagedError(f"{file}: names a file that is not a shard's: {shard.file!r}")
        for part in shard.tensors:
            _check_slice(part, shard, file)
    listed = [shard.rank for shard in shards] == list(range(len(shards)))
    if isinstance(document, Manifest) and not (listed and len(shards) == document.world_size > 0):
        raise SnapshotDamagedError(f"{file}: does not list one shard for each of {document.world_size} ranks")


def _check_slice(part: TensorSlice, shard: Shard, file: str) -> None:
    dims = len(part.global_shape)
    inside = len(part.offsets) == len(part.sizes) == dims and all(
        offset >= 0 and size >= 0 and (size == 0 or offset + size <= whole)
        for offset, size, whole in zip(part.offsets, part.sizes, part.global_shape, strict=True)
    )
    fits = 0 <= part.start_bytes <= part.end_bytes <= shard.size_bytes - shard.data_start_bytes <= shard.size_bytes
    if part.dtype not in _ITEM_BYTES:
        raise SnapshotDamagedError(f"{file}: {part.name} in {shard.file} has the unknown dtype {part.dtype!r}")
    # Its size too: what it claims is allocated before it is read.
    size_bytes = _ITEM_BYTES[part.dtype] * math.prod(part.sizes)
    if not inside or not fits or part.end_bytes - part.start_bytes != size_bytes:
        raise SnapshotDamagedError(f"{file}: impossible slice of {part.name} in {shard.file}")


def step_dir_name(step: int) -> str:
    """Folder of a step below `checkpoints/`."""
    return f"step-{step}"


def parse_step_dir(name: str) -> int | None:
    """The step a folder is for, None if its name is no step's."""
    match = _STEP_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def shard_file_name(generation: int, rank: int) -> str:
    """A shard's file: the generation in it keeps two attempts at the same step apart."""
    return f"g{generation}-rank{rank:05d}.safetensors"


def sidecar_name(generation: int, rank: int) -> str:
    """A sidecar's file."""
    return f"g{generation}-rank{rank:05d}.json"


def mark_name(generation: int, rank: int) -> str:
    """The empty file that says that a shard was read back from its disk."""
    return f"g{generation}-rank{rank:05d}.verified"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """(generation, rank) of a shard, sidecar, mark or half-written one; None for any other file."""
    match = _SHARD_NAME.fullmatch(name)
    return (int(match.group(1)), int(match.group(2))) if match else None
