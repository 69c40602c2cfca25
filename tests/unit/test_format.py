"""Promise: docs/format.md is all that a reader in any language needs.

`Reader` was written from that page alone and imports nothing of Everstep's; what it reads here was written by the very
code that writes a run's snapshots.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash

from checkpointing.checksum import checksum
from checkpointing.layout import TensorSlice
from checkpointing.segment import CONTROL_BYTES, Control, PersistTo, open_segment, segment_name
from checkpointing.shardfile import SnapshotMeta, plan_shard
from checkpointing.store import NodeStore, StoreEventKind
from tests.checkpoint_helpers import OneRank, as_bytes, flip_byte

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


# -- The independent reader: at most 60 lines, from the page alone. ----------------------------------------------------
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "BOOL": "?"}
KINDS |= {f"{sign}{8 * size}": f"<{sign.lower()}{size}" for sign in "IU" for size in (1, 2, 4, 8)}


class Reader:
    """Reads the newest snapshot of a run's `checkpoints` folder."""

    def __init__(self, checkpoints: Path) -> None:
        found = [(m["generation"], m["step"], m) for m in map(self.manifest, checkpoints.glob("step-*")) if m]
        self.body: dict[str, Any] = max(found, key=lambda each: each[:2])[2]
        self.folder = checkpoints / f"step-{self.body['step']}"

    @staticmethod
    def manifest(folder: Path) -> Any:
        path = folder / "manifest.json"
        text = path.read_bytes() if path.exists() else b""
        match = re.fullmatch(rb'\{"checksum":"([0-9a-f]{32})","body":(.*)\}\n', text, re.DOTALL)
        if match is None or xxhash.xxh3_128_hexdigest(match[2]) != match[1].decode():
            return None
        body = json.loads(match[2])
        return body if body["version"] == 1 and folder.name == f"step-{body['step']}" else None

    def shard(self, shard: dict[str, Any]) -> bytes:
        data = (self.folder / shard["file"]).read_bytes()
        if len(data) != shard["size_bytes"] or xxhash.xxh3_128_hexdigest(data) != shard["checksum"]:
            raise ValueError(f"{shard['file']} is damaged")
        (length,) = struct.unpack("<Q", data[:8])
        meta = json.loads(data[8 : 8 + length])["__metadata__"]
        mine, own = json.loads(meta["everstep.snapshot"]), json.loads(meta["everstep.layout"])
        said = (mine["step"], mine["generation"], own["rank"], own["world_size"], 8 + length)
        want = (self.body["step"], self.body["generation"], shard["rank"], self.body["world_size"])
        if said != (*want, shard["data_start_bytes"]):
            raise ValueError(f"{shard['file']} is another shard")
        return data

    def tensor(self, name: str) -> Any:
        whole: Any = None
        filled: Any = None
        for shard in self.body["shards"]:
            for part, dtype, shape, offsets, sizes, start, end in shard["tensors"]:
                if part != name or (filled is not None and filled.all()):
                    continue
                kind = KINDS[dtype]
                raw = self.shard(shard)[shard["data_start_bytes"] + start : shard["data_start_bytes"] + end]
                if whole is None:
                    whole, filled = np.zeros(shape, kind), np.zeros(shape, bool)
                if 0 not in sizes:
                    box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                    whole[box], filled[box] = np.frombuffer(raw, kind).reshape(sizes), True
        if whole is None or not filled.all():
            raise ValueError(f"no shard holds all of {name}")
        return whole

    def values(self, which: str, rank: int = 0) -> Any:
        return self.body["shards"][rank][which]


# ----------------------------------------------------------------------------------------------------------------------
NUMPY = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "I64": np.dtype("<i8")}
Parts = dict[str, tuple[str, np.ndarray, tuple[int, ...], tuple[int, ...]]]  # dtype, whole, offsets, sizes


def write(
    root: Path, step: int, generation: int, ranks: list[Parts], scalars: dict[str, Any], leaves: dict[str, Any]
) -> Path:
    """Have every rank's node persist its part, as agents do; returns the run's folder of snapshots."""
    stores = []
    for rank, parts in enumerate(ranks):
        ram = root / f"ram{rank}-{generation}-{step}"
        ram.mkdir()
        boxes = {
            n: w[tuple(slice(o, o + s) for o, s in zip(at, sz, strict=True))] for n, (_, w, at, sz) in parts.items()
        }
        slices = [
            TensorSlice(name, dtype, whole.shape, offsets, sizes, 0, boxes[name].nbytes)
            for name, (dtype, whole, offsets, sizes) in parts.items()
        ]
        slices.sort(key=lambda part: (-NUMPY[part.dtype].itemsize, part.name))
        plan = plan_shard(slices, rank, len(ranks), {"dp_shard": len(ranks)}, 16 * 1024)
        raw = {
            n: {k: msgspec.Raw(msgspec.json.encode(v)) for k, v in d.items()}
            for n, d in (("s", scalars), ("l", leaves))
        }
        meta = SnapshotMeta(step=step, generation=generation, scalars=raw["s"], leaves=raw["l"])
        data = plan.header(meta) + b"".join(np.ascontiguousarray(boxes[part.name]).tobytes() for part in slices)
        segment = open_segment(ram / segment_name(0, 0), plan.size_bytes)
        segment.data[:] = data
        segment.complete(
            Control(
                step=step, generation=generation, rank=rank, world_size=len(ranks), size_bytes=len(data),
                checksum=checksum(data), layout=plan.digest, persist=PersistTo.RUN,
            )
        )  # fmt: skip
        segment.close()
        stores.append(NodeStore(ram, root / "run"))
    events = [event for store in reversed(stores) for event in store.persist_pending()]
    events += stores[0].commit_pending()
    assert {event.kind for event in events} == {StoreEventKind.PERSISTED, StoreEventKind.COMMITTED}, events
    return root / "run" / "checkpoints"


def grid(whole: np.ndarray, rows: int, columns: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of a rows x columns grid as torch cuts it: ceil-sized, the last ones smaller or empty."""

    def cuts(size: int, count: int) -> list[tuple[int, int]]:
        chunk = -(-size // count)
        starts = [min(i * chunk, size) for i in range(count)]
        return [(start, min(chunk, size - start)) for start in starts]

    for (top, height), (left, width) in itertools.product(cuts(whole.shape[0], rows), cuts(whole.shape[1], columns)):
        yield (top, left), (height, width)


def example_ranks() -> list[Parts]:
    """The worked example of the page: two ranks, a matrix cut by columns, a vector that both have."""
    weight, bias = np.arange(8, dtype="<f4").reshape(2, 4), np.array([0x3F80, 0xBF80], dtype="<u2")
    return [
        {"model.w": ("F32", weight, (0, 2 * rank), (2, 2)), "model.b": ("BF16", bias, (0,), (2,))} for rank in range(2)
    ]


EXAMPLE_SCALARS, EXAMPLE_LEAVES = {"tokens_seen": 81920}, {"optimizer.lr": 0.001}


def test_a_tensor_cut_in_two_dims_comes_back_whole(tmp_path: Path) -> None:
    """Four ranks in a 2 x 2 grid of uneven and empty boxes: every element is where it was, bit for bit."""
    generator = np.random.default_rng(7)
    weight = generator.standard_normal((5, 7)).astype("<f4")
    half = generator.integers(0, 1 << 16, (1, 3)).astype("<u2")
    ids = np.arange(4, dtype="<i8")
    ranks: list[Parts] = [
        {
            "model.weight": ("F32", weight, *box),
            "model.half": ("BF16", half, *small),
            "data.ids": ("I64", ids, (0,), (4,)),
        }
        for box, small in zip(grid(weight, 2, 2), grid(half, 2, 2), strict=True)
    ]
    reader = Reader(write(tmp_path, 40, 3, ranks, {"tokens_seen": 9}, {"optimizer.lr": 0.5}))
    assert np.array_equal(reader.tensor("model.weight"), weight)
    assert np.array_equal(reader.tensor("model.half"), half)
    assert np.array_equal(reader.tensor("data.ids"), ids)
    assert reader.values("scalars") == {"tokens_seen": 9}
    assert reader.values("leaves", 3) == {"optimizer.lr": 0.5}


def test_a_manager_s_own_snapshot_is_read(tmp_path: Path) -> None:
    """Every dtype of a state that went through shared memory; what numpy has no type for keeps its bytes."""
    run = OneRank(tmp_path, seed=3)
    run.persist(10)
    reader = Reader(run.run_dir / "checkpoints")
    for name, tensor in run.state.tensors.items():
        found = reader.tensor(f"model.{name}")
        assert found.shape == tuple(tensor.shape)
        assert found.tobytes() == bytes(as_bytes(tensor).numpy().data)
    assert reader.values("leaves")["model.values.name"] == "adamw"


def test_the_newest_is_of_the_latest_generation(tmp_path: Path) -> None:
    """Not the highest step, and not what `latest` says; a damaged manifest does not count."""
    write(tmp_path, 60, 1, example_ranks(), {"tokens_seen": 1}, {})
    checkpoints = write(tmp_path, 50, 2, example_ranks(), {"tokens_seen": 2}, {})
    (checkpoints / "latest").write_text("step-60\n")
    assert Reader(checkpoints).values("scalars") == {"tokens_seen": 2}
    flip_byte(checkpoints / "step-50" / "manifest.json", 60)
    assert Reader(checkpoints).values("scalars") == {"tokens_seen": 1}


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """The reader of the page refuses what Everstep refuses."""
    checkpoints = write(tmp_path, 40, 1, example_ranks(), {}, {})
    flip_byte(checkpoints / "step-40" / "g1-rank00001.safetensors", -1 + 16_000)
    with pytest.raises(ValueError, match=r"g1-rank00001\.safetensors is damaged"):
        Reader(checkpoints).tensor("model.w")


def test_a_slot_in_memory_is_as_the_page_says(tmp_path: Path) -> None:
    """The offsets of the page's table, read from the file without Everstep's own code."""
    run = OneRank(tmp_path, seed=1, generation=5)
    run.stage(10)
    found = {path: path.read_bytes() for path in run.ram_dir.glob("snapshot-0-*.seg")}
    (block,) = (data for data in found.values() if data[8] == 2)
    step, generation, rank, world_size, size_bytes, persist = struct.unpack_from("<6q", block, 16)
    assert block[:8] == b"EVSTEP01"
    assert (step, generation, rank, world_size, persist) == (10, 5, 0, 1, 0)
    assert len(block) == 4096 + size_bytes
    assert block[64:80].hex() == xxhash.xxh3_128_hexdigest(block[4096:])
    assert struct.unpack_from("<Q", block, 96)[0] == xxhash.xxh3_64_intdigest(block[16:96])
    (length,) = struct.unpack_from("<Q", block, 4096)
    header = block[4104 : 4104 + length]
    layout = json.loads(header)["__metadata__"]["everstep.layout"].encode()
    mark = b'"everstep.snapshot":'
    assert block[80:96].hex() == xxhash.xxh3_128_hexdigest(layout + header[: header.rindex(mark) + len(mark)])
    assert (block[256], block[320:344]) == (0, bytes(24)), "not being sent, and on no peer yet"


def test_the_reader_is_short_and_independent() -> None:
    """60 lines, and nothing of ours in it."""
    text = Path(__file__).read_text().split("# -- The independent reader")[1].split("# ----")[0]
    assert len(text.splitlines()) - 1 <= 60
    assert "checkpointing" not in text


def dumped() -> bytes:
    """The bytes of the page's dump; a `*` stands for lines like the one before it."""
    block = re.search(r"^```hexdump\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert block is not None
    data, repeated = b"", False
    for line in block[1].splitlines():
        if line == "*":
            repeated = True
            continue
        offset, _, rest = line.partition("  ")
        if repeated:
            data += data[-16:] * ((int(offset, 16) - len(data)) // 16)
            repeated = False
        assert int(offset, 16) == len(data)
        data += bytes.fromhex(rest.partition("  |")[0])
    return data


def test_the_worked_example_is_real(tmp_path: Path) -> None:
    """The dump is the file that is written, the documents of the page are those that are written, but for the time."""
    folder = write(tmp_path, 40, 1, example_ranks(), EXAMPLE_SCALARS, EXAMPLE_LEAVES) / "step-40"
    assert dumped() == (folder / "g1-rank00000.safetensors").read_bytes()
    sidecar, manifest = re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[:2]
    assert sidecar.encode() == (folder / "g1-rank00000.json").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(manifest)
    assert (manifest[54:55], manifest[-3:]) == ("{", "}}\n")
    reader = Reader(folder.parent)
    assert reader.tensor("model.w").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert f"{xxhash.xxh3_128_hexdigest(b'everstep')}" in PAGE
    assert CONTROL_BYTES == 4096
