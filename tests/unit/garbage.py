"""Bytes that somebody may send or leave behind: valid ones that were altered, and those that are made to hurt."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Iterator

from hypothesis import strategies as st


def altered(valid: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some cut out, changed, doubled or put in."""
    place = st.integers(0, max(0, len(valid) - 1))
    piece = st.binary(max_size=12)

    def change(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = valid
        for at, length, new in edits:
            data = data[:at] + new + data[at + length :]
        return data

    return st.lists(st.tuples(place, st.integers(0, 12), piece), min_size=1, max_size=6).map(change)


def msgpack_bombs() -> list[bytes]:
    """Short messages that claim to be huge, and long ones that are nothing but nesting."""
    deep = 1 << 20
    return [
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1
        b"\xdf\xff\xff\xff\xff",  # a map
        b"\xdb\xff\xff\xff\xff" + b"a" * 100,  # a string
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
        b"\x91" * deep,
        b"\x81\xa1x" * (deep // 3),
        b"\x81\xa4node" + b"\x91" * deep,
        b"\x81\xa7unknown" + b"\x91" * deep,
        b"\x82\xa4type\xa6report\xa7unknown" + b"\x91" * deep,
        b"\x82\xa4type\xa5order\xa7unknown" + b"\x91" * deep,
        b"\x81\xa5beats\xdd\x7f\xff\xff\xff",
    ]


def json_bombs(field: str) -> list[bytes]:
    """The same as JSON; field: the name of one that the reader knows."""
    deep = 1 << 18
    name = field.encode()
    return [
        b"[" * deep,
        b'{"a":' * deep,
        b'{"unknown":' + b"[" * deep,
        b'{"' + name + b'":' + b"[" * deep,
        b'{"' + name + b'":' + b"9" * deep + b"}",
        b'{"' + name + b'":-' + b"9" * 400 + b"}",
        b'{"' + name + b'":1e999999999}',
        b'{"' + name + b'":"' + b"\\ud800" * 1000 + b'"}',
        b'{"' + name + b'":"\xff\xfe"}',
        b"\x00" * 100,
        b"",
    ]


@contextlib.contextmanager
def bounded(seconds: float = 5.0, bytes_: int = 256 << 20) -> Iterator[None]:
    """What is done inside takes neither long nor much memory."""
    tracemalloc.start()
    began_s = time.process_time()
    try:
        yield
        used_s, peak = time.process_time() - began_s, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert used_s < seconds, f"{used_s:.1f} s"
    assert peak < bytes_, f"{peak >> 20} MiB"
