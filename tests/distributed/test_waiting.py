"""Time spent waiting for another rank is seen wherever torch waits, and is told from a rank's own time."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import timed
from tests.distributed.layouts import tiny
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

SLEEP_S = 0.2
# What a busy machine may add to a sleep, or to a wait.
SLACK_S = 0.1


def test_every_kind_of_wait_is_timed_while_it_is_asked_for() -> None:
    """Promise: the two places that are timed are all there are. Fails if torch renames them or goes round them."""
    late, waiting = run_ranks(2, timed.waits_of_each_kind, SLEEP_S)
    for kind in ("all_reduce", "functional", "operator", "send and receive"):
        assert waiting[kind] >= 0.8 * SLEEP_S, (kind, waiting)
        assert late[kind] <= SLACK_S, (kind, late)
    assert waiting["outside"] == late["outside"] == 0.0


LAYOUTS: list[dict[str, Any]] = [
    {"dp_shard": 2},
    {"tp": 2},
    {"pp": 2, "pp_microbatch_size": 2},
    {"family": "deepseek_v3", "dp_shard": 2, "ep": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["fsdp", "tp", "pp", "ep"])
def test_a_slow_rank_has_a_long_forward_and_its_peer_a_long_wait(layout: dict[str, Any]) -> None:
    """Promise: in every kind of group the slow rank's time is its own, and costs its peer nothing but waiting."""
    peer, slow = run_ranks(2, timed.split_steps, tiny(**layout), 1, SLEEP_S)
    # The best of some steps: what a busy machine adds is not in all of them.
    assert min(each.forward_s for each in slow) >= 0.9 * SLEEP_S
    assert min(each.forward_s for each in peer) <= min(each.forward_s for each in slow) - 0.5 * SLEEP_S
    assert max(each.wait_s for each in peer) >= 0.8 * SLEEP_S
    for each in (*peer, *slow):
        parts_s = each.data_s + each.forward_s + each.backward_s + each.optimizer_s + each.wait_s
        assert 0.0 < parts_s <= each.total_s + 1e-6
        assert min(each.backward_s, each.optimizer_s) > 0.0


def test_a_part_is_net_of_its_waits_and_a_pause_belongs_to_no_step() -> None:
    """Promise: the parts and the waiting add up to the step; what is paused for (validation) is in none of them."""
    late, waiting = run_ranks(2, timed.paused_and_waiting, SLEEP_S)
    assert SLEEP_S <= late.data_s <= SLEEP_S + SLACK_S
    assert 2 * SLEEP_S <= late.optimizer_s <= 2 * SLEEP_S + SLACK_S
    assert waiting.optimizer_s <= SLACK_S
    assert 2.5 * SLEEP_S <= waiting.wait_s <= 3 * SLEEP_S + 2 * SLACK_S
    assert late.total_s <= 4 * SLEEP_S + 3 * SLACK_S
    assert late.total_s == pytest.approx(late.data_s + late.optimizer_s + late.wait_s, abs=SLACK_S)
