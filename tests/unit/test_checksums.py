"""A sum tells any flipped bit, on the CPU and as the GPU computes it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelism.checksums import Checksummer, checksums

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float16]

# Triton's interpreter runs the very kernel on the CPU; whether to use it is decided when triton is imported.
INTERPRETED = """
import random
import torch
from parallelism.checksum_kernel import Words

dice = random.Random(7)
tensors = [torch.randn(9000), torch.randn(7, dtype=torch.bfloat16), torch.zeros(0), torch.tensor(3.0),
           torch.randn(20, 5).t(), torch.randint(0, 9, (11,), dtype=torch.uint8)]
words = Words(tensors)
before = words.sums()
assert torch.equal(before, words.sums())
for _ in range(40):
    number = dice.choice([0, 1, 3, 4, 5])
    tensor = tensors[number]
    data = tensor.view(torch.uint8) if tensor.is_contiguous() and tensor.dim() else tensor
    data = tensor.untyped_storage()
    at, bit = dice.randrange(data.nbytes()), 1 << dice.randrange(8)
    data[at] = data[at] ^ bit
    changed = (words.sums() != before).nonzero().flatten().tolist()
    assert changed == [number], (changed, number)
    data[at] = data[at] ^ bit
for a, b in ((3, 8500), (0, 1), (8191, 8192)):
    for number in (0,):
        first, second = float(tensors[0][a]), float(tensors[0][b])
        tensors[0][a], tensors[0][b] = second, first
        assert words.sums()[0] != before[0], "an exchange went unnoticed"
        tensors[0][a], tensors[0][b] = -first, -second
        assert words.sums()[0] != before[0], "two flipped signs cancelled each other"
        tensors[0][a], tensors[0][b] = first, second
assert torch.equal(before, words.sums())
"""


@settings(max_examples=60)
@given(st.sampled_from(DTYPES), st.integers(1, 300), st.data())
def test_any_flipped_bit_changes_the_sum_of_its_tensor_alone(
    dtype: torch.dtype, count: int, data: st.DataObject
) -> None:
    """Whatever the type, the length and the place."""
    tensors = [torch.arange(count).to(dtype), torch.arange(count).to(dtype)]
    checksummer = Checksummer(tensors)
    before = checksummer.take()
    storage = tensors[1].view(torch.uint8)
    at = data.draw(st.integers(0, len(storage) - 1))
    storage[at] ^= 1 << data.draw(st.integers(0, 7))
    assert (checksummer.take() != before).tolist() == [False, True]


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=50), st.data())
def test_an_exchange_of_two_numbers_changes_the_sum(values: list[int], data: st.DataObject) -> None:
    """The sum knows where what stood."""
    i, j = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, len(values) - 1))
    exchanged = list(values)
    exchanged[i], exchanged[j] = values[j], values[i]
    same = checksums([torch.tensor(values)]).tolist() == checksums([torch.tensor(exchanged)]).tolist()
    assert same == (values[i] == values[j])


def test_a_view_counts_as_what_it_shows() -> None:
    """Strides do not matter, nor whether there is anything at all."""
    table = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(checksums([table.t()]), checksums([table.t().contiguous()]))
    assert len(checksums([])) == 0
    assert len(checksums([torch.zeros(0)])) == 1


def test_the_kernel_tells_flips_and_exchanges() -> None:
    """The same promises for the sum that a GPU takes."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
