"""Flight records as typed facts: which collective of which process group each rank entered, and which are not over.

Sources: torch's flight recorder as JSON (NCCL's, and the generic one that gloo uses), and the trainer's own log of
sends and receipts for gloo, which has none. Decoding never executes anything, and unknown keys are passed over.
"""

from __future__ import annotations

import enum
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from trainer.flight import FlightFile, GroupRanks, PeerOp

_PEERS = re.compile(r"\b(send|recv) (\d+)(->|<-)(\d+)")
# Whatever is cut off a record, this many of each group's newest collectives stay.
_KEPT_OF_GROUP = 4
_WORDS = {
    "default_pg": "the whole job",
    "mesh_fsdp": "FSDP",
    "mesh_efsdp": "the experts' FSDP",
    "mesh_tp": "TP",
    "mesh_pp": "PP",
    "mesh_ep": "EP",
    "mesh_cp": "CP",
    "mesh_dp_replicate": "DP (replicas)",
    "mesh_batch": "DP (batches)",
    "mesh_loss_mesh": "DP (losses)",
}


class Stage(enum.IntEnum):
    """How far an operation has come on a rank. Gloo knows no difference between the first two."""

    ENTERED = 0
    STARTED = 1
    OVER = 2


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """A collective, or (peer >= 0, a global rank) a send or a receipt.

    number: place in the group's order of collectives from 1; for sends and receipts in the order of those in one
    direction with one peer, 0 if the record does not go back far enough to tell. sizes: shapes that went in.
    """

    group: str
    number: int
    name: str
    stage: Stage
    sizes: tuple[tuple[int, ...], ...] = ()
    peer: int = -1
    sends: bool = False


class FlightRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank knows of its process groups; operations oldest first. problem: why there may be none."""

    request: int
    rank: int
    groups: tuple[GroupRanks, ...]
    operations: tuple[Operation, ...]
    problem: str = ""

    @property
    def open(self) -> list[Operation]:
        """Operations that are not over."""
        return [each for each in self.operations if each.stage is not Stage.OVER]

    def entered(self) -> dict[str, int]:
        """The newest collective that was entered, by group; groups without any are absent."""
        newest: dict[str, int] = {}
        for each in self.operations:
            if each.peer < 0:
                newest[each.group] = max(each.number, newest.get(each.group, 0))
        return newest


class _Entry(msgspec.Struct):
    process_group: tuple[str, str] = ("", "")
    collective_seq_id: int = 0
    record_id: int = 0
    profiling_name: str = ""
    is_p2p: bool = False
    retired: bool = False
    state: str = ""
    input_sizes: list[tuple[int, ...]] = []


class _Dump(msgspec.Struct):
    entries: list[_Entry] = []


def decode_flight(data: bytes) -> tuple[FlightRecord, str]:
    """The record and the stacks that a worker's witness wrote (`trainer.flight.FlightFile`).

    Raises:
        ValueError: if it is not well-formed.
    """
    file = msgspec.json.decode(data, type=FlightFile)
    ranks = {group.name: group.ranks for group in file.groups}
    operations = [_of_peer_op(each) for each in file.peer_ops]
    for raw in file.dumps:
        operations += _of_dump(msgspec.json.decode(raw, type=_Dump), ranks, file.rank)
    record = FlightRecord(
        request=file.request, rank=file.rank, groups=file.groups, operations=tuple(operations), problem=file.problem
    )
    return record, file.stacks


def encode_record(record: FlightRecord, limit_bytes: int) -> bytes:
    """The record as JSON in at most limit_bytes: the oldest operations go first, open ones last of all."""
    room, data = len(record.operations), msgspec.json.encode(record)
    while len(data) > limit_bytes and room:
        room = min(room - 1, room * limit_bytes // len(data))
        data = msgspec.json.encode(msgspec.structs.replace(record, operations=_shorten(record.operations, room)))
    if len(data) > limit_bytes:
        problem = f"{len(record.groups)} process groups are more than fit"
        data = msgspec.json.encode(msgspec.structs.replace(record, groups=(), operations=(), problem=problem))
    return data


def decode_record(data: bytes) -> FlightRecord:
    """What `encode_record` wrote.

    Raises:
        ValueError: if it is not well-formed.
    """
    return msgspec.json.decode(data, type=FlightRecord)


def group_words(group: GroupRanks) -> str:
    """A group for a person: `FSDP (ranks 0, 2)`."""
    return f"{_WORDS.get(group.about, group.about or group.name)} ({ranks_words(group.ranks)})"


def ranks_words(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0, 2`, `ranks 0-7`, `16 ranks from 0 to 112`."""
    found = sorted(ranks)
    if len(found) == 1:
        return f"rank {found[0]}"
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"ranks {found[0]}-{found[-1]}"
    if len(found) > 8:
        return f"{len(found)} ranks from {found[0]} to {found[-1]}"
    return "ranks " + ", ".join(map(str, found))


def _shorten(operations: Sequence[Operation], room: int) -> tuple[Operation, ...]:
    """`room` operations in their order: by preference open ones, then the newest of each group, then the newest."""
    newest_first = range(len(operations) - 1, -1, -1)
    of_group: Counter[tuple[str, int, bool]] = Counter()
    rank_of: dict[int, int] = {}
    for i in newest_first:
        each = operations[i]
        key = (each.group, each.peer, each.sends)
        of_group[key] += 1
        rank_of[i] = 0 if each.stage is not Stage.OVER else 1 if of_group[key] <= _KEPT_OF_GROUP else 2
    kept = sorted(newest_first, key=lambda i: rank_of[i])[:room]
    return tuple(operations[i] for i in sorted(kept))


def _of_peer_op(op: PeerOp) -> Operation:
    name = "send" if op.sends else "recv"
    stage = Stage.OVER if op.over else Stage.ENTERED
    return Operation(
        group=op.group, number=op.number, name=name, stage=stage, sizes=(op.sizes,), peer=op.peer, sends=op.sends
    )


def _of_dump(dump: _Dump, ranks: Mapping[str, tuple[int, ...]], rank: int) -> Iterator[Operation]:
    # A ring buffer that has gone round no longer knows how many sends there were.
    whole = not dump.entries or min(entry.record_id for entry in dump.entries) == 0
    counts: dict[tuple[str, bool, int], int] = defaultdict(int)
    for entry in sorted(dump.entries, key=lambda each: each.record_id):
        group, name = entry.process_group[0], entry.profiling_name.rpartition(":")[2]
        stage = _stage(entry)
        sizes = tuple(entry.input_sizes)
        if not entry.is_p2p:
            number = entry.collective_seq_id
            yield Operation(group=group, number=number, name=name.strip("_"), stage=stage, sizes=sizes)
            continue
        peer, sends = _peer(name, ranks.get(group, ()))
        if peer >= 0 and peer != rank:
            counts[group, sends, peer] += 1
            number = counts[group, sends, peer] if whole else 0
            name = "send" if sends else "recv"
            yield Operation(
                group=group, number=number, name=name, stage=stage, sizes=sizes, peer=peer, sends=sends
            )  # fmt: skip


def _stage(entry: _Entry) -> Stage:
    if entry.retired or entry.state == "completed":
        return Stage.OVER
    return Stage.STARTED if entry.state == "started" else Stage.ENTERED


def _peer(name: str, ranks: Sequence[int]) -> tuple[int, bool]:
    """The global rank of the other side, and whether this one sends; -1 for what is neither (a coalesced batch)."""
    found = _PEERS.search(name)
    if found is None or int(found[4]) >= len(ranks):
        return -1, False
    return ranks[int(found[4])], found[1] == "send"
