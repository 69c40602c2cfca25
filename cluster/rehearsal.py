"""An old journal under the policy and configuration of today: where would it have decided otherwise? Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.actions import Decision, action_event
from cluster.events import ActionTaken, AnyEvent, VerdictGiven
from cluster.jobstate import EVICTING_ACTIONS, JobState
from cluster.policy import decide
from cluster.state import apply
from configs.schema import JobConfig


@dataclass(frozen=True)
class Rehearsed:
    """One decision, made again on the run as it was then. taken: what the journal has; None if the supervisor died."""

    given: VerdictGiven
    taken: ActionTaken | None
    again: Decision

    @property
    def would(self) -> ActionTaken:
        """The new decision as the journal would have it."""
        at = self.given
        return action_event(self.again, at.incident, at.t_wall_s, at.t_mono_s, at.verdict.node)

    @property
    def differs(self) -> bool:
        """Whether something else would have been done, or to another node."""
        if self.taken is None:
            return False
        return _deed(self.taken) != _deed(self.would)


def rehearse(events: Sequence[AnyEvent], config: JobConfig) -> list[Rehearsed]:
    """Every decision of a journal once more. Each is made on what really happened before it, not on what would have
    followed from an earlier one that is different now: what would have failed then nobody knows."""
    state = JobState()
    found = []
    for index, event in enumerate(events):
        state = apply(state, event)
        if isinstance(event, VerdictGiven):
            found.append(Rehearsed(event, _taken(events, index), decide(event, state, config)))
    return found


def _taken(events: Sequence[AnyEvent], index: int) -> ActionTaken | None:
    """The first action for the incident after its verdict."""
    given = events[index]
    assert isinstance(given, VerdictGiven)
    for event in events[index + 1 :]:
        if isinstance(event, ActionTaken) and event.incident == given.incident:
            return event
        if isinstance(event, VerdictGiven):
            return None
    return None


def _deed(event: ActionTaken) -> tuple[str, str, str]:
    evicts = event.action in EVICTING_ACTIONS
    return event.action, event.node if evicts else "", event.spare if evicts else ""
