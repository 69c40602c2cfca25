"""A slot of the RAM tier: one file in shared memory, a control block and then a shard's bytes as they go to disk.

The state byte is the hand-off between two processes that share no lock. The worker alone moves a slot from any state
but TO_PERSIST to STAGING, and from there to COMPLETE or TO_PERSIST; the agent alone moves it from TO_PERSIST to
COMPLETE (or to EMPTY if its bytes turned out bad). A worker that dies while staging leaves STAGING behind, which
nobody ever reads. All other fields carry their own checksum, so that a flipped bit in a step number is noticed too.

Two fields are the agent's alone and no lock either: `held` asks the worker to take another slot while this one is
being sent to peers (should they miss each other, the receiver's checksum does not match and it is sent again), and
`settled` says for which snapshot of this slot the worker need not wait (any more): the peers have it, or will not.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import mmap
import os
import re
import struct
from pathlib import Path

import msgspec
import xxhash

CONTROL_BYTES = 4096
SLOTS = 3
SLOTS_WITH_COPIES = 4
_MAGIC = b"EVSTEP01"
_STATE_OFFSET = 8
_FIELDS_OFFSET = 16
_FIELDS = struct.Struct("<qqqqqq16s16s")
_DIGEST = struct.Struct("<Q")
_HELD_OFFSET = 256
_SETTLED_OFFSET = 320
_SETTLED = struct.Struct("<qqQ")
_MADV_POPULATE_WRITE = 23  # of linux/mman.h
_SEGMENT_NAME = re.compile(r"snapshot-(\d+)-(\d+)\.seg(\.tmp)?")


class SlotState(enum.IntEnum):
    """Who may touch a slot, and what it is worth."""

    EMPTY = 0
    STAGING = 1
    COMPLETE = 2
    TO_PERSIST = 3


READABLE = (SlotState.COMPLETE, SlotState.TO_PERSIST)


class PersistTo(enum.IntFlag):
    """Which tiers the agent is asked to write a snapshot to."""

    NOTHING = 0
    RUN = 1
    NODE = 2


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """What a control block says about the shard behind it; checksum and layout are 32 hex digits."""

    step: int
    generation: int
    rank: int
    world_size: int
    size_bytes: int
    checksum: str
    layout: str
    persist: PersistTo = PersistTo.NOTHING

    @property
    def age(self) -> tuple[int, int]:
        """Sorts snapshots from old to new: a later generation's step replaces an earlier one's."""
        return (self.generation, self.step)


def segment_name(local_rank: int, slot: int) -> str:
    """File of a slot in the node's folder in shared memory."""
    return f"snapshot-{local_rank}-{slot}.seg"


def parse_segment_name(name: str) -> tuple[int, int] | None:
    """(local rank, slot), None if the file is no slot; half-made ones (`.tmp`) count as slots."""
    match = _SEGMENT_NAME.fullmatch(name)
    return (int(match.group(1)), int(match.group(2))) if match else None


def pack_control(control: Control) -> bytes:
    """The fields and their checksum, as they lie from byte 16 on."""
    fields = _FIELDS.pack(
        control.step, control.generation, control.rank, control.world_size, control.size_bytes,
        int(control.persist), bytes.fromhex(control.checksum), bytes.fromhex(control.layout),
    )  # fmt: skip
    return fields + _DIGEST.pack(xxhash.xxh3_64_intdigest(fields))


def unpack_control(block: bytes | memoryview) -> tuple[SlotState, Control | None]:
    """State and contents of a control block. Contents are None where the fields cannot be trusted."""
    if bytes(block[:8]) != _MAGIC or block[_STATE_OFFSET] not in set(SlotState):
        return SlotState.EMPTY, None
    state = SlotState(block[_STATE_OFFSET])
    fields = bytes(block[_FIELDS_OFFSET : _FIELDS_OFFSET + _FIELDS.size])
    if xxhash.xxh3_64_intdigest(fields) != _DIGEST.unpack_from(block, _FIELDS_OFFSET + _FIELDS.size)[0]:
        return state, None
    step, generation, rank, world_size, size_bytes, persist, digest, layout = _FIELDS.unpack(fields)
    control = Control(
        step=step, generation=generation, rank=rank, world_size=world_size, size_bytes=size_bytes,
        checksum=digest.hex(), layout=layout.hex(), persist=PersistTo(persist),
    )  # fmt: skip
    return state, control


def read_control(fd: int) -> tuple[SlotState, Control | None]:
    """The agent's look at a slot: one read, no mapping."""
    block = os.pread(fd, CONTROL_BYTES, 0)
    return unpack_control(block) if len(block) == CONTROL_BYTES else (SlotState.EMPTY, None)


def write_state(fd: int, state: SlotState) -> None:
    """The agent's hand-off; one byte, so no reader sees half of it."""
    os.pwrite(fd, bytes([state]), _STATE_OFFSET)


def write_control(fd: int, control: Control) -> None:
    """Publish a slot whose bytes are whole, from another process than the worker: fields first, the state last."""
    os.pwrite(fd, _MAGIC, 0)
    os.pwrite(fd, pack_control(control), _FIELDS_OFFSET)
    write_state(fd, SlotState.COMPLETE)


def write_held(fd: int, held: bool) -> None:
    """The agent's wish that the worker takes another slot."""
    os.pwrite(fd, bytes([held]), _HELD_OFFSET)


def write_settled(fd: int, age: tuple[int, int]) -> None:
    """The agent's word that the peers have the snapshot of this age, or that nobody need wait for it."""
    os.pwrite(fd, _pack_settled(age), _SETTLED_OFFSET)


def read_settled(block: bytes | memoryview) -> tuple[int, int] | None:
    """For which snapshot of the slot nobody need wait; None for none."""
    generation, step, digest = _SETTLED.unpack_from(block, _SETTLED_OFFSET)
    return (generation, step) if _pack_settled((generation, step))[16:] == _DIGEST.pack(digest) else None


def _pack_settled(age: tuple[int, int]) -> bytes:
    packed = struct.pack("<qq", *age)
    return packed + _DIGEST.pack(xxhash.xxh3_64_intdigest(packed))


class Segment:
    """The worker's mapping of one slot."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self._map = mapping
        self._populated = False
        self.data = memoryview(mapping)[CONTROL_BYTES:]

    @property
    def state(self) -> SlotState:
        """As it is now: the agent may change it at any time."""
        return unpack_control(memoryview(self._map)[:CONTROL_BYTES])[0]

    @state.setter
    def state(self, state: SlotState) -> None:
        self._map[_STATE_OFFSET] = state

    @property
    def control(self) -> Control | None:
        """What the slot holds, if it holds a whole snapshot."""
        state, control = unpack_control(memoryview(self._map)[:CONTROL_BYTES])
        return control if state in READABLE else None

    @property
    def held(self) -> bool:
        """Whether the agent is sending this slot."""
        return bool(self._map[_HELD_OFFSET])

    @property
    def settled(self) -> bool:
        """Whether nobody need wait for copies of what the slot holds now."""
        control = self.control
        return control is not None and read_settled(memoryview(self._map)[:CONTROL_BYTES]) == control.age

    def complete(self, control: Control) -> None:
        """Publish what was staged: fields first, the state last."""
        packed = pack_control(control)
        self._map[: len(_MAGIC)] = _MAGIC
        self._map[_FIELDS_OFFSET : _FIELDS_OFFSET + len(packed)] = packed
        self.state = SlotState.TO_PERSIST if control.persist else SlotState.COMPLETE

    def populate(self) -> None:
        """Map every page, in one call and the first time only: page by page it would take several times as long.

        May run beside anything else that uses the mapping. A kernel that cannot do it (before 5.14) is left alone.
        """
        if self._populated:
            return
        self._populated = True
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(len(self._map)), _MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Unmap. Tensors that look into the mapping must be gone."""
        self.data.release()
        self._map.close()


def open_segment(path: Path, size_bytes: int) -> Segment:
    """Map the slot for shards of `size_bytes`: the file that is there if it fits, else a new, empty one in its place.

    A file of another size is replaced, never resized: the agent may still be reading it. ValueError if the file
    system has no room; the memory is really there on return, so that no later store can end in SIGBUS.
    """
    total_bytes = CONTROL_BYTES + size_bytes
    if not path.exists() or path.stat().st_size != total_bytes:
        _create(path, total_bytes)
    fd = os.open(path, os.O_RDWR)
    try:
        return Segment(path, mmap.mmap(fd, total_bytes))
    finally:
        os.close(fd)


def _create(path: Path, total_bytes: int) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(fd, 0, total_bytes)
        os.pwrite(fd, _MAGIC, 0)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise ValueError(no_room_message(path.parent, total_bytes)) from error
    finally:
        os.close(fd)


def no_room_message(ram_dir: Path, needed_bytes: int) -> str:
    """What to say when the RAM tier does not fit."""
    try:
        stat = os.statvfs(ram_dir)
        free = f"{stat.f_bavail * stat.f_frsize / 2**20:.1f} MiB free"
    except OSError:
        free = "free space unknown"
    return (
        f"snapshots in memory need {needed_bytes / 2**20:.1f} MiB more in {ram_dir} ({free}): make it larger, "
        "or set checkpoint.ram_dir to a file system with room"
    )
