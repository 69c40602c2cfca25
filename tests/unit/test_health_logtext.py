"""Of a dead worker's log what tells is kept, however much a crash printed after it."""

from __future__ import annotations

import signal
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from health.crash import judge_exit
from health.logtext import EVIDENCE_LINES, LAST_LINES, TELLING, TELLING_LINES, last_words, may_tell, shorten_log
from health.verdict import Cause, Verdict

CRASH = """
import ctypes, faulthandler, sys, threading
faulthandler.enable()
def deep(n):
    if n: return deep(n - 1)
    {last}
for _ in range(20):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
deep(50)
"""


def crash_log(last: str) -> tuple[int, list[str]]:
    """What a real process with many threads and a deep stack prints as it crashes."""
    done = subprocess.run([sys.executable, "-c", CRASH.format(last=last)], stderr=subprocess.PIPE)
    return -done.returncode, done.stderr.decode().splitlines()


def judged(number: int, log: tuple[str, ...]) -> Verdict:
    """The verdict on it."""
    return judge_exit("node0", 1, None, number, None, log, False, 4)


def test_a_real_segmentation_fault_shows_its_innermost_frames() -> None:
    """Promise: evidence begins with what it was and where, not with the outermost frames that all stacks share."""
    number, log = crash_log("ctypes.string_at(0)")
    assert len(log) > LAST_LINES + EVIDENCE_LINES
    kept = shorten_log(log)
    assert len(kept) <= LAST_LINES + TELLING_LINES
    verdict = judged(number, kept)
    assert (verdict.cause, verdict.fingerprint) == (Cause.WORKER_CRASH, "SIGSEGV")
    assert verdict.evidence[1] == "log: Fatal Python error: Segmentation fault"
    assert verdict.evidence[2].startswith("log: Current thread 0x")
    assert verdict.evidence[3].endswith(" in string_at")
    assert verdict.evidence == judged(number, tuple(log)).evidence


def test_what_a_library_said_before_a_real_abort_is_not_pushed_out_by_the_stacks() -> None:
    """Promise: a GPU error that NCCL's watchdog printed before it aborted is found behind 100 lines of stacks."""
    words = "terminate called after throwing\\\\n  what():  CUDA error: an illegal memory access was encountered"
    number, log = crash_log(f"import os; sys.stderr.write('{words}\\\\n'); sys.stderr.flush(); os.abort()")
    verdict = judged(number, shorten_log(log))
    assert number == signal.SIGABRT
    assert (verdict.cause, verdict.fingerprint) == (Cause.CUDA_ERROR, "gpu: illegal memory access")


LINES = st.lists(
    st.sampled_from([
        "step 1", "", "Connection closed by peer", "CUDA error: unknown error", "CUDA out of memory.",
        "Fatal Python error: Aborted", "Current thread 0x1 (most recent call first):", "  File x, line 1", "y" * 900,
    ]),
    max_size=200,
)  # fmt: skip


@given(LINES)
def test_a_short_log_is_in_the_same_order_and_has_an_end(lines: list[str]) -> None:
    """Promise: what is kept is a part of the log in its order, bounded, and says the same about the cause."""
    kept = shorten_log(lines)
    assert len(kept) <= LAST_LINES + TELLING_LINES
    assert all(len(line) <= 500 for line in kept)
    rest = iter([line[:500] for line in lines])
    assert all(line in rest for line in kept)
    assert judged(signal.SIGABRT, kept).cause is judged(signal.SIGABRT, tuple(lines)).cause
    assert len(last_words(lines)) <= EVIDENCE_LINES


@given(st.data())
def test_no_line_that_tells_is_passed_over(data: st.DataObject) -> None:
    """Promise: looking for stems first is only quicker: each text that a pattern matches has one of them."""
    pattern = data.draw(st.sampled_from(TELLING))
    assert may_tell(data.draw(st.from_regex(pattern.pattern)))
    assert not may_tell("step 12 of 900  loss 3.41  grad_norm 1.20  tps 12345")
