"""Flipped bits on real ranks: each found, blamed on the rank it struck, and gone from what the update is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema import JobConfig
from tests.distributed.corruption import (
    Told,
    always_wrong,
    checked,
    drifted,
    flipped_state,
    flips,
    restless,
    struck_forward,
    suspects,
)
from tests.distributed.layouts import tiny
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "fsdp2_tp2": tiny(dp_shard=2, tp=2),
    "hsdp2x2": tiny(dp_replicate=2, dp_shard=2),
    "pp2_fsdp2": tiny(pp=2, dp_shard=2),
    "ep2_fsdp4": tiny("deepseek_v3", dp_shard=4, ep=2),
    "ep2_tp2": tiny("deepseek_v3", dp_shard=2, tp=2, ep=2),
}
FSDP4 = tiny(dp_shard=4)
UNNAMED = "some rank, it is not known which, sent other numbers than when it computed the same step again"


def blamed(told: list[Told]) -> set[tuple[int, int]]:
    """Steps and ranks of all proofs; each is told by the rank itself."""
    for rank, each in enumerate(told):
        assert all(named == rank for _, named in each.blamed)
    return {proof for each in told for proof in each.blamed}


def unnamed(told: list[Told]) -> list[str]:
    """Findings that name nobody."""
    return [words for each in told for words in each.unnamed]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name != "fsdp2_tp2" else []) for name in LAYOUTS]
)
def test_a_flip_on_the_way_is_blamed_on_its_rank_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    """Gradients before and after they are mixed, and activations; in each layout the rank is named, and no other, and
    the state ends as it would have."""
    results = run_ranks(4, flips, LAYOUTS[name], tmp_path, timeout_s=500)
    told = [each for _, each in results]
    assert blamed(told) == {(2, 1), (3, 3), (4, 2), (5, 0)}
    assert unnamed(told) == []
    assert all(right == each.digest for right, each in results)


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_nobody_is_blamed_where_nothing_is_wrong(name: str, tmp_path: Path) -> None:
    """In each layout replicas agree, replays repeat themselves here and elsewhere, and change nothing."""
    results = run_ranks(4, checked, LAYOUTS[name], tmp_path, timeout_s=500)
    told = [each for _, each in results]
    assert blamed(told) == set()
    assert unnamed(told) == []
    assert [words for _, words in told[0].replays] == ["as scheduled; the same result again, and on other devices"] * 3
    assert all(right == each.digest for right, each in results)


@pytest.mark.parametrize("config", [FSDP4, pytest.param(LAYOUTS["fsdp2_tp2"], marks=pytest.mark.long)])
def test_a_flip_in_memory_is_found_before_the_next_update(config: JobConfig, tmp_path: Path) -> None:
    """Weights and moments: the rank is named, the generation ends, and the snapshot that may have it is distrusted."""
    results = run_ranks(4, flipped_state, config, tmp_path)
    for place, guilty in ((0, 1), (1, 2)):
        told = [each[place] for each in results]
        assert blamed(told) == {(2, guilty)}
        assert told[0].distrusted == [1]
        assert [each.stopped for each in told] == [2, 2, 2, 2]


def test_replicas_that_drift_apart_are_found_and_the_odd_one_is_named(tmp_path: Path) -> None:
    """Of four, the one that differs; snapshots since they were last equal are distrusted."""
    told = run_ranks(4, drifted, tiny(dp_replicate=4), tmp_path)
    assert blamed(told) == {(8, 2)}
    assert told[0].distrusted == [4, 5, 6, 7]
    assert [each.stopped for each in told] == [8, 8, 8, 8]


@pytest.mark.long
def test_of_two_replicas_nobody_knows_which_is_wrong(tmp_path: Path) -> None:
    """Both are told of, neither is blamed, and the state is not gone on from."""
    told = run_ranks(4, drifted, LAYOUTS["hsdp2x2"], tmp_path)
    assert blamed(told) == set()
    assert unnamed(told) == ["ranks 0, 2 should hold the same weights and optimizer state, and do not"]
    assert [each.stopped for each in told] == [8, 8, 8, 8]


@pytest.mark.parametrize("config", [FSDP4, pytest.param(tiny(dp_replicate=4), marks=pytest.mark.long)])
def test_a_device_that_is_always_wrong_alike_is_named_by_others(config: JobConfig, tmp_path: Path) -> None:
    """The replay on the same device shows nothing; those on two others do, also where no gradient is scattered."""
    told = run_ranks(4, always_wrong, config, tmp_path)
    assert blamed(told) == {(2, 1)}
    assert [each.stopped for each in told] == [2, 2, 2, 2]


def test_odd_numbers_of_the_data_are_no_devices_fault(tmp_path: Path) -> None:
    """What is not finite comes out the same everywhere, and nobody is blamed; a flip that was not recorded is undone
    all the same, and the next one is named."""
    results = run_ranks(4, suspects, FSDP4, tmp_path)
    legitimate, flipped = [each for _, each, _ in results], [each for _, _, each in results]
    assert blamed(legitimate) == set()
    assert unnamed(legitimate) == []
    assert legitimate[0].replays == [(2, "not finite; the same result again, and on other devices")]
    assert all(each.digest == right for right, each, _ in results)
    assert blamed(flipped) == {(2, 3)}
    assert unnamed(flipped) == [UNNAMED]


@pytest.mark.long
@pytest.mark.parametrize("name", ["pp2_fsdp2", "ep2_fsdp4", "fsdp2_tp2"])
def test_where_ranks_mix_their_numbers_no_rank_is_named_without_a_record(name: str, tmp_path: Path) -> None:
    """The loss of another rank may be the first thing known to differ: it is not blamed. The next flip is recorded."""
    told = run_ranks(4, struck_forward, LAYOUTS[name], tmp_path, timeout_s=500)
    assert blamed(told) == {(3, 1)}
    assert unnamed(told) == [UNNAMED]


@pytest.mark.long
def test_kernels_that_never_repeat_themselves_are_nobodys_fault(tmp_path: Path) -> None:
    """Every rank's result is another each time: training goes on with one of them."""
    told = run_ranks(4, restless, FSDP4, tmp_path)
    assert blamed(told) == set()
    assert unnamed(told) == []
    assert told[0].replays == [(2, "as scheduled; each of three computations gave something else: kernels here are not "
                                   "deterministic")]  # fmt: skip
    assert [each.stopped for each in told] == [0, 0, 0, 0]
