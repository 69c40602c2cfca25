"""On a GPU what computes is timed on the device, a step late and without waiting for it. Needs a CUDA device."""

from __future__ import annotations

import time

import pytest
import torch

from parallelism.clock import Part, Split, running_clock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CYCLES = 200_000_000
"""Of `torch.cuda._sleep`: about 0.1 s."""


def timed_steps(count: int) -> tuple[list[Split], float]:
    """Steps that compute, and then wait for another stream as long; and what the first took of the host, seconds."""
    device, other = torch.device("cuda", 0), torch.cuda.Stream()
    splits, host_s = [], 0.0
    with running_clock(device) as clock:
        for step in range(1, count + 1):
            began_s = time.perf_counter()
            clock.begin(step)
            clock.switch(Part.FORWARD)
            torch.cuda._sleep(CYCLES)
            clock.switch(Part.BACKWARD)
            with torch.cuda.stream(other):
                other.wait_stream(torch.cuda.default_stream())
                torch.cuda._sleep(CYCLES)
            torch.cuda.current_stream().wait_event(other.record_event())
            clock.switch(Part.OTHER)
            found = clock.finish()
            host_s = host_s or time.perf_counter() - began_s
            splits += [found] if found is not None else []
            torch.cuda.synchronize()
    return splits, host_s


def test_computing_and_waiting_are_told_apart_on_the_device() -> None:
    """Promise: the computing stream's sleep is forward, the other one's waiting, and backward is short."""
    splits, host_s = timed_steps(4)
    assert [each.step for each in splits] == [1, 2, 3], "a step is read one step late"
    assert host_s < 0.05, "nothing may wait for the device"
    for each in splits:
        assert each.forward_s > 0.02
        assert each.wait_s == pytest.approx(each.forward_s, rel=0.2)
        assert each.backward_s < 0.2 * each.forward_s
