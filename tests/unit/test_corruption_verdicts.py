"""What ranks find out about wrong numbers becomes a verdict, and what the policy makes of it."""

from __future__ import annotations

from cluster.actions import Nothing, Replace
from cluster.policy import decide
from cluster.state import replay
from cluster.suspicions import corruption
from health.verdict import Cause, Certainty, Severity
from tests.unit import stories
from trainer.events import Fact, FactKind

RUNNING = replay([
    stories.started(1, 0.0), *(stories.ready(f"node{i}", 1.0) for i in range(3)), stories.planned(1, 2.0),
])  # fmt: skip


def found(blamed: int) -> Fact:
    """A finding that a rank of node1 tells."""
    return Fact(
        kind=FactKind.CORRUPTION_FOUND, node="node1", rank=2, generation=1, step=8, t_wall_s=9.0, detail="differs",
        blamed=blamed,
    )  # fmt: skip


def test_a_rank_that_is_named_costs_its_node_the_place() -> None:
    """Proof needs no second witness, nor does it matter that the rank then ended with an error of its own."""
    verdict = corruption(found(blamed=2))
    assert (verdict.node, verdict.rank, verdict.cause) == ("node1", 2, Cause.SILENT_CORRUPTION)
    assert (verdict.severity, verdict.certainty) == (Severity.NODE, Certainty.PROOF)
    ended = stories.verdict(Cause.USER_ERROR, "node1", 2, 8)
    for first, others in ((verdict, ()), (verdict, (ended,)), (ended, (verdict,))):
        action = decide(stories.given(first, 1, 1, 10.0, others=others), RUNNING, stories.job()).action
        assert isinstance(action, Replace)
        assert action.node == "node1"


def test_a_finding_that_names_nobody_is_only_known() -> None:
    """The node whose rank told it is not the one that is meant."""
    verdict = corruption(found(blamed=-1))
    assert (verdict.node, verdict.rank) == ("", -1)
    assert (verdict.severity, verdict.certainty) == (Severity.NOTICE, Certainty.HINT)
    action = decide(stories.given(verdict, 1, 0, 10.0), RUNNING, stories.job()).action
    assert isinstance(action, Nothing)
