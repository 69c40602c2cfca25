"""What the policy can want, and the event that says so in the journal."""

from __future__ import annotations

import msgspec

from cluster.events import ActionTaken
from cluster.policy_numbers import Rollback, back_to


class Restart(msgspec.Struct, frozen=True, tag="restart"):
    """All workers start again, on the same nodes."""

    reason: str


class Replace(msgspec.Struct, frozen=True, tag="replace"):
    """The node is evicted and the spare takes over its ranks; then all workers start again."""

    node: str
    spare: str
    reason: str


class Shrink(msgspec.Struct, frozen=True, tag="shrink"):
    """The node is evicted, no spare is left, and these nodes go on with a smaller layout; all workers start again."""

    node: str
    order: tuple[str, ...]
    reason: str


class Grow(msgspec.Struct, frozen=True, tag="grow"):
    """All save and leave at the end of the step, and start again on these nodes with a larger layout."""

    order: tuple[str, ...]
    reason: str


class Evict(msgspec.Struct, frozen=True, tag="evict"):
    """A node that holds no ranks gets no more work; training is not touched."""

    node: str
    reason: str


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """The run ends with this exit code."""

    exit_code: int
    reason: str


class Nothing(msgspec.Struct, frozen=True, tag="nothing"):
    """Training goes on."""

    reason: str


Action = Restart | Replace | Shrink | Grow | Evict | Rollback | Stop | Nothing


class Decision(msgspec.Struct, frozen=True):
    """An action, and the facts that led to it: a line each, for a person."""

    action: Action
    because: tuple[str, ...] = ()


def action_event(decision: Decision, incident: int, t_wall_s: float, t_mono_s: float, blamed: str = "") -> ActionTaken:
    """The decision as the journal has it. blamed: the node of the verdict, for actions that name none."""
    action = decision.action
    return ActionTaken(
        t_wall_s=t_wall_s,
        t_mono_s=t_mono_s,
        incident=incident,
        action=str(type(action).__struct_config__.tag),
        reason=action.reason,
        node=action.node if isinstance(action, Replace | Shrink | Evict) else blamed,
        spare=action.spare if isinstance(action, Replace) else "",
        because=decision.because,
        back=back_to(action) if isinstance(action, Rollback) else None,
        order=action.order if isinstance(action, Shrink | Grow) else (),
    )
