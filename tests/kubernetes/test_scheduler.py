"""Promises of the scheduler inside a Kubernetes job, against a server with real semantics: it uses no more than its
role grants, never loses somebody else's change, and is current again after whatever happens to its watches.

Pods are objects here, and what their entries would say is written for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cluster import kube_scheduler
from cluster.kube_client import KubeClient
from cluster.kube_marks import unmark
from cluster.kube_names import Inside
from cluster.kube_orders import PodState, read_order, write_state
from cluster.kube_rbac import account_objects
from cluster.kube_scheduler import Handle, KubeScheduler
from cluster.rundir import RunDir
from configs.load import load_job
from health.verdict import Cause
from tests.kubernetes import rbac
from tests.kubernetes.apiserver import ApiServer, Request
from tests.kubernetes.controller import PODS, condition, reconcile
from tests.kubernetes.nodes import CORDONED, NODES, NodeControllers
from tests.kubernetes.store import Object, Store
from tests.unit.kubejobs import SITE, plan

BAD, OUT = "everstep.dev/bad", "node.kubernetes.io/out-of-service"
_WORDS = "--cluster.backend kubernetes --cluster.nodes 2 --cluster.ranks_per_node 1 --cluster.spares 1"
_JOB = load_job("debug_dense", _WORDS.split())


class Cluster:
    """Nodes n0 .. n3, and an Indexed Job of three pods on the first three of them."""

    def __init__(self, folder: Path, server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.server = server
        self.store: Store = server.store
        self.monkeypatch = monkeypatch
        self.run_dir = RunDir(folder / "run")
        self.run_dir.create()
        self.controllers = NodeControllers(self.store, 1e9)
        self.schedulers: list[KubeScheduler] = []
        for index in range(4):
            status = {"conditions": [condition("Ready", "KubeletReady", "")]}
            metadata = {"name": f"n{index}", "labels": {"rack": f"r{index // 2}"}}
            self.store.create(NODES, "", {"kind": "Node", "metadata": metadata, "spec": {}, "status": status})
        self.grant("taint")
        labels = {"everstep.dev/run": "demo", "everstep.dev/role": "agents"}
        alone = {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}
        spec = {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [alone]}}}
        spec |= {"terminationGracePeriodSeconds": 60, "containers": [{"name": "agent"}]}
        job = {
            "kind": "Job",
            "metadata": {"name": "demo-agents"},
            "spec": {
                "completions": 3,
                "podReplacementPolicy": "Failed",
                "podFailurePolicy": {"rules": []},
                "template": {"metadata": {"labels": labels}, "spec": spec},
            },
        }
        self.store.create("jobs.batch", "default", job)
        self.turn()

    def grant(self, bad_node: str) -> None:
        """The roles that `everstep submit` makes for such a profile."""
        made = account_objects(plan(msgspec.structs.replace(SITE, service_account="", bad_node=bad_node)))
        for each in made:
            group = each["apiVersion"].partition("/")[0] if "/" in each["apiVersion"] else ""
            resource = f"{each['kind'].lower()}s" + (f".{group}" if group else "")
            place = (resource, each["metadata"].get("namespace", ""), each["metadata"]["name"])
            if self.store.find(*place) is not None:
                self.store.delete(*place)
            self.store.create(place[0], place[1], each)

    def turn(self) -> None:
        """Controllers look once, and kubelets start what is new."""
        for _ in range(4):
            reconcile(self.store)
            self.controllers.reconcile(time.monotonic())
        for pod in self.pods():
            if pod["spec"].get("nodeName") and pod["status"]["phase"] == "Pending":
                self.store.merge(PODS, "default", pod["metadata"]["name"], {"status": {"phase": "Running"}})
                self.says(pod)

    def pods(self) -> list[Object]:
        """All pods."""
        return self.store.list(PODS)

    def pod_on(self, node: str) -> Object:
        """The pod on a node."""
        (pod,) = [each for each in self.pods() if each["spec"].get("nodeName") == node]
        return pod

    def says(self, pod: Object, serial: int = 0, running: bool = False) -> None:
        """What the entry of a pod would say."""
        uid, node = pod["metadata"]["uid"], pod["spec"]["nodeName"]
        state = PodState(serial=serial, running=running, pod_uid=uid, node_name=node)
        write_state(self.run_dir.path, pod["metadata"]["name"], state)

    def node(self, name: str) -> Object:
        """A node as it stands."""
        return self.store.get(NODES, "", name)

    def taints(self, name: str) -> set[str]:
        """Keys of a node's taints, but for that of a cordon."""
        return {each["key"] for each in self.node(name)["spec"].get("taints") or ()} - {CORDONED}

    def ready(self, node: str, status: str) -> None:
        """What the life cycle of nodes would say."""
        self.controllers.heard_s[node] = float("-inf") if status == "Unknown" else time.monotonic()
        conditions = [condition("Ready", "x", "", status)]
        self.store.merge(NODES, "", node, {"status": {"conditions": conditions}})

    def open(self, bad_node: str = "taint") -> KubeScheduler:
        """The scheduler, with the account of its pod."""
        path = self.folder / "kubeconfig"
        path.write_text(self.server.kubeconfig(rbac.account("default", "demo")))
        self.monkeypatch.setenv("KUBECONFIG", str(path))
        here = Inside(
            namespace="default", name="demo", kind="job", pod_name="s", pod_uid="u", node_name="n9", domain_label="rack"
        )
        config = msgspec.structs.replace(_JOB, cluster=msgspec.structs.replace(_JOB.cluster, bad_node=bad_node))
        scheduler = KubeScheduler(self.run_dir, config, here, KubeClient(), watch_s=5.0)
        scheduler.open()
        self.schedulers.append(scheduler)
        return scheduler


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """See `Cluster`."""
    monkeypatch.setattr(kube_scheduler, "RELEASE_AFTER_S", 0.3)
    monkeypatch.setattr(kube_scheduler, "_SPARES_TIMEOUT_S", 0.5)
    monkeypatch.setattr(kube_scheduler, "_IDLE_EVERY_S", 0.2)
    with ApiServer(Store()) as server:
        made = Cluster(tmp_path, server, monkeypatch)
        yield made
        for scheduler in made.schedulers:
            scheduler.stop()


def wait_until(true: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for a condition."""
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


def test_nodes_are_those_whose_pods_are_up(cluster: Cluster) -> None:
    """Promise: in the order of their pods; one that nothing new should run on comes last."""
    cluster.store.merge(NODES, "", cluster.pods()[0]["spec"]["nodeName"], {"spec": {"unschedulable": True}})
    scheduler = cluster.open()
    first, second, third = (pod["spec"]["nodeName"] for pod in cluster.pods())
    assert scheduler.node_names(3) == [second, third, first]
    cluster.store.merge(PODS, "default", cluster.pod_on(second)["metadata"]["name"], {"status": {"phase": "Failed"}})
    wait_until(lambda: scheduler.node_names(3) == [third, first])


def test_nodes_are_waited_for_until_enough_can_be_used(cluster: Cluster) -> None:
    """Promise: one that the run refuses counts for nothing, and nobody waits for a run that is to end."""
    scheduler = cluster.open()
    looks = iter(range(100))
    assert scheduler.node_names(3, lambda names: min(len(names), next(looks))) == ["n0", "n1", "n2"]
    assert next(looks) >= 3
    began_s = time.monotonic()
    assert scheduler.node_names(3, lambda names: 0, lambda: time.monotonic() - began_s > 0.3) == ["n0", "n1", "n2"]


def test_an_agent_lives_as_long_as_its_pod_says(cluster: Cluster) -> None:
    """Promise: `alive` is false when its pod says so or is gone, and not while nobody knows."""
    scheduler = cluster.open()
    pod = cluster.pod_on("n0")
    handle = scheduler.start("n0")
    order = read_order(cluster.run_dir.path, pod["metadata"]["name"])
    assert order is not None
    assert (order.agent_name, order.action, order.serial, order.domain) == ("n0", "start", 1, "r0")
    assert scheduler.alive(handle)  # the order may not have been read yet
    cluster.says(pod, serial=1, running=True)
    wait_until(lambda: scheduler.states.of(pod["metadata"]["name"]).running)  # type: ignore[union-attr]
    assert scheduler.alive(handle)
    cluster.says(pod, serial=1, running=False)
    wait_until(lambda: not scheduler.alive(handle))
    again = scheduler.start("n0")
    assert (Handle.of(again).serial, scheduler.alive(again), scheduler.alive(handle)) == (2, True, False)
    cluster.says(pod, serial=2, running=True)
    wait_until(lambda: scheduler.states.of(pod["metadata"]["name"]).running)  # type: ignore[union-attr]
    assert scheduler.alive(again)
    assert not scheduler.alive(handle)
    cluster.store.delete(PODS, "default", pod["metadata"]["name"], grace_s=0)
    for each in cluster.pods():
        cluster.store.merge(PODS, "default", each["metadata"]["name"], {"metadata": {"finalizers": []}})
    wait_until(lambda: not scheduler.alive(again))
    with pytest.raises(ValueError, match="no pod of this job is up on n0"):
        scheduler.start("n0")


def test_the_pod_of_a_node_that_was_given_up_is_replaced(cluster: Cluster) -> None:
    """Promise: its agent is told to end, the pod is deleted, and the one that the Job makes is there to be used."""
    scheduler = cluster.open()
    pod = cluster.pod_on("n0")
    handle = scheduler.start("n0")
    scheduler.kill("n0", handle, for_good=True)
    name = pod["metadata"]["name"]
    wait_until(lambda: read_order(cluster.run_dir.path, name).action == "stop")  # type: ignore[union-attr]
    wait_until(lambda: cluster.store.get(PODS, "default", name)["metadata"].get("deletionTimestamp"))
    assert set(scheduler.appeared()) == {"n1", "n2"}
    cluster.store.merge(NODES, "", "n0", {"spec": {"unschedulable": True}})
    cluster.store.merge(PODS, "default", name, {"status": {"phase": "Failed"}})
    cluster.turn()
    wait_until(lambda: set(scheduler.appeared()) == {"n1", "n2", "n3"})
    scheduler.start("n3")
    assert set(scheduler.appeared()) == {"n1", "n2"}


@pytest.mark.parametrize("kept_by", ["the next start", "the end of the run", "the end of the run, however slow"])
def test_a_pod_that_is_of_use_again_stays(cluster: Cluster, kept_by: str) -> None:
    """Promise: ending agents when a run ends or begins anew costs no pods."""
    scheduler = cluster.open()
    scheduler.kill("n0", scheduler.start("n0"), for_good=kept_by != "the end of the run, however slow")
    if kept_by == "the next start":
        scheduler.start("n0")
    elif kept_by == "the end of the run":
        cluster.says(cluster.pod_on("n0"), serial=2)
        scheduler.close()
    scheduler.kill("n1", scheduler.start("n1"), for_good=True)
    gone = cluster.pod_on("n1")["metadata"]["name"]
    wait_until(lambda: cluster.store.get(PODS, "default", gone)["metadata"].get("deletionTimestamp"))
    assert "deletionTimestamp" not in cluster.pod_on("n0")["metadata"]


@pytest.mark.parametrize("bad_node", ["taint", "none"])
def test_a_pod_on_a_dead_node_is_replaced(cluster: Cluster, bad_node: str) -> None:
    """Promise: though nobody can end it, and whether nodes may be marked or not, a spare comes in its place."""
    cluster.grant(bad_node)
    scheduler = cluster.open(bad_node)
    handle = scheduler.start("n0")
    name = cluster.pod_on("n0")["metadata"]["name"]
    scheduler.kill("n0", handle, for_good=True)
    scheduler.report_bad("n0", "everstep: node_lost: no heartbeat")
    wait_until(lambda: cluster.store.get(PODS, "default", name)["metadata"].get("deletionTimestamp"))
    cluster.turn()
    assert len(cluster.pods()) == 3  # the Job waits for it, and would for ever
    cluster.ready("n0", "Unknown")

    def replaced() -> bool:
        cluster.turn()
        return "n3" in scheduler.appeared()

    wait_until(replaced)
    assert cluster.store.find(PODS, "default", name) is None
    assert cluster.taints("n0") == ({BAD, OUT} if bad_node == "taint" else set())


def test_a_pod_on_a_dead_node_is_replaced_in_the_next_attempt_too(cluster: Cluster) -> None:
    """Promise: its node is none that agents may be started on, and nobody needs to know that it was given up."""
    scheduler = cluster.open()
    handle = scheduler.start("n0")
    name = cluster.pod_on("n0")["metadata"]["name"]
    cluster.ready("n0", "Unknown")
    wait_until(lambda: scheduler.node_names(3) == ["n1", "n2"])
    assert cluster.store.find(PODS, "default", name) is not None  # its agent may well work on
    scheduler.kill("n0", handle)
    scheduler.close()

    def replaced() -> bool:
        cluster.turn()
        return "n3" in scheduler.appeared()

    wait_until(replaced)
    assert cluster.store.find(PODS, "default", name) is None


@pytest.mark.parametrize(
    ("bad_node", "taints", "cordoned"),
    [
        ("taint", {BAD}, True),
        ("down", {BAD}, True),
        ("cordon", set(), True),
        ("drain", set(), True),
        ("none", set(), False),
    ],
)
def test_a_bad_node_is_told_as_the_site_wants_it(
    cluster: Cluster, bad_node: str, taints: set[str], cordoned: bool
) -> None:
    """Promise: cordoned or tainted with the reason, or left alone; the call itself does not wait."""
    scheduler = cluster.open(bad_node)
    scheduler.start("n0")
    began_s = time.monotonic()
    scheduler.report_bad("n0", "everstep: gpu_fault: XID 79\nsecond line")
    assert time.monotonic() - began_s < 0.1
    if cordoned:
        wait_until(lambda: cluster.node("n0")["spec"].get("unschedulable"))
        said = cluster.node("n0")["metadata"]["annotations"]["everstep.dev/reason"]
        assert said == "everstep: gpu_fault: XID 79 second line"
    assert cluster.taints("n0") == taints
    assert bool(cluster.node("n0")["spec"].get("unschedulable")) is cordoned


def test_somebody_elses_taint_is_not_lost(cluster: Cluster) -> None:
    """Promise: a change between our look and our patch is a conflict, and the patch is made anew."""
    scheduler = cluster.open()
    others = iter(({"key": "a", "effect": "NoSchedule"}, {"key": "b", "effect": "NoSchedule"}))

    def meddle(request: Request) -> None:
        if (request.verb, request.resource) == ("patch", NODES) and (taint := next(others, None)) is not None:
            before = cluster.node("n1")["spec"].get("taints", [])
            cluster.store.merge(NODES, "", "n1", {"spec": {"taints": [*before, taint]}})

    cluster.server.before = meddle
    scheduler.report_bad("n1", "everstep: it is bad")
    wait_until(lambda: cluster.taints("n1") == {"a", "b", BAD})
    assert cluster.server.calls["patch", NODES] == 3


def test_a_node_that_answers_again_is_in_service(cluster: Cluster) -> None:
    """Promise: out of service only while it is not heard of; cordoned it stays, until a person readmits it."""
    cluster.ready("n0", "Unknown")
    scheduler = cluster.open()
    scheduler.report_bad("n0", "everstep: node_lost")
    wait_until(lambda: cluster.taints("n0") == {BAD, OUT})
    cluster.ready("n0", "True")
    wait_until(lambda: cluster.taints("n0") == {BAD})
    assert cluster.node("n0")["spec"]["unschedulable"]


@pytest.mark.parametrize("given_back_by", ["a person", "the run", "nobody, but it was not lost"])
def test_a_node_that_was_given_back_is_left_alone(cluster: Cluster, given_back_by: str) -> None:
    """Promise: an old report marks nothing anew, and what was not lost is never declared dead."""
    scheduler = cluster.open()
    lost = given_back_by != "nobody, but it was not lost"
    scheduler.report_bad("n0", "everstep: node_lost: no heartbeat" if lost else "everstep: gpu_fault: XID 79")
    scheduler.report_bad("n3", "everstep: node_lost: no heartbeat")
    wait_until(lambda: cluster.taints("n0") == {BAD} and cluster.taints("n3") == {BAD})
    if given_back_by == "a person":
        patch = unmark(cluster.node("n0"))
        assert patch is not None
        cluster.store.merge(NODES, "", "n0", patch)
    elif given_back_by == "the run":
        scheduler.start("n0")
    before = cluster.taints("n0")
    cluster.ready("n0", "Unknown")
    wait_until(lambda: scheduler.nodes.objects()["n0"].dead)
    cluster.ready("n3", "Unknown")
    wait_until(lambda: cluster.taints("n3") == {BAD, OUT})
    assert cluster.taints("n0") == before


def test_a_node_that_nvsentinel_has_is_left_to_it(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Promise: who quarantined it gives it back too."""
    cluster.store.merge(NODES, "", "n0", {"metadata": {"annotations": {"quarantineHealthEvent": "[{}]"}}})
    scheduler = cluster.open()
    scheduler.report_bad("n0", "everstep: gpu_fault")
    wait_until(lambda: "NVSentinel has it in hand" in caplog.text)
    assert ("patch", NODES) not in cluster.server.calls


def test_a_role_that_grants_no_patch_is_told(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Promise: a refusal ends nothing; it says what to grant, and is not repeated."""
    cluster.grant("none")
    scheduler = cluster.open("taint")
    scheduler.report_bad("n0", "everstep: gpu_fault")
    wait_until(lambda: "give the ServiceAccount `patch` on nodes" in caplog.text)
    scheduler.report_bad("n1", "everstep: gpu_fault")
    wait_until(lambda: cluster.server.calls["patch", NODES] == 2)
    assert cluster.taints("n0") == set()


def test_verdicts_are_said_once_while_they_last(cluster: Cluster) -> None:
    """Promise: of nodes that work for us, and of no others."""
    scheduler = cluster.open()
    scheduler.start("n0")
    assert list(scheduler.verdicts(5, {"n0", "n1"})) == []
    for node in ("n0", "n1"):
        deadlock = condition("KernelDeadlock", "DockerHung", "task hung")
        ready = condition("Ready", "KubeletReady", "")
        cluster.store.merge(NODES, "", node, {"status": {"conditions": [ready, deadlock]}})
    found: list[tuple[str, Cause, int]] = []

    def heard() -> bool:
        found.extend((each.node, each.cause, each.step) for each in scheduler.verdicts(7, {"n0", "n1"}))
        return bool(found)

    wait_until(heard)
    cluster.store.merge(NODES, "", "n2", {"spec": {"unschedulable": True}})
    wait_until(lambda: scheduler.nodes.objects()["n2"].cordoned)
    heard()
    assert found == [("n0", Cause.NODE_FAULT, 7)]


def test_what_is_known_of_a_node_that_comes_back_waits_for_it(cluster: Cluster) -> None:
    """Promise: nothing is said, and then taken for said, of one that the run does not count yet."""
    deadlock = condition("KernelDeadlock", "DockerHung", "task hung")
    conditions = [condition("Ready", "KubeletReady", ""), deadlock]
    cluster.store.merge(NODES, "", "n0", {"status": {"conditions": conditions}})
    scheduler = cluster.open()
    scheduler.start("n0")
    assert list(scheduler.verdicts(7, set())) == []
    assert [each.node for each in scheduler.verdicts(7, {"n0"})] == ["n0"]


def test_a_broken_watch_is_taken_up_again(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Promise: connections that break, a past that was compacted, a server that is away: what is known stays, and is
    current again afterwards, without a storm of requests."""
    caplog.set_level(logging.INFO)
    scheduler = cluster.open()

    def seen(node: str) -> bool:
        return scheduler.nodes.objects()[node].cordoned

    cluster.server.cut_watches()
    cluster.store.merge(NODES, "", "n0", {"spec": {"unschedulable": True}})
    wait_until(lambda: seen("n0"))
    with cluster.store.changed:
        cluster.server.cut_watches()
        cluster.store.merge(NODES, "", "n1", {"spec": {"unschedulable": True}})
        cluster.store.compact()
    wait_until(lambda: seen("n1"))
    cluster.server.down.set()
    cluster.server.cut_watches()
    wait_until(lambda: "unable to handle the request" in caplog.text)
    assert seen("n0")
    cluster.store.delete(NODES, "", "n3")
    cluster.server.down.clear()
    wait_until(lambda: "n3" not in scheduler.nodes.objects())
    assert cluster.server.calls["list", NODES] < 12


def test_an_expired_version_is_listed_anew(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Promise: `410 Gone` on a watch that is asked for with an old version is no error."""
    caplog.set_level(logging.INFO)
    scheduler = cluster.open()
    scheduler.nodes._resource_version = "1"
    with cluster.store.changed:
        cluster.server.cut_watches()
        cluster.store.merge(NODES, "", "n0", {"spec": {"unschedulable": True}})
    wait_until(lambda: scheduler.nodes.objects()["n0"].cordoned)


def test_a_pod_that_was_left_on_a_bad_node_is_released(cluster: Cluster) -> None:
    """Promise: a supervisor that died between the report of a bad node and the deletion of its pod costs no spare."""
    first = cluster.open()
    handle = first.start("n0")
    first.report_bad("n0", "everstep: gpu_fault")
    wait_until(lambda: cluster.taints("n0") == {BAD})
    first.stop()
    pod = cluster.pod_on("n0")
    cluster.says(pod, serial=2, running=False)
    second = cluster.open()
    assert not second.alive(handle)
    wait_until(lambda: cluster.pod_on("n0")["metadata"].get("deletionTimestamp"))
    assert all("deletionTimestamp" not in cluster.pod_on(node)["metadata"] for node in ("n1", "n2"))


def test_the_last_words_of_an_agent_are_the_end_of_its_log(cluster: Cluster) -> None:
    """Promise: however long it is, and whether it can be read or not."""
    scheduler = cluster.open()
    assert scheduler.last_words("n0") == ()
    log = cluster.run_dir.logs("n0") / "agent.log"
    log.parent.mkdir(parents=True)
    log.write_text("x" * 100_000 + "\nlast\n")
    assert scheduler.last_words("n0")[-1] == "last"
    assert sum(map(len, scheduler.last_words("n0"))) < 20_000
    (cluster.run_dir.logs("n1") / "agent.log").mkdir(parents=True)
    assert scheduler.last_words("n1") == ()


def test_agents_of_another_kind_of_cluster_are_gone(cluster: Cluster) -> None:
    """Promise: a run that was on SLURM or on one machine before goes on here."""
    scheduler = cluster.open()
    for handle in ("123:456", "77:everstep-node1-abc", ""):
        assert not scheduler.alive(handle)
        scheduler.kill("node1", handle)


def test_a_second_supervisor_knows_the_agents_of_the_first(cluster: Cluster) -> None:
    """Promise: handles hold over the supervisor's death; nodes in use do not appear as new ones."""
    first = cluster.open()
    handle = first.start("n0")
    cluster.says(cluster.pod_on("n0"), serial=1, running=True)
    first.stop()
    second = cluster.open()
    assert second.alive(handle)
    assert set(second.appeared()) == {"n1", "n2"}
