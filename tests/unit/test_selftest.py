"""Promise: a device that computes, keeps or adds up wrongly is found and named; what dies or hangs is a result too."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from parallelism.known_answers import PROBLEMS, Problem, digest, operands
from parallelism.selftest import CPU, Result, Settings, examine

SMALL = Settings(cpu_mib=1, timeout_s=60.0, collective=False)


def name(problem: Problem) -> str:
    return f"{problem.dtype}-{'selection' if problem.sparse else 'product'}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=name)
def test_the_stored_answers_are_right(problem: Problem) -> None:
    """Computed in whole numbers by numpy; every product and every possible partial sum is exact in its type."""
    left, right = (factor.numpy() for factor in operands(problem))
    assert digest(torch.from_numpy(left @ right)) == problem.answer
    dtype = getattr(torch, problem.dtype)
    exact = 2.0 / torch.finfo(dtype).eps
    largest_sum = int((np.abs(left) @ np.abs(right)).max())
    # Sums in bfloat16 and float16 are kept in float32 by every kernel; what is rounded to the type at the end is not.
    summed = torch.float64 if problem.dtype == "float64" else torch.float32
    assert largest_sum <= 2.0 / torch.finfo(summed).eps
    for factor in (left, right, left @ right):
        assert np.abs(factor).max() <= exact


@pytest.mark.parametrize("problem", PROBLEMS, ids=name)
def test_a_selection_fills_the_mantissa(problem: Problem) -> None:
    """Between them, the problems of a type exercise every bit of its mantissa."""
    mine = [each for each in PROBLEMS if each.dtype == problem.dtype]
    used = 0
    for factor in itertools.chain.from_iterable(operands(each) for each in mine):
        used |= int(np.bitwise_or.reduce(np.abs(factor.numpy()), axis=None))
    wanted = {"bfloat16": 8, "float16": 11, "float32": 10, "float64": 20}[problem.dtype]
    assert used.bit_length() >= wanted


def failed(settings: Settings = SMALL) -> list[Result]:
    return [result for result in examine(settings).results if not result.ok]


def test_a_sound_machine_passes() -> None:
    """All tests on this one, with a collective of three ranks; throughputs come with their units."""
    found = examine(Settings(cpu_mib=2, ranks=3))
    assert [result for result in found.results if not result.ok] == []
    assert {result.unit for result in found.results if result.value} == {"GB/s", "TFLOP/s"}
    (collective,) = [result for result in found.results if result.test == "collective"]
    assert collective.detail == "all-reduce over 3 ranks, gloo"


def breaking(monkeypatch: pytest.MonkeyPatch, target: Any, attribute: str, spoil: Callable[[Any], Any]) -> None:
    """Have torch itself give wrong results, here and in what is forked from here."""
    right = getattr(target, attribute)
    monkeypatch.setattr(target, attribute, lambda *args, **kwargs: spoil(right(*args, **kwargs)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda product: product.index_put_((torch.tensor(3), torch.tensor(5)), product[3, 5] + 1), "first at [3, 5]"),
        (lambda product: product * 2, "results are wrong in repeat 1"),
        (lambda product: product.clone().fill_(float("nan")), "results are wrong in repeat 1"),
    ],
)
def test_a_wrong_product_is_located(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], Any], words: str) -> None:
    """One element, all of them, or no numbers at all: every dtype says what came and what should have."""
    breaking(monkeypatch, torch, "mm", spoil)
    found = failed()
    assert {result.test.split()[1] for result in found} == {problem.dtype for problem in PROBLEMS}
    assert all(words in result.detail and result.device == CPU for result in found)


def test_an_error_that_comes_now_and_then_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third repeat counts like the first."""
    calls = itertools.count(1)
    breaking(monkeypatch, torch, "mm", lambda product: product + 1 if next(calls) == 3 else product)
    assert ["repeat 3" in result.detail for result in failed()] == [True]


def test_memory_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One word that keeps another pattern than was written."""

    def stuck(block: torch.Tensor) -> torch.Tensor:
        block[77] &= ~4
        return block

    breaking(monkeypatch, torch.Tensor, "fill_", stuck)
    (found,) = [result for result in failed() if result.test == "memory"]
    assert "1 of 131,072 words lost pattern 0xffffffffffffffff" in found.detail


def test_a_sum_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the rank that has it."""
    right = torch.distributed.all_reduce

    def wrong(tensor: torch.Tensor) -> None:
        right(tensor)
        if torch.distributed.get_rank() == 1:
            tensor[9] += 1

    monkeypatch.setattr(torch.distributed, "all_reduce", wrong)
    (found,) = failed(Settings(cpu_mib=1, ranks=2))
    assert (found.test, found.detail) == ("collective", "1 of 65,536 sums are wrong")


def test_a_device_that_kills_its_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in a driver ends a child, not the examination."""
    breaking(monkeypatch, torch, "mm", lambda product: os.kill(os.getpid(), signal.SIGKILL))
    assert [(result.device, result.detail) for result in failed()] == [(CPU, "the test's process died (SIGKILL)")]


def test_a_device_that_hangs_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And told apart from one that is wrong: it is late."""
    breaking(monkeypatch, torch, "mm", lambda product: signal.pause())
    begun_s = time.monotonic()
    (found,) = failed(Settings(cpu_mib=1, timeout_s=3.0, collective=False))
    assert (found.detail, found.late) == ("no answer in time", True)
    assert time.monotonic() - begun_s < 30.0
