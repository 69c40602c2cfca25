"""What our client code relies on, on both servers: the tests' own, and a real one where one is built. What holds on
both is what makes the tests' own worth testing against.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.kube_calls import MERGE_PATCH, KubeError
from cluster.kube_client import KubeClient
from cluster.kube_marks import mark, unmark
from cluster.kube_nodes import NodeView, PodView, read_node, read_pod
from cluster.kube_paths import path_of, path_to
from cluster.kube_rbac import account_objects
from cluster.kube_release import Releases
from cluster.kube_report import Reports
from cluster.kube_watch import Mirror
from tests.kubernetes import rbac
from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.real import RealApiServer, why_missing
from tests.kubernetes.store import Store
from tests.unit.kubejobs import SITE, plan

BAD, OUT = "everstep.dev/bad", "node.kubernetes.io/out-of-service"
NODES, PODS = path_to("v1", "Node", ""), path_to("v1", "Pod", "default")
OpenApi = Callable[[str], KubeClient]

# The real one signs its own certificate.
pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")


@pytest.fixture(scope="module", params=["ours", "real"])
def open_api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenApi]:
    """Opens an API server for a user: "admin", or "supervisor", whose roles are those that a job gets."""
    home = tmp_path_factory.mktemp("api")
    if request.param == "real":
        if missing := why_missing():
            pytest.skip(f"NO REAL API SERVER WAS TESTED: {missing}")
        with RealApiServer(home) as real:
            texts = {"admin": real.kubeconfig(), "supervisor": real.kubeconfig(real.account_token("default", "demo"))}
            yield _opener(home, texts)
        return
    with ApiServer(Store()) as server:
        account = server.kubeconfig(rbac.account("default", "demo"))
        yield _opener(home, {"admin": server.kubeconfig(), "supervisor": account})


def _opener(home: Path, texts: dict[str, str]) -> OpenApi:
    def opened(user: str) -> KubeClient:
        path = home / f"{user}.kubeconfig"
        path.write_text(texts[user])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBECONFIG", str(path))
            return KubeClient()

    admin = opened("admin")
    for each in account_objects(plan(msgspec.structs.replace(SITE, service_account=""))):
        admin.call("POST", path_of(each, collection=True), each)
    return opened


@pytest.fixture
def admin(open_api: OpenApi) -> KubeClient:
    """Who may do everything."""
    return open_api("admin")


@pytest.fixture
def supervisor(open_api: OpenApi) -> KubeClient:
    """The supervisor's account."""
    return open_api("supervisor")


def unique(prefix: str) -> str:
    """A name that no other test has."""
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def make_node(admin: KubeClient, ready: str = "True") -> str:
    """A node, as its kubelet would make it."""
    name = unique("node")
    admin.call("POST", NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    set_ready(admin, name, ready)
    return name


def set_ready(admin: KubeClient, node: str, status: str) -> None:
    """What the node's kubelet, or the life cycle of nodes, would say."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ready = {"type": "Ready", "status": status, "reason": "x", "message": "", "lastHeartbeatTime": now,
             "lastTransitionTime": now}  # fmt: skip
    admin.call("PATCH", f"{NODES}/{node}/status", {"status": {"conditions": [ready]}}, MERGE_PATCH)


def make_pod(admin: KubeClient, node: str, labels: dict[str, str] | None = None, finalizer: str = "") -> str:
    """A pod that runs on a node, as far as anybody knows."""
    name = unique("pod")
    metadata: dict[str, Any] = {"name": name, "labels": labels or {}, "finalizers": [finalizer] if finalizer else []}
    spec = {"nodeName": node, "containers": [{"name": "agent", "image": "x"}], "restartPolicy": "Never"}
    admin.call("POST", PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    admin.call("PATCH", f"{PODS}/{name}/status", {"status": {"phase": "Running"}}, MERGE_PATCH)
    return name


def wait_until(true: Callable[[], object], timeout_s: float = 15.0) -> None:
    """Wait for a condition."""
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


def taints(api: KubeClient, node: str) -> set[str]:
    """Keys of a node's taints."""
    return {each["key"] for each in api.call("GET", f"{NODES}/{node}").get("spec", {}).get("taints") or ()}


def status_of(call: Callable[[], object]) -> int:
    """The status of what is refused; 0 if it is not."""
    try:
        call()
    except KubeError as error:
        return error.status
    return 0


def test_a_name_is_taken_once_and_an_old_version_is_refused(admin: KubeClient) -> None:
    node = make_node(admin)
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}
    assert status_of(lambda: admin.call("POST", NODES, body)) == 409
    found = admin.call("GET", f"{NODES}/{node}")
    set_ready(admin, node, "False")
    patch = {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"], "labels": {"a": "b"}}}
    assert status_of(lambda: admin.call("PATCH", f"{NODES}/{node}", patch, MERGE_PATCH)) == 409
    assert status_of(lambda: admin.call("PUT", f"{NODES}/{node}", found)) == 409
    assert status_of(lambda: admin.call("GET", f"{NODES}/{unique('node')}")) == 404


def test_marks_are_made_and_taken_back(admin: KubeClient, supervisor: KubeClient) -> None:
    """Promise: the patch that cordons and taints keeps what others wrote, and `unmark` leaves what they wrote since."""
    node = make_node(admin)
    path = f"{NODES}/{node}"
    other = {"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}}
    admin.call("PATCH", path, other, MERGE_PATCH)
    found = supervisor.call("GET", path)
    supervisor.call("PATCH", path, mark(found, "it is bad", taint=True, out_of_service=True), MERGE_PATCH)
    marked = supervisor.call("GET", path)
    assert {each["key"] for each in marked["spec"]["taints"]} >= {"a", BAD, OUT}
    assert marked["spec"]["unschedulable"]
    assert read_node(marked, "").ours == "everstep: it is bad"
    supervisor.call("PATCH", path, unmark(marked), MERGE_PATCH)
    assert taints(admin, node) - {"node.kubernetes.io/unschedulable"} == {"a"}
    assert not supervisor.call("GET", path)["spec"].get("unschedulable")


def test_reports_survive_conflicts(admin: KubeClient, supervisor: KubeClient) -> None:
    """Promise: a node that others change all the time is marked all the same, and nobody's change is lost."""
    node = make_node(admin, "Unknown")
    path = f"{NODES}/{node}"

    class Meddled:
        """A server on which somebody else is quicker, twice."""

        left = 2

        def call(
            self, method: str, path: str, body: object = None, content_type: str = "application/json"
        ) -> dict[str, Any]:
            if method == "PATCH" and self.left:
                self.left -= 1
                before = admin.call("GET", path).get("spec", {}).get("taints") or []
                taint = {"key": f"other-{self.left}", "effect": "NoSchedule"}
                admin.call("PATCH", path, {"spec": {"taints": [*before, taint]}}, MERGE_PATCH)
            return supervisor.call(method, path, body, content_type)

    view: list[NodeView] = [read_node(admin.call("GET", path), "")]
    reports = Reports(Meddled(), True, lambda name: view[0])
    reports.add(node, "everstep: node_lost", 0.0)
    reports.tick(0.0)
    assert taints(admin, node) >= {"other-0", "other-1", BAD, OUT}
    set_ready(admin, node, "True")
    view[0] = read_node(admin.call("GET", path), "")
    reports.tick(1.0)
    assert OUT not in taints(admin, node)
    assert taints(admin, node) >= {"other-0", "other-1", BAD}


def test_roles_grant_what_is_needed_and_no_more(admin: KubeClient, supervisor: KubeClient) -> None:
    """Promise: the supervisor's account can do its work, and cannot read a Secret, make a pod, or change a node's
    status."""
    node = make_node(admin)
    pod = make_pod(admin, node)
    path = f"{PODS}/{pod}"
    assert status_of(lambda: supervisor.call("GET", f"{PODS}?limit=1")) == 0
    assert status_of(lambda: supervisor.call("GET", NODES)) == 0
    assert status_of(lambda: supervisor.call("GET", path_to("v1", "Secret", "default", "demo-key"))) == 403
    assert status_of(lambda: supervisor.call("GET", path_to("v1", "Pod", "kube-system"))) == 403
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": unique("pod")}, "spec": {}}
    assert status_of(lambda: supervisor.call("POST", PODS, body)) == 403
    assert status_of(lambda: supervisor.call("PATCH", path, {"metadata": {"labels": {"a": "b"}}}, MERGE_PATCH)) == 403
    ready = {"status": {"conditions": []}}
    assert status_of(lambda: supervisor.call("PATCH", f"{NODES}/{node}/status", ready, MERGE_PATCH)) == 403
    assert status_of(lambda: supervisor.call("DELETE", f"{NODES}/{node}")) == 403
    assert status_of(lambda: supervisor.call("DELETE", path, {"preconditions": {"uid": str(uuid.uuid4())}})) == 409
    assert status_of(lambda: supervisor.call("DELETE", path)) == 0


def test_a_pod_on_a_dead_node_is_let_go(admin: KubeClient, supervisor: KubeClient) -> None:
    """Promise: a pod that nobody can end, and that a Job keeps its finger on, has failed for the Job to see."""
    node = make_node(admin, "Unknown")
    name = make_pod(admin, node, finalizer="batch.kubernetes.io/job-tracking")

    def pod_of(pod: str) -> PodView | None:
        return read_pod(admin.call("GET", f"{PODS}/{pod}"))

    def node_of(name: str) -> NodeView | None:
        return read_node(admin.call("GET", f"{NODES}/{name}"), "")

    before = pod_of(name)
    assert before is not None
    releases = Releases(supervisor, "default", pod_of, node_of)
    releases.add(name, before.uid, 0.0)
    releases.tick(1.0)
    found = admin.call("GET", f"{PODS}/{name}")
    assert found["status"]["phase"] == "Failed"
    assert found["metadata"]["deletionTimestamp"]
    assert [each["type"] for each in found["status"]["conditions"]] == ["DisruptionTarget"]
    admin.call("PATCH", f"{PODS}/{name}", {"metadata": {"finalizers": None}}, MERGE_PATCH)
    assert status_of(lambda: admin.call("GET", f"{PODS}/{name}")) == 404


def test_a_pod_that_runs_is_given_its_grace(admin: KubeClient, supervisor: KubeClient) -> None:
    """Promise: on a node that lives, deletion waits for the kubelet."""
    node = make_node(admin)
    name = make_pod(admin, node)
    supervisor.call("DELETE", f"{PODS}/{name}")
    found = admin.call("GET", f"{PODS}/{name}")
    assert (found["metadata"]["deletionGracePeriodSeconds"], read_pod(found).deleting) == (30, True)
    admin.call("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0})
    assert status_of(lambda: admin.call("GET", f"{PODS}/{name}")) == 404


def test_a_mirror_is_current(admin: KubeClient, supervisor: KubeClient) -> None:
    """Promise: what is added, changed and deleted is seen; what loses its label is gone; watches that end go on."""
    node, labels = make_node(admin), {"everstep.dev/run": unique("run")}
    first = make_pod(admin, node, labels)
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    mirror: Mirror[PodView] = Mirror(supervisor, PODS, selector, read_pod, watch_s=1.0)
    mirror.start()
    try:
        assert set(mirror.objects()) == {first}
        second = make_pod(admin, node, labels)
        make_pod(admin, node, {"everstep.dev/run": "another"})
        wait_until(lambda: second in mirror.objects() and mirror.objects()[second].phase == "Running")
        admin.call("PATCH", f"{PODS}/{first}", {"metadata": {"labels": {"everstep.dev/run": "another"}}}, MERGE_PATCH)
        wait_until(lambda: set(mirror.objects()) == {second})
        began_s = time.monotonic()
        wait_until(lambda: time.monotonic() - began_s > 2.5)  # longer than a watch lasts
        admin.call("DELETE", f"{PODS}/{second}", {"gracePeriodSeconds": 0})
        wait_until(lambda: not mirror.objects())
    finally:
        mirror.stop()


def test_a_mirror_that_is_far_behind_lists_again(admin: KubeClient, supervisor: KubeClient) -> None:
    """Promise: a version that the server does not know, or not any more, is no end."""
    mirror: Mirror[NodeView] = Mirror(supervisor, NODES, "", lambda node: read_node(node, ""), watch_s=2.0)
    mirror.list()
    mirror._resource_version = "1"
    mirror._thread.start()
    try:
        node = make_node(admin)
        wait_until(lambda: node in mirror.objects())
    finally:
        mirror.stop()
