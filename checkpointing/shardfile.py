"""The bytes of a shard: a safetensors file that also carries where its tensors belong and the snapshot's scalars.

    8 bytes header length | JSON header, padded with spaces | tensor bytes, no gaps

The tensor bytes start on a 64-byte boundary, larger element types first, so that every tensor can be mapped as it
is. `__metadata__` has two strings of ours: `everstep.layout` (same for all snapshots of one layout) and
`everstep.snapshot` (step, generation, scalars), which is last, so that a new snapshot rewrites the header's end only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

import msgspec

from checkpointing.checksum import checksum
from checkpointing.layout import (
    GARBLED,
    VERSION,
    Shard,
    ShardMeta,
    SnapshotDamagedError,
    TensorSlice,
    shard_file_name,
)

ALIGN_BYTES = 64
MAX_HEADER_BYTES = 100_000_000
_LENGTH = struct.Struct("<Q")
_LAYOUT_KEY = "everstep.layout"
_SNAPSHOT_KEY = "everstep.snapshot"


class LayoutMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What all snapshots of one layout have in common. places: (global shape, offsets) by tensor name."""

    version: int
    rank: int
    world_size: int
    mesh: dict[str, int]
    places: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


class SnapshotMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What is one snapshot's own."""

    step: int
    generation: int
    scalars: dict[str, msgspec.Raw]
    leaves: dict[str, msgspec.Raw]


class _TensorEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class ShardPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A layout's fixed part: where each tensor lies in the file, and the header's unchanging beginning."""

    slices: tuple[TensorSlice, ...]
    header_start: bytes
    data_start_bytes: int
    size_bytes: int
    digest: str

    def header(self, snapshot: SnapshotMeta) -> bytes:
        """The first data_start_bytes of the file for one snapshot.

        ValueError if the snapshot's scalars outgrew the room that was reserved for them.
        """
        tail = msgspec.json.encode(msgspec.json.encode(snapshot).decode()) + b"}}"
        room = self.data_start_bytes - _LENGTH.size
        text = self.header_start + tail
        if len(text) > room:
            raise ValueError(
                f"the scalars of a snapshot take {len(tail)} bytes, {room - len(self.header_start)} were reserved: "
                "keep large values in tensors"
            )
        return _LENGTH.pack(room) + text.ljust(room)


def plan_shard(
    parts: Sequence[TensorSlice], rank: int, world_size: int, mesh: Mapping[str, int], reserve_bytes: int
) -> ShardPlan:
    """Lay out a rank's tensors. `parts` carry their size as end_bytes - start_bytes and come in file order.

    reserve_bytes: room for a snapshot's scalars, as JSON.
    """
    slices, position = [], 0
    for part in parts:
        end = position + part.end_bytes - part.start_bytes
        slices.append(msgspec.structs.replace(part, start_bytes=position, end_bytes=end))
        position = end
    meta = LayoutMeta(
        version=VERSION,
        rank=rank,
        world_size=world_size,
        mesh=dict(mesh),
        places={s.name: (s.global_shape, s.offsets) for s in slices},
    )
    entries = {s.name: _TensorEntry(s.dtype, s.sizes, (s.start_bytes, s.end_bytes)) for s in slices}
    layout = msgspec.json.encode(meta)
    start = msgspec.json.encode(entries)[:-1] + (b"," if entries else b"")
    start += b'"__metadata__":{"%s":%s,"%s":' % (
        _LAYOUT_KEY.encode(), msgspec.json.encode(layout.decode()), _SNAPSHOT_KEY.encode(),
    )  # fmt: skip
    data_start = math.ceil((_LENGTH.size + len(start) + reserve_bytes) / ALIGN_BYTES) * ALIGN_BYTES
    if data_start > MAX_HEADER_BYTES:
        raise ValueError(f"rank {rank} has too many tensors ({len(slices)}) for one safetensors file")
    return ShardPlan(
        slices=tuple(slices),
        header_start=start,
        data_start_bytes=data_start,
        size_bytes=data_start + position,
        digest=checksum(layout + start),
    )


def header_size_bytes(first: bytes, size_bytes: int, file: str) -> int:
    """How long the header is, from the file's first 8 bytes; SnapshotDamagedError if it cannot be."""
    if len(first) < _LENGTH.size:
        raise SnapshotDamagedError(f"{file}: cut off before its header")
    room = int(_LENGTH.unpack_from(first)[0])
    if room > min(MAX_HEADER_BYTES, size_bytes - _LENGTH.size):
        raise SnapshotDamagedError(f"{file}: its header cannot be {room} bytes long")
    return room + _LENGTH.size


def parse_header(header: bytes, size_bytes: int, file_checksum: str, file: str) -> ShardMeta:
    """The description of a shard from its own first bytes (length and header). SnapshotDamagedError if garbled."""
    try:
        raw = msgspec.json.decode(header[_LENGTH.size :], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__"), type=dict[str, str])
        layout = msgspec.json.decode(metadata[_LAYOUT_KEY], type=LayoutMeta)
        snapshot = msgspec.json.decode(metadata[_SNAPSHOT_KEY], type=SnapshotMeta)
        slices = []
        for name, entry_json in raw.items():
            entry = msgspec.json.decode(entry_json, type=_TensorEntry)
            shape, offsets = layout.places[name]
            slices.append(TensorSlice(name, entry.dtype, shape, offsets, entry.shape, *entry.data_offsets))
    except (*GARBLED, KeyError) as error:
        raise SnapshotDamagedError(f"{file}: header is garbled ({error})") from error
    return ShardMeta(
        version=layout.version,
        step=snapshot.step,
        generation=snapshot.generation,
        world_size=layout.world_size,
        mesh=layout.mesh,
        shard=Shard(
            rank=layout.rank,
            file=shard_file_name(snapshot.generation, layout.rank),
            size_bytes=size_bytes,
            checksum=file_checksum,
            data_start_bytes=len(header),
            tensors=tuple(slices),
            scalars=snapshot.scalars,
            leaves=snapshot.leaves,
        ),
    )


def layout_digest(header: bytes, file: str) -> str:
    """The digest of a shard's layout (`ShardPlan.digest`) from its own first bytes. SnapshotDamagedError if garbled."""
    start = header[_LENGTH.size :]
    end = start.rfind(b'"%s":' % _SNAPSHOT_KEY.encode())  # inside JSON strings its quotes are escaped
    if end < 0:
        raise SnapshotDamagedError(f"{file}: header is garbled (it names no snapshot)")
    try:
        raw = msgspec.json.decode(start, type=dict[str, msgspec.Raw])
        layout = msgspec.json.decode(raw["__metadata__"], type=dict[str, str])[_LAYOUT_KEY]
    except (*GARBLED, KeyError) as error:
        raise SnapshotDamagedError(f"{file}: header is garbled ({error})") from error
    return checksum(layout.encode() + start[: end + len(_SNAPSHOT_KEY) + 3])
