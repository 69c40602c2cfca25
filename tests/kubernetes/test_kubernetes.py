"""Promises on a Kubernetes whose nodes run real processes: submit a job and forget it, whatever nodes do."""

from __future__ import annotations

import base64
import os
import signal

import msgspec
import psutil
import pytest

from cluster.events import AgentStarted, NodeEvicted, NodeReady, RunStarted, SupervisorTookOver
from cluster.keys import JobKeys
from tests.kubernetes.conftest import CONTROL, NODES, QUOTED, STEPS, KubeJob, MakeKubeJob
from tests.kubernetes.controller import PODS
from tests.kubernetes.lab import Lab

pytestmark = pytest.mark.kubernetes

BAD, OUT = "everstep.dev/bad", "node.kubernetes.io/out-of-service"


def test_a_node_that_loses_power_is_replaced(make_job: MakeKubeJob, lab: Lab, undisturbed: dict[str, str]) -> None:
    """Promise: a spare takes the ranks, the bad node is cordoned and tainted with our reason, its pod is replaced and
    is a spare again, and the weights are the undisturbed run's."""
    job = make_job("power", 2).submit()
    job.wait_for_step(3)
    check_secrets(job)
    lost = job.members()[1]
    (fourth,) = set(NODES) - set(lab.pods("agents"))
    lab.power_off(lost)
    job.wait_until(lambda: job.members()[1] != lost, "the replacement")
    assert job.ended() == "Completed", job.said()
    assert job.causes() == ["node_lost"]
    assert fourth in started(job)
    assert {(BAD, "NoSchedule"), (OUT, "NoExecute")} <= lab.taints(lost)
    assert lab.node(lost)["spec"]["unschedulable"]
    assert lab.node(lost)["metadata"]["annotations"]["everstep.dev/reason"].startswith("everstep: node_lost: ")
    assert "everstep: node_lost" in job.everstep("nodes", "--cluster", "kubernetes", "--profile", str(job.profile))
    assert job.weights(STEPS) == undisturbed


@pytest.mark.long
def test_spares_are_replaced_for_ever(make_job: MakeKubeJob, lab: Lab) -> None:
    """Promise: with one spare, two nodes may die one after the other, if there are others in the cluster: the pod in
    the first one's place is the spare for the second. A node that is back and readmitted is used like any other."""
    job = make_job("chain", 2, "--training.steps", "1000000").submit()
    dead: list[str] = []
    for _ in range(2):
        step = job.steps()[-1].step if job.steps() else 0
        job.wait_for_step(step + 3)
        job.wait_until(lambda: len(spares(job)) == 1, "a spare")
        dead.append(job.members()[0])
        lab.power_off(dead[-1])
        job.wait_until(lambda: dead[-1] not in job.members(), "the replacement")
    assert set(dead).isdisjoint(job.members())
    lab.power_on(dead[0])
    job.wait_until(lambda: (OUT, "NoExecute") not in lab.taints(dead[0]), "an end of the taint")
    where = ("--cluster", "kubernetes", "--profile", str(job.profile), "--history", str(job.run_dir / "nodes.jsonl"))
    job.everstep("readmit", dead[0], *where, "--reason", "repaired")
    job.wait_until(lambda: dead[0] in lab.pods("agents"), "a pod on the node that is back")
    job.everstep("cancel", job.name)
    job.wait_until(lambda: job.state() == "gone" and not lab.store.list(PODS), "the end")


def check_secrets(job: KubeJob) -> None:
    """What the profile names arrives as it was written; a key of the job is in no command line, no variable, and no
    object but its Secret."""
    agents = [each for each in psutil.process_iter(["cmdline"]) if is_agent(each, job)]
    assert len(agents) == 3
    assert {agent.environ()["EVERSTEP_TEST"] for agent in agents} == {QUOTED}
    secret = job.lab.store.get("secrets", "default", f"{job.name}-key")["data"]["job.json"]
    keys = msgspec.json.decode(base64.b64decode(secret), type=JobKeys)
    everybody = list(psutil.process_iter(["cmdline", "environ"]))
    hidden = (keys.server.secret, keys.client.secret, secret)
    shown = [f"{process.info['cmdline']} {process.info['environ']}" for process in everybody]
    shown += [str(job.lab.store.list(each)) for each in (PODS, "jobs.batch", "jobsets.jobset.x-k8s.io", "configmaps")]
    assert not [text for text in shown if any(key in text for key in hidden)]


@pytest.mark.long
def test_a_pod_that_is_taken_away_saves_and_moves(make_job: MakeKubeJob, lab: Lab, undisturbed: dict[str, str]) -> None:
    """Promise: an evicted pod's ranks are saved in its grace time and move to the spare; no node is blamed."""
    job = make_job("evicted", 2, "--checkpoint.persist_interval_steps", "1000").submit()
    job.wait_for_step(3)
    victim = job.members()[0]
    pod = lab.pods("agents")[victim]
    lab.store.delete(PODS, "default", pod["metadata"]["name"])
    job.wait_until(lambda: victim not in job.members(), "the move")
    assert job.ended() == "Completed", job.said()
    assert job.causes() == ["preempted"]
    assert lab.taints(victim) == set()
    assert [record.step for record in job.steps()] == list(range(1, STEPS + 1))
    assert job.weights(STEPS) == undisturbed


@pytest.mark.long
def test_the_supervisors_node_dies(make_job: MakeKubeJob, lab: Lab, undisturbed: dict[str, str]) -> None:
    """Promise: training goes on without a supervisor; its pod is replaced on another node, and takes over."""
    job = make_job("headless", 2, on_gpus=True).submit()
    job.wait_for_step(3)
    host = next(iter(lab.pods("supervisor")))
    assert host not in job.members()
    lab.power_off(host)
    before = job.steps()[-1].step
    job.wait_until(lambda: any(isinstance(each, SupervisorTookOver) for each in job.events()), "the take-over")
    assert job.steps()[-1].step > before
    assert sum(isinstance(each, RunStarted) for each in job.events()) == 1
    assert job.ended() == "Completed", job.said()
    assert job.weights(STEPS) == undisturbed


@pytest.mark.long
def test_what_nvsentinel_says_is_heard(make_job: MakeKubeJob, lab: Lab, undisturbed: dict[str, str]) -> None:
    """Promise: a node that NVSentinel has quarantined loses its ranks to a spare, and is left to NVSentinel."""
    job = make_job("sentinel", 2).submit()
    job.wait_for_step(3)
    node = job.members()[1]
    said = "[DCGM_FR_FAULTY_MEMORY] GPU memory failure on GPU 0 - RecommendedAction: RESTART_VM"
    lab.set_condition(node, "GpuMemWatch", "GpuMemWatchIsNotHealthy", said)
    lab.store.merge("nodes", "", node, {
        "spec": {"unschedulable": True}, "metadata": {"annotations": {"quarantineHealthEvent": "[{}]"}},
    })  # fmt: skip
    job.wait_until(lambda: node not in job.members(), "the eviction")
    assert job.ended() == "Completed", job.said()
    (verdict, *_) = [event.verdict for event in job.events() if hasattr(event, "verdict")]
    assert (verdict.node, "DCGM_FR_FAULTY_MEMORY" in verdict.evidence[0]) == (node, True)
    assert "everstep.dev/reason" not in lab.node(node)["metadata"]["annotations"]
    assert job.weights(STEPS) == undisturbed


@pytest.mark.long
def test_a_cancelled_job_saves(make_job: MakeKubeJob, lab: Lab) -> None:
    """Promise: `everstep cancel` has the run save, and nothing of it is left on the cluster; submitted again, it goes
    on from there. Plain Jobs do it as a JobSet does."""
    job = make_job("cancelled", 1, "--checkpoint.persist_interval_steps", "1000", kind="job").submit()
    job.wait_for_step(3)
    assert "running" in job.everstep("status", job.name)
    job.everstep("cancel", job.name)
    job.wait_until(lambda: job.state() == "gone" and not lab.store.list(PODS), "the end")
    (saved,) = snapshots(job)
    assert saved == job.steps()[-1].step
    job.submit()
    assert job.ended() == "Complete", job.said()
    assert [record.step for record in job.steps()] == list(range(1, STEPS + 1))


@pytest.mark.long
def test_a_supervisor_that_is_killed_is_back_at_once(make_job: MakeKubeJob, lab: Lab) -> None:
    """Promise: the death of the supervisor's process alone costs nothing: its pod starts another, which takes over."""
    job = make_job("killed", 1).submit()
    job.wait_for_step(3)
    supervisors = [each for each in psutil.process_iter(["cmdline"]) if is_supervisor(each, lab)]
    assert len(supervisors) == 1
    os.kill(supervisors[0].pid, signal.SIGKILL)
    job.wait_until(lambda: any(isinstance(each, SupervisorTookOver) for each in job.events()), "the take-over")
    assert set(lab.pods("supervisor")) == {CONTROL}
    assert job.ended() == "Completed", job.said()
    assert job.causes() == []


def is_agent(process: psutil.Process, job: KubeJob) -> bool:
    """Whether this is an agent of the job; its fork server has other words."""
    return {"cluster.agent_main", str(job.run_dir)} <= {*(process.info["cmdline"] or ())}


def is_supervisor(process: psutil.Process, lab: Lab) -> bool:
    """Whether this is `everstep run`, in a pod of the lab."""
    words = process.info["cmdline"] or ()
    return {"cluster.cli", "run"} <= {*words} and words[-1].startswith(str(lab.home))


def spares(job: KubeJob) -> set[str]:
    """Nodes that said they are ready, hold no ranks, and were not evicted."""
    ready: set[str] = set()
    for event in job.events():
        match event:
            case NodeReady():
                ready.add(event.node)
            case NodeEvicted():
                ready.discard(event.node)
    return ready - set(job.members())


def started(job: KubeJob) -> set[str]:
    """Nodes that agents were started on."""
    return {event.node for event in job.events() if isinstance(event, AgentStarted)}


def snapshots(job: KubeJob) -> list[int]:
    """Steps of the snapshots that are whole on disk."""
    found = (job.run_dir / "checkpoints").glob("step-*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)
