"""A run that changes its size: what people are told of it, what its time went into, and what SLURM says of nodes."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import msgspec
import pytest

from cluster import events
from cluster.actions import Decision, Grow, action_event
from cluster.alert_words import AlertWriter
from cluster.console import describe
from cluster.ledger import account
from cluster.report import headlines, summary
from cluster.slurm_scheduler import _Present
from cluster.timeline import TimeCause
from configs.schema import AlertsConfig
from configs.shrinking import largest_layout
from health.verdict import Severity
from tests.unit import stories
from tests.unit.stories import EPOCH_S
from tests.unit.test_policy_size import job
from tests.unit.test_slurm import answering
from trainer.events import FactKind, StepRecord

FOUR = ("node0", "node1", "node2", "node3")
THREE = ("node0", "node2", "node3")


def start(wanted: int = 4) -> events.RunStarted:
    return msgspec.structs.replace(stories.started(1, EPOCH_S), nodes=wanted, sizes="may shrink to 3 of 4 nodes")


def plan(generation: int, at_s: float, nodes: tuple[str, ...], reason: str = "why") -> events.GenerationPlanned:
    layout = largest_layout(job(), len(nodes)) if len(nodes) < 4 else None
    planned = stories.planned(generation, EPOCH_S + at_s, nodes)
    return msgspec.structs.replace(planned, layout=layout, reason=reason)


def steps(generation: int, first: int, at_s: float, count: int = 10) -> list[StepRecord]:
    ranks = 8 if generation != 2 else 6
    return [
        msgspec.structs.replace(
            stories.record(first + i, generation, EPOCH_S + at_s + i + 1, 1.0, 0.0, 0.0), ranks=ranks
        )
        for i in range(count)
    ]


JOURNAL = [
    start(),
    plan(1, 0.0, FOUR),
    stories.fact(FactKind.FIRST_STEP, 1, 1, EPOCH_S + 1),
    plan(2, 10.0, THREE, "node1 is lost"),
    stories.fact(FactKind.FIRST_STEP, 2, 11, EPOCH_S + 11),
    action_event(Decision(Grow(FOUR, "it is back")), 0, EPOCH_S + 20, EPOCH_S + 20),
    plan(3, 25.0, FOUR, "it grows"),
    stories.fact(FactKind.FIRST_STEP, 3, 21, EPOCH_S + 26),
]
RECORDS = [*steps(1, 1, 0.0), *steps(2, 11, 10.0), *steps(3, 21, 25.0)]


def test_the_time_in_which_all_save_to_grow_is_not_lost() -> None:
    """Promise: and what part of the machines worked is told beside ETTR."""
    goodput = account(JOURNAL, RECORDS, EPOCH_S + 35)
    assert goodput.productive_s == pytest.approx(30.0)
    assert goodput.badput_s[TimeCause.FINISHING] == pytest.approx(5.0)
    assert goodput.badput_s[TimeCause.LOST] == 0
    assert goodput.lost_steps == 0
    assert goodput.productive_share == pytest.approx((20 + 10 * 0.75) / 30)
    whole = account([start(), *JOURNAL[1:3]], RECORDS[:10], EPOCH_S + 10)
    assert whole.productive_share == 1.0


def test_a_report_says_at_which_size_a_run_is_and_why() -> None:
    small = summary(job(), JOURNAL[:5], RECORDS[:20], EPOCH_S + 20)
    told = dict(headlines(small))
    assert told["size"].startswith("3 of 4 nodes (dp_shard 6) since ")
    assert "node1 is lost" in told["size"]
    assert "% of them held ranks" in told["ettr"]
    again = summary(job(), JOURNAL, RECORDS, EPOCH_S + 35)
    assert "size" not in dict(headlines(again))
    assert [line.partition(": ")[2] for line in again.resizes] == ["3 nodes: node1 is lost", "4 nodes: it grows"]
    assert again.tokens_per_sec == pytest.approx(512 * 8), "the median over all steps, each of its own ranks"


def test_changes_of_size_are_alerts() -> None:
    """Promise: once each; a start as it was asked for is none, and a supervisor that takes over tells what it sees."""
    writer = AlertWriter("story", AlertsConfig())
    told = [alert for event in JOURNAL for alert in writer.take(event)]
    assert [(alert.kind, alert.title, alert.severity) for alert in told] == [
        ("size", "shrinks from 4 to 3 nodes", Severity.NODE),
        ("size", "grows from 3 to 4 nodes", Severity.NOTICE),
    ]
    assert "node1 is lost" in told[0].text
    later = AlertWriter("story", AlertsConfig())
    assert [alert.title for alert in later.take(JOURNAL[3])] == ["goes on with only 3 nodes"]
    assert AlertWriter("story", AlertsConfig(events=("end",))).take(JOURNAL[3]) == []


def test_the_console_says_how_small_a_run_may_become_and_is() -> None:
    assert describe(JOURNAL[0]).endswith("may shrink to 3 of 4 nodes")
    assert "dp_shard 6" in describe(JOURNAL[3])
    assert "node1 is lost" in describe(JOURNAL[3])


def test_nodes_of_the_allocation_that_are_up_again_appear(tmp_path: Path) -> None:
    """Promise: not those that are used, not those that an administrator has drained, and no call waits for SLURM."""
    said = tmp_path / "said"
    names = ["node1", "node2", "node3"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        present = _Present(answering(tmp_path, sinfo=f"cat {said}"), pool, names)
        for name in names[:2]:
            present.started(name)

        def now(*rows: str) -> list[str]:
            said.write_text("".join(f"{row}|none\n" for row in rows))
            present._asked_s = float("-inf")
            present.appeared()
            assert present._asking is not None
            present._asking.result()
            return list(present.appeared())

        assert now("node1|allocated", "node2|allocated", "node3|allocated") == ["node3"]
        assert now("node1|allocated", "node2|down*", "node3|allocated") == ["node3"]
        assert now("node1|allocated", "node2|allocated", "node3|drained") == ["node2"]
        present.started("node2")
        assert now("node1|mixed", "node2|allocated", "node3|draining") == []
