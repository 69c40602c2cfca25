"""Verdicts on what the supervisor itself notices, and on what agents report: facts in, verdicts out, nothing kept."""

from __future__ import annotations

import msgspec

from cluster.messages import WorkerExit
from health.crash import judge_exit
from health.verdict import Cause, Certainty, Severity, Verdict
from trainer.events import Fact, FactKind


def agent_gone(node: str, step: int, last_words: tuple[str, ...]) -> Verdict:
    """The scheduler knows that the node's agent has ended."""
    return _about_node(node, Cause.NODE_LOST, step, ("the scheduler says that the node's agent is gone", *last_words))


def startup_timeout(node: str, step: int, timeout_s: float) -> Verdict:
    """The node did not get ready to start workers in time."""
    evidence = f"not ready after health.startup_timeout_s = {timeout_s:g} s"
    return _about_node(node, Cause.STARTUP_TIMEOUT, step, (evidence,))


def preempted(node: str, step: int, notice: str) -> Verdict:
    """The node was told that it will be taken away."""
    return _about_node(node, Cause.PREEMPTED, step, (notice,))


def skipped_update(fact: Fact) -> Verdict:
    """All ranks left an update out: nothing failed, but it should be known."""
    return Verdict(
        node=fact.node,
        rank=-1,
        cause=_odd(fact),
        severity=Severity.NOTICE,
        step=fact.step,
        fingerprint=_odd(fact).value,
        evidence=(fact.detail,),
    )


def odd_numbers(fact: Fact) -> Verdict:
    """A layer or the experts are out of line, which is only noted; or workers wait to go back, the job's matter."""
    wants = fact.kind is FactKind.ROLLBACK_WANTED
    return Verdict(
        node="",
        rank=-1,
        cause=_odd(fact),
        severity=Severity.WORKERS if wants else Severity.NOTICE,
        step=fact.step,
        fingerprint=_odd(fact).value,
        evidence=(fact.detail,),
    )


def corruption(fact: Fact) -> Verdict:
    """Ranks compared what they hold and compute: proof against the one that is named, else only something to know."""
    named = fact.blamed >= 0
    return Verdict(
        node=fact.node if named else "",
        rank=fact.blamed,
        cause=Cause.SILENT_CORRUPTION,
        severity=Severity.NODE if named else Severity.NOTICE,
        step=fact.step,
        fingerprint=Cause.SILENT_CORRUPTION.value,
        evidence=(fact.detail,),
        certainty=Certainty.PROOF if named else Certainty.HINT,
        mended=fact.mended,
    )


def _odd(fact: Fact) -> Cause:
    """The cause that a fact about numbers names; only facts of before there were several name none."""
    return Cause.NONFINITE if fact.oddity is None else Cause(fact.oddity.value)


def belated(verdict: Verdict, generation: int) -> Verdict:
    """What is said of workers that are gone already: nothing more follows from it."""
    line = f"said of the workers of generation {generation}, which had been ended by then"
    return msgspec.structs.replace(verdict, severity=Severity.NOTICE, evidence=(*verdict.evidence, line))


def worker_ended(node: str, death: WorkerExit, newest_step: int) -> Verdict:
    """A worker ended badly."""
    return judge_exit(
        node=node,
        rank=death.rank,
        exit_code=death.exit_code,
        signal_number=death.signal_number,
        error=death.error,
        log_tail=death.log_tail,
        oom_kill=death.oom_kill,
        step=death.error.step if death.error else newest_step,
        oom_scope=death.oom_scope,
        ram_free_bytes=death.ram_free_bytes,
    )


def _about_node(node: str, cause: Cause, step: int, evidence: tuple[str, ...]) -> Verdict:
    return Verdict(
        node=node, rank=-1, cause=cause, severity=Severity.NODE, step=step, fingerprint=cause.value, evidence=evidence
    )
