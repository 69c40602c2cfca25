"""Texts from the network: what we write is read back as it was, and any other text is a ValueError and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.layout import ShardRef
from checkpointing.ratelimit import BURST_S, MAX_SLICE_BYTES, MIN_SLICE_BYTES, Bucket, RateLimit
from checkpointing.segment import Control, PersistTo
from checkpointing.transfer_auth import RequestHead, Session
from checkpointing.transfer_wire import (
    Span,
    decode_control,
    encode_control,
    format_content_range,
    format_range,
    parse_content_range,
    parse_range,
    parse_shard_path,
    shard_path,
)

SIZES = st.integers(0, 10**17)
TEXTS = st.text(st.characters(max_codepoint=255)) | st.from_regex(r"bytes[ =][0-9*]{0,25}-?[0-9]{0,25}/?[0-9]{0,25}")
HEX = st.text("0123456789abcdef", min_size=32, max_size=32)


@st.composite
def spans(draw: st.DrawFn) -> Span:
    total = draw(SIZES)
    start, end = sorted((draw(st.integers(0, total)), draw(st.integers(0, total))))
    return Span(start, end, total) if start < end else Span(0, 0, total)


@given(spans())
def test_a_content_range_is_read_back(span: Span) -> None:
    assert parse_content_range(format_content_range(span)) == span


@given(SIZES, SIZES)
def test_a_range_is_the_rest(start_bytes: int, total_bytes: int) -> None:
    """What is asked for from a start on is exactly what is missing there; beyond the end there is nothing."""
    if start_bytes == 0 or start_bytes < total_bytes:
        assert parse_range(format_range(start_bytes), total_bytes) == Span(start_bytes, total_bytes, total_bytes)
    else:
        with pytest.raises(ValueError, match="range"):
            parse_range(format_range(start_bytes), total_bytes)


@given(TEXTS, SIZES)
def test_any_text_is_a_possible_range_or_an_error(text: str, total_bytes: int) -> None:
    for parse in (parse_content_range, lambda t: parse_range(t, total_bytes)):
        try:
            span = parse(text)
        except ValueError:
            continue
        assert 0 <= span.start <= span.end <= span.total


@given(st.builds(ShardRef, SIZES, SIZES, SIZES), st.text())
def test_paths_are_read_back_and_nothing_else_is(ref: ShardRef, text: str) -> None:
    assert parse_shard_path(shard_path(ref)) == ref
    assert parse_shard_path(shard_path(ref) + "/") is None
    assert parse_shard_path(text) is None
    assert parse_shard_path("/shards/١/1/1") is None, "digits are ASCII"


@given(
    st.builds(
        Control, step=SIZES, generation=SIZES, rank=SIZES, world_size=SIZES, size_bytes=SIZES, checksum=HEX, layout=HEX
    )
)
def test_control_blocks_are_read_back(control: Control) -> None:
    ref = ShardRef(control.generation, control.step, control.rank)
    assert decode_control(encode_control(control), ref) == control
    with pytest.raises(ValueError, match="another shard"):
        decode_control(encode_control(control), ShardRef(ref.generation, ref.step + 1, ref.rank))


def test_the_sender_s_wishes_to_its_agent_do_not_travel() -> None:
    """A copy that asked to be persisted would be, by whichever node takes it over."""
    control = Control(
        step=1, generation=1, rank=0, world_size=1, size_bytes=0, checksum="0" * 32, layout="0" * 32,
        persist=PersistTo.RUN | PersistTo.NODE,
    )  # fmt: skip
    assert decode_control(encode_control(control), ShardRef(1, 1, 0)).persist == PersistTo.NOTHING
    theirs = encode_control(control).replace('"persist":0', '"persist":1')
    assert decode_control(theirs, ShardRef(1, 1, 0)).persist == PersistTo.NOTHING


@given(st.text(st.characters(max_codepoint=255)))
def test_any_other_control_block_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="control block"):
        decode_control(text, ShardRef(1, 1, 0))


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_fields_cannot_be_moved_into_each_other(first: str, second: str, third: str) -> None:
    """Two heads with the same proof are the same head."""
    session = Session(bytes(32), bytes(32), bytes(32))
    head = RequestHead(method="GET", path=first, counter="1", range=second, content_range=third)
    moved = RequestHead(method="GET", path=first + second, counter="1", range="", content_range=third)
    assert (session.prove_request(head) == session.prove_request(moved)) == (head == moved)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1)), min_size=1, max_size=50))
def test_a_bucket_never_gives_more_than_its_rate(takes: list[tuple[int, float]]) -> None:
    """In any stretch of time: the rate times the stretch, a burst, and the slice that is going."""
    bucket, now_s, granted = Bucket(1e6), 100.0, []
    for size_bytes, pause_s in takes:
        now_s += pause_s
        start_s = bucket.reserve(size_bytes, now_s)
        assert start_s >= now_s
        granted.append((start_s, size_bytes))
    for i, (first_s, _) in enumerate(granted):
        for j in range(i, len(granted)):
            bytes_before_last = sum(size for _, size in granted[i:j])
            assert bytes_before_last <= 1e6 * (granted[j][0] - first_s + BURST_S) * (1 + 1e-9) + 1


def test_a_limit_is_shared_and_lets_go() -> None:
    """What is taken is paid for by whoever comes next; close() and stop end a wait that would take an hour."""
    limit = RateLimit(1e6)
    assert limit.take(100)
    assert limit.take(int(3.6e9))
    answers = iter([False, False, True])
    assert not limit.take(1, lambda: next(answers))
    limit.close()
    assert not limit.take(1)


@pytest.mark.parametrize("rate", [None, 0, 1e3, 1e7, 1e12])
def test_slices_are_bounded(rate: float | None) -> None:
    assert MIN_SLICE_BYTES <= RateLimit(rate).slice_bytes <= MAX_SLICE_BYTES
    assert RateLimit(None).take(10**15)
