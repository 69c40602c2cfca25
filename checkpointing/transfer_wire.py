"""Texts of the transfer protocol: paths, ranges and the control block as a header field. Nothing here is trusted."""

from __future__ import annotations

import re

import msgspec

from checkpointing.layout import GARBLED, ShardRef
from checkpointing.segment import Control, PersistTo

NONCE_PATH = "/nonce"
RESUME_INCOMPLETE = 308
MAX_HEAD_BYTES = 8192
_NUMBER = r"(0|[1-9][0-9]{0,17})"
_PATH = re.compile(rf"/shards/{_NUMBER}/{_NUMBER}/{_NUMBER}")
_RANGE = re.compile(rf"bytes={_NUMBER}-{_NUMBER}?")
_CONTENT_RANGE = re.compile(rf"bytes (?:{_NUMBER}-{_NUMBER}|\*)/{_NUMBER}")
_DIGEST = re.compile(r"[0-9a-f]{32}")


class Span(msgspec.Struct, frozen=True):
    """A stretch [start, end) of `total` bytes. An empty one only asks or says something about the whole."""

    start: int
    end: int
    total: int


def shard_path(ref: ShardRef) -> str:
    """A shard's place on a transfer server."""
    return f"/shards/{ref.generation}/{ref.step}/{ref.rank}"


def parse_shard_path(path: str) -> ShardRef | None:
    """The shard that a path names; None if it names none."""
    match = _PATH.fullmatch(path)
    return ShardRef(*map(int, match.groups())) if match else None


def format_range(start_bytes: int) -> str:
    """A Range field for everything from start_bytes on; "" for the whole."""
    return f"bytes={start_bytes}-" if start_bytes else ""


def parse_range(text: str, total_bytes: int) -> Span:
    """What a Range field ("" for the whole) asks for of total_bytes. ValueError if it cannot be had."""
    if not text:
        return Span(0, total_bytes, total_bytes)
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError("not a range of bytes")
    start = int(match.group(1))
    end = min(int(match.group(2)) + 1, total_bytes) if match.group(2) else total_bytes
    if start >= end:
        raise ValueError(f"no such range in {total_bytes} bytes")
    return Span(start, end, total_bytes)


def format_content_range(span: Span) -> str:
    """A Content-Range field."""
    place = f"{span.start}-{span.end - 1}" if span.start < span.end else "*"
    return f"bytes {place}/{span.total}"


def parse_content_range(text: str) -> Span:
    """The span of a Content-Range field, [0, 0) for `*`. ValueError if it is none."""
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        raise ValueError("not a content range of bytes")
    first, last, total = match.groups()
    span = Span(0, 0, int(total)) if first is None else Span(int(first), int(last) + 1, int(total))
    if span.end > span.total or (first is not None and span.start >= span.end):
        raise ValueError("content range does not fit its total")
    return span


def encode_control(control: Control) -> str:
    """A control block as one header field. What the sender's own agent is to do with the shard stays behind."""
    return msgspec.json.encode(msgspec.structs.replace(control, persist=PersistTo.NOTHING)).decode()


def decode_control(text: str, ref: ShardRef) -> Control:
    """The control block of `ref` in a header field. ValueError if it is garbled or another shard's."""
    try:
        control = msgspec.json.decode(text.encode("latin-1", "replace"), type=Control)
    except GARBLED as error:
        raise ValueError(f"control block is garbled ({error})") from error
    numbers = (control.step, control.generation, control.rank, control.world_size, control.size_bytes)
    if not all(0 <= number < 2**62 for number in numbers):
        raise ValueError("control block has impossible numbers")
    if not _DIGEST.fullmatch(control.checksum) or not _DIGEST.fullmatch(control.layout):
        raise ValueError("control block has impossible digests")
    if (control.generation, control.step, control.rank) != (ref.generation, ref.step, ref.rank):
        raise ValueError("control block is another shard's")
    return msgspec.structs.replace(control, persist=PersistTo.NOTHING)
