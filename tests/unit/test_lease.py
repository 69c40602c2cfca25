"""The lease: a node that hears nothing stops if, and only if, somebody lives who does not reach it."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.lease import PAUSE_S, Lease, LeaseKeeper, LeaseWatch, Sight, Touch, Unreadable, judge, look, read_lease

TIMEOUT_S = 10.0


def lease(rounds: int, supervisor: str = "a") -> Lease:
    return Lease(supervisor=supervisor, host="h", pid=1, renewals=rounds, rounds=rounds, t_wall_s=0.0)


def after(*found: Lease | Unreadable | None, every_s: float = 1.0) -> tuple[Sight, float]:
    """What looks at the lease, one after the other, have shown, and when the last one was."""
    sight = Sight()
    for index, each in enumerate(found):
        sight = look(sight, each, index * every_s)
    return sight, (len(found) - 1) * every_s


def test_somebody_renews_it_and_does_not_speak_to_us() -> None:
    sight, now_s = after(*(lease(n) for n in range(13)))
    assert judge(13.0, sight, now_s, TIMEOUT_S) is Touch.CUT_OFF


def test_nobody_renews_it_so_training_goes_on() -> None:
    sight, now_s = after(*[lease(7)] * 100)
    assert judge(1000.0, sight, now_s, TIMEOUT_S) is Touch.ORPHANED
    sight, now_s = after(*[None] * 100)
    assert judge(1000.0, sight, now_s, TIMEOUT_S) is Touch.ORPHANED


def test_a_supervisor_that_died_while_we_looked_is_dead() -> None:
    sight, now_s = after(*(lease(min(n, 5)) for n in range(30)))
    assert judge(1000.0, sight, now_s, TIMEOUT_S) is Touch.ORPHANED


def test_a_supervisor_that_is_stuck_gives_no_ranks_away() -> None:
    """Its thread renews the lease, but its loop listens to nobody."""
    stuck = [msgspec.structs.replace(lease(7), renewals=n) for n in range(50)]
    sight, now_s = after(*stuck)
    assert judge(60.0, sight, now_s, TIMEOUT_S) is Touch.ORPHANED


def test_a_run_directory_that_is_gone_with_the_network_is_no_comfort() -> None:
    sight, now_s = after(*[Unreadable("hangs")] * 12)
    assert judge(14.0, sight, now_s, TIMEOUT_S) is Touch.CUT_OFF


def test_a_new_supervisor_gets_as_long_to_be_heard_as_any() -> None:
    """The old one was dead for minutes; that silence is not counted against its successor."""
    looks: list[Lease | Unreadable | None] = [lease(7)] * 200 + [lease(n, "b") for n in range(8)]
    sight, now_s = after(*looks)
    assert judge(208.0, sight, now_s, TIMEOUT_S) is Touch.ORPHANED
    sight, now_s = after(*looks, *(lease(n, "b") for n in range(8, 14)))
    assert judge(214.0, sight, now_s, TIMEOUT_S) is Touch.CUT_OFF


LOOKS = st.lists(st.one_of(st.builds(lease, st.integers(0, 3)), st.just(Unreadable("x")), st.none()), max_size=40)


@given(LOOKS, st.floats(0.1, 5.0), st.floats(0.0, 1000.0))
def test_whoever_was_heard_in_time_is_never_cut_off(looks: list, every_s: float, silent_s: float) -> None:
    sight, now_s = after(*looks, every_s=every_s)
    if judge(silent_s, sight, now_s, TIMEOUT_S) is Touch.CUT_OFF:
        assert silent_s > TIMEOUT_S
        assert now_s - sight.since_s > TIMEOUT_S


@given(LOOKS, st.integers(2, 30))
def test_whatever_was_seen_before_a_lease_that_stands_still_is_dead(looks: list, still: int) -> None:
    """Property: looks that show no change for longer than the pause make the supervisor a dead one."""
    if still <= PAUSE_S + 1:
        return
    sight, now_s = after(*looks, *[lease(99)] * (still + 1))
    assert sight.since_s == math.inf
    assert judge(1e6, sight, now_s, TIMEOUT_S) is Touch.ORPHANED


@given(LOOKS, st.integers(12, 40))
def test_whatever_was_seen_before_a_lease_that_is_renewed_cuts_off_in_time(looks: list, more: int) -> None:
    """Property: after the time-out of renewals without a word nobody goes on."""
    sight, now_s = after(*looks, *(lease(100 + n) for n in range(more + 1)))
    assert judge(1e6, sight, now_s, TIMEOUT_S) is Touch.CUT_OFF


def test_a_keeper_renews_while_its_loop_goes_round(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    keeper = LeaseKeeper(path, "here")
    keeper.start()
    try:
        deadline = time.monotonic() + 10.0
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        first = read_lease(path)
        assert isinstance(first, Lease)
        assert (first.host, first.pid) == ("here", os.getpid())
        keeper.on_tick()
        while (now := read_lease(path)) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert isinstance(now, Lease)
        assert (now.rounds, now.supervisor) == (first.rounds + 1, first.supervisor)
        assert now.renewals > first.renewals
    finally:
        keeper.stop()
    assert not list(tmp_path.glob(".lease*")), "no half-written files stay"
    assert LeaseKeeper(path, "here").supervisor != first.supervisor


def test_damage_and_absence_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    assert read_lease(path) is None
    assert isinstance(read_lease(tmp_path / "gone" / "lease.json"), Unreadable)
    for data in (b"", b"{", b"\xff\xfe", b'{"supervisor": 1}', b"[" * 5000):
        path.write_bytes(data)
        assert isinstance(read_lease(path), Unreadable)


@pytest.mark.parametrize("heard_again", [False, True])
def test_a_file_system_that_hangs_does_not_hang_the_watch(tmp_path: Path, heard_again: bool) -> None:
    """Promise: reading happens elsewhere; asking is quick, and in the end the node knows that it must stop."""
    path = tmp_path / "lease.json"
    os.mkfifo(path)  # whoever opens it for reading waits for a writer
    watch = LeaseWatch(path, timeout_s=0.5, look_after_s=0.1)
    began_s = time.monotonic()
    cut_off, longest_s = False, 0.0
    while not cut_off and time.monotonic() - began_s < 20.0:
        before_s = time.monotonic()
        silent_s = 0.0 if heard_again else before_s - began_s
        cut_off = watch.cut_off(silent_s, before_s)
        longest_s = max(longest_s, time.monotonic() - before_s)
        if heard_again and before_s - began_s > 1.0:
            break
        time.sleep(0.01)
    assert cut_off is not heard_again
    assert longest_s < 1.0
    if not heard_again:
        assert sum(thread.name == "lease" for thread in threading.enumerate()) == 1, "one read hangs, not many"
        with path.open("wb"):  # let it go
            pass
