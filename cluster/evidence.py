"""What speaks against a node: verdicts of this incident and of earlier ones, weighed together. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cluster.events import Place, VerdictGiven
from cluster.jobstate import Failure, JobState
from cluster.policy_words import duration
from health.verdict import Cause, Certainty, Severity, Verdict

GONE = (Cause.NODE_LOST, Cause.PREEMPTED)
_SLOW = (Cause.STRAGGLER, Cause.SLOW_NETWORK, Cause.SLOW_DATA, Cause.SLOW_JOB)
_IMPAIRED = (Cause.GPU_DEGRADED, Cause.NODE_DEGRADED, Cause.LINK_FAULT)
_FAULTY = (Cause.GPU_FAULT, Cause.NODE_FAULT, Cause.SILENT_CORRUPTION, Cause.PREFLIGHT_FAILED)
_NUMBERS = (Cause.NONFINITE, Cause.SPIKE, Cause.BAD_LAYER, Cause.EXPERT_COLLAPSE)
_TELLING = (
    Cause.HANG, Cause.STARTUP_TIMEOUT, Cause.WORKER_KILLED, Cause.WORKER_CRASH, Cause.CUDA_ERROR, Cause.STRAGGLER,
    *_IMPAIRED, *_FAULTY,
)  # fmt: skip
_KEPT_OTHERS = 64


class Weight(msgspec.Struct, frozen=True, kw_only=True):
    """What there is against one node, together.

    gone: it is lost or must go, whatever anybody thinks of it. slow: all that it does wrong now is to be slow, by the
    part `slowdown`. pieces: a line each. strikes: earlier incidents among them.
    """

    node: str
    certainty: Certainty
    gone: bool
    slow: bool
    slowdown: float
    strikes: int
    pieces: tuple[str, ...]


def weigh(node: str, given: VerdictGiven, state: JobState, window_s: float) -> Weight | None:
    """Weigh everything against a node; None if nothing in this incident speaks against it.

    A verdict about the node has its own certainty. One about its workers that a bad node could explain is a hint, as
    is what the run's memory of the node holds. A hint alone stays one; two that are independent are together
    `likely`: of other generations, or within one of other causes, where all that is said of its workers' end is one.
    Nothing older than window_s counts, and no verdict makes another one certain: only one that is a proof by itself is.
    """
    now = [each for each in verdicts_of(given) if each.node == node and _tells(each.severity, each.cause)]
    if not now:
        return None
    before = earlier(node, given, state, window_s)
    strongest = max((_strength(each) for each in now), key=_order)
    remembered = state.remembered.get(node)
    suspect = remembered is not None and remembered.place is not Place.MEMBER
    corroborated = suspect or len({_witness(each.severity, each.cause) for each in now}) > 1
    corroborated = corroborated or any(_independent(old, new, given) for old in before for new in now)
    if strongest is Certainty.HINT and corroborated:
        strongest = Certainty.LIKELY
    pieces = [f"{each.cause.value} now ({_strength(each).value})" for each in now]
    pieces += [
        f"{old.cause.value} in incident {old.incident}, {duration(max(0.0, given.t_wall_s - old.t_wall_s))} ago"
        for old in before
    ]
    if suspect and remembered is not None:
        pieces.append(f"from before this run: {remembered.reason}")
    return Weight(
        node=node,
        certainty=strongest,
        gone=any(each.cause in GONE for each in now),
        slow=all(each.cause in _SLOW for each in now),
        slowdown=max(each.slowdown for each in now),
        strikes=len({old.incident for old in before}),
        pieces=tuple(pieces),
    )


def worst(given: VerdictGiven, state: JobState, window_s: float) -> Weight | None:
    """Against which node that holds ranks the most speaks: gone before bad, proof before hints, first come before."""
    nodes = list(dict.fromkeys(each.node for each in verdicts_of(given) if each.node in state.order))
    weights = [weight for node in nodes if (weight := weigh(node, given, state, window_s)) is not None]
    return max(weights, key=lambda weight: (weight.gone, _order(weight.certainty), not weight.slow), default=None)


def verdicts_of(given: VerdictGiven) -> list[Verdict]:
    """The verdicts of an incident that ask for something, the root first."""
    return [each for each in (given.verdict, *given.others) if each.severity is not Severity.NOTICE]


def goes_on(verdict: Verdict) -> bool:
    """Whether training goes on as it should beside what the verdict says, until somebody ends it."""
    if verdict.mended or verdict.cause in _SLOW:
        return True
    if verdict.cause not in (*_IMPAIRED, *_FAULTY, *_NUMBERS):
        return False
    if verdict.certainty is Certainty.HINT:
        return True
    return verdict.cause in _IMPAIRED and verdict.severity is Severity.NODE


def earlier(node: str, given: VerdictGiven, state: JobState, window_s: float) -> list[Failure]:
    """What other incidents had against the node, the newest last."""
    return [
        old
        for old in state.failures
        if old.node == node
        and old.incident != given.incident
        and given.t_wall_s - old.t_wall_s <= window_s
        and _tells(old.severity, old.cause)
    ]


def speaks_against(verdict: Verdict) -> bool:
    """Whether a verdict says something about its node's own health; what only takes the node away does not."""
    return bool(verdict.node) and verdict.cause is not Cause.PREEMPTED and _tells(verdict.severity, verdict.cause)


def worth_telling(root: Verdict, verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """The other verdicts of an incident as the journal keeps them: of a hundred thousand ranks that fail together not
    every word, but first those about nodes, and peers that were only left alone last."""
    others = list(verdicts)
    if root in others:
        others.remove(root)
    others.sort(key=lambda each: (each.severity is not Severity.NODE, each.cause is Cause.PEER_LOST))
    return tuple(others[:_KEPT_OTHERS])


def _tells(severity: Severity, cause: Cause) -> bool:
    """Whether such a verdict says something about the node's own health."""
    return severity is Severity.NODE or (severity is Severity.WORKERS and cause in _TELLING)


def _strength(verdict: Verdict) -> Certainty:
    return verdict.certainty if verdict.severity is Severity.NODE else Certainty.HINT


def _independent(old: Failure, new: Verdict, given: VerdictGiven) -> bool:
    """Whether an earlier piece is more than the same thing seen again."""
    if old.generation != given.generation:
        return True
    return _witness(old.severity, old.cause) != _witness(new.severity, new.cause)


def _witness(severity: Severity, cause: Cause) -> str:
    """Who says it, within one generation: a probe that repeats itself is one witness, and so are all that was seen of
    the workers' end, by whatever names: a GPU's error, the crash that it led to, and those who hung for it."""
    return severity.value if severity is Severity.WORKERS else cause.value


def _order(certainty: Certainty) -> int:
    return list(Certainty).index(certainty)
