"""A file that was verified must give the same bytes when it is read to be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.blocks import BLOCK_BYTES, BlockDigests, VerifiedReader
from tests.chaos.faults import flip_byte

SIZE = 2 * BLOCK_BYTES + 12_345


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


def digests_of(content: bytes, piece_bytes: int) -> BlockDigests:
    digests = BlockDigests()
    for start in range(0, len(content), piece_bytes):
        digests.update(memoryview(content)[start : start + piece_bytes])
    return digests


@given(
    parts=st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), min_size=1, max_size=6),
    piece_bytes=st.sampled_from([BLOCK_BYTES // 3, BLOCK_BYTES, 8 * BLOCK_BYTES]),
)
def test_any_part_is_given_as_it_is(
    content: bytes, parts: list[tuple[int, int]], piece_bytes: int, tmp_path_factory
) -> None:  # type: ignore[no-untyped-def]
    path: Path = tmp_path_factory.getbasetemp() / "whole"
    path.write_bytes(content)
    with VerifiedReader(path, digests_of(content, piece_bytes)) as reader:
        for one, other in parts:
            start, end = sorted((one, other))
            buffer = bytearray(end - start)
            reader.read_into(memoryview(buffer), start)
            assert buffer == content[start:end]


@pytest.mark.parametrize("at", [0, BLOCK_BYTES - 1, BLOCK_BYTES, SIZE - 1])
def test_what_changed_after_it_was_verified_is_refused(content: bytes, at: int, tmp_path: Path) -> None:
    """Promise: not one byte that differs from what was verified is handed out, whole block or part of one."""
    path = tmp_path / "rotten"
    path.write_bytes(content)
    digests = digests_of(content, BLOCK_BYTES)
    flip_byte(path, at)
    begin = at // BLOCK_BYTES * BLOCK_BYTES
    for start, end in ((begin, min(begin + BLOCK_BYTES, SIZE)), (at, at + 1)):
        with VerifiedReader(path, digests) as reader, pytest.raises(OSError, match="has changed since it was verified"):
            reader.read_into(memoryview(bytearray(end - start)), start)


def test_a_file_cut_short_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(content)
    digests = digests_of(content, BLOCK_BYTES)
    os.truncate(path, SIZE - 1)
    with VerifiedReader(path, digests) as reader, pytest.raises(OSError, match="ended early"):
        reader.read_into(memoryview(bytearray(10)), SIZE - 10)
