"""Promise: submitting to Kubernetes makes exactly what a dry run prints, touches nothing of anybody else's, and says
the server's own words when it is refused. Against a server with versions and conflicts, in memory and over HTTP."""

from __future__ import annotations

import copy
import http.server
import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import msgspec
import pytest
import yaml

from cluster import kube_backend
from cluster.cli import dispatch
from cluster.kube_backend import KubeBackend
from cluster.kube_calls import MERGE_PATCH, KubeError
from cluster.kube_client import KubeClient
from cluster.kube_marks import mark, unmark
from cluster.kube_names import TAINT_BAD, TAINT_OUT_OF_SERVICE
from cluster.kube_paths import workload_path
from cluster.kube_views import job_status
from configs.profile import ClusterProfile
from tests.unit.kubejobs import FULL, SITE, request

JOBSET = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/default/jobsets/demo"
SECRET = "/api/v1/namespaces/default/secrets/demo-key"
NODES = "/api/v1/nodes"


class Server:
    """A `KubeApi` that keeps objects with versions.

    refuse: paths (their beginnings) that it forbids. not_yet: how often a TrainJob's runtime is not seen yet.
    lingering: by path, how often an object is there still when it is looked at after its deletion.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.posted: list[dict[str, Any]] = []
        self.refuse: tuple[str, ...] = ()
        self.conflicts = 0
        self.not_yet = 0
        self.lingering: dict[str, int] = {}
        self.deleted: list[tuple[str, str]] = []
        self._versions = itertools.count(1)

    def call(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> dict[str, Any]:
        """See `KubeApi`."""
        path, _, query = path.partition("?")
        if self.refuse and path.startswith(self.refuse):
            raise KubeError(f"{path} is forbidden", 403)
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.objects:
                raise KubeError(f"{path} already exists", 409)
            if body["kind"] == "TrainJob" and self.not_yet:
                self.not_yet -= 1
                raise KubeError("admission webhook denied the request: TrainingRuntime must be created before", 403)
            self.posted.append(body)
            return self.put(path, body)
        if method == "GET" and path not in self.objects and path.endswith(("/pods", "/nodes")):
            return self._listed(path, parse_qs(query))
        if path not in self.objects:
            raise KubeError(f"{path} not found", 404)
        found = self.objects[path]
        if method == "DELETE":
            self.deleted.append((path, body["propagationPolicy"]))
            if path in self.lingering:
                found["metadata"]["deletionTimestamp"] = "now"
                return copy.deepcopy(found)
            return self.objects.pop(path)
        if "deletionTimestamp" in found["metadata"]:
            self.lingering[path] -= 1
            if self.lingering[path] <= 0:
                return self.objects.pop(path)
        if method in ("PUT", "PATCH"):
            version = body["metadata"].get("resourceVersion")
            if self.conflicts or version not in (None, found["metadata"]["resourceVersion"]):
                self.conflicts -= 1
                raise KubeError("the object has been modified", 409)
            return self.put(path, body if method == "PUT" else merged(found, body))
        return copy.deepcopy(found)

    def put(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Keep an object, with a new version."""
        kept = copy.deepcopy(dict(body))
        kept["metadata"] = {**kept.get("metadata", {}), "resourceVersion": str(next(self._versions))}
        self.objects[path] = kept
        return copy.deepcopy(kept)

    def node(self, name: str, **spec: Any) -> None:
        """A node that is ready."""
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        self.put(f"{NODES}/{name}", {"metadata": {"name": name}, "spec": spec, "status": ready})

    def _listed(self, path: str, query: Mapping[str, list[str]]) -> dict[str, Any]:
        """Two at a time, as if there were very many."""
        wanted = dict(each.split("=") for each in query.get("labelSelector", ()))
        found = [
            each
            for key, each in sorted(self.objects.items())
            if key.startswith(f"{path}/") and wanted.items() <= each["metadata"].get("labels", {}).items()
        ]
        begin = int(query.get("continue", ["0"])[0])
        more = {"continue": str(begin + 2)} if begin + 2 < len(found) else {}
        return {"items": found[begin : begin + 2], "metadata": more}


def merged(old: Any, patch: Any) -> Any:
    """A JSON merge patch."""
    if not isinstance(patch, dict):
        return patch
    base = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            base.pop(key, None)
        else:
            base[key] = merged(base.get(key), value)
    return base


@pytest.fixture
def server() -> Server:
    """See `Server`."""
    return Server()


def backend(server: Server, **changes: Any) -> KubeBackend:
    """The backend of a site with that server."""
    return KubeBackend(ClusterProfile(kubernetes=msgspec.structs.replace(SITE, **changes)), lambda context: server)


def condition(server: Server, path: str, **condition: str) -> None:
    """Give an object a condition, as its controller would."""
    found = server.objects[path]
    server.put(path, {**found, "status": {"conditions": [condition]}})


@pytest.mark.parametrize("kind", ["jobset", "job", "trainjob"])
def test_what_is_submitted_is_what_a_dry_run_prints(server: Server, kind: str) -> None:
    """Every object of the text, as it is in the text, and before them the Secret."""
    asked = request(msgspec.structs.replace(FULL, kind=kind))
    shown = list(yaml.safe_load_all(backend(server).render(asked)))
    assert server.posted == []
    assert backend(server).submit(asked) == f"{kind}/demo"
    assert server.posted[0]["kind"] == "Secret"
    assert server.posted[1:] == shown


def test_a_run_is_submitted_once(server: Server) -> None:
    """While its workload is there a second one is refused, and the first keeps its key; one that is over makes way."""
    backend(server).submit(request())
    key = server.objects[SECRET]["data"]
    with pytest.raises(KubeError, match=r"is there already, in namespace default .*everstep cancel demo"):
        backend(server).submit(request())
    assert server.objects[SECRET]["data"] == key
    condition(server, JOBSET, type="Failed", status="True", message="over")
    backend(server).submit(request())
    assert server.objects[SECRET]["data"] != key
    assert "status" not in server.objects[JOBSET]


@pytest.mark.parametrize("path", [JOBSET, SECRET, "/apis/policy/v1/namespaces/default/poddisruptionbudgets/demo"])
def test_objects_of_others_are_left_alone(server: Server, path: str) -> None:
    """Something of that name which is not this run's is a conflict, and nothing of ours stays."""
    theirs = {"metadata": {"name": "demo", "labels": {"everstep.dev/run": "other"}}, "data": {"a": "b"}}
    server.put(path, theirs)
    before = copy.deepcopy(server.objects)
    with pytest.raises(KubeError, match=r"already exists|not of run demo"):
        backend(server).submit(request())
    assert server.objects == before
    backend(server).cancel("jobset/demo")
    assert server.objects == before


def test_a_refusal_leaves_nothing_behind(server: Server) -> None:
    """The server's words, and no half of a job."""
    server.refuse = ("/apis/jobset.x-k8s.io/v1alpha2/namespaces/default/jobsets/",)
    with pytest.raises(KubeError, match="is forbidden"):
        backend(server).submit(request())
    server.refuse = ("/apis/policy",)
    with pytest.raises(KubeError, match="is forbidden"):
        backend(server).submit(request())
    assert server.objects == {}


def test_leftovers_of_the_run_are_replaced(server: Server) -> None:
    """A workload that somebody deleted by hand leaves a Secret and more; they are the next submission's."""
    backend(server).submit(request())
    del server.objects[JOBSET]
    key = server.objects[SECRET]["data"]
    backend(server).submit(request())
    assert server.objects[SECRET]["data"] != key


def test_cancel_deletes_all_that_was_made(server: Server) -> None:
    """Of all kinds, with and without an account of its own; one that is gone is no error."""
    for kind, site in (("jobset", FULL), ("job", FULL), ("trainjob", SITE)):
        asked = request(msgspec.structs.replace(site, kind=kind))
        job = backend(server).submit(asked)
        assert server.objects
        backend(server).cancel(job)
        assert server.objects == {}
        backend(server).cancel(job)


def test_roles_that_may_not_be_seen_are_no_obstacle(server: Server) -> None:
    """A user of a site's account has no rights on roles, and made none."""
    backend(server).submit(request())
    server.refuse = ("/apis/rbac.authorization.k8s.io",)
    backend(server).cancel("jobset/demo")
    assert server.objects == {}


@pytest.mark.parametrize("kind", ["jobset", "job", "trainjob"])
def test_a_submission_waits_for_what_the_last_one_left(
    server: Server, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of it takes its time to go. Jobs stay until their pods are gone, nothing else needs to."""
    monkeypatch.setattr(kube_backend, "_POLL_S", 0.01)
    asked = request(msgspec.structs.replace(FULL, kind=kind))
    job = backend(server).submit(asked)
    count = len(server.objects)
    workload = workload_path(kind, "default", "demo")  # type: ignore[arg-type]
    condition(server, workload, type="Failed", status="True", message="over")
    server.lingering = dict.fromkeys(server.objects, 3)
    backend(server).submit(asked)
    assert len(server.objects) == count
    assert not [path for path, each in server.objects.items() if "deletionTimestamp" in each["metadata"]]
    foreground = {path.split("/")[-2] for path, policy in server.deleted if policy == "Foreground"}
    assert foreground == {"jobset": {"jobsets"}, "job": {"jobs"}, "trainjob": {"trainjobs"}}[kind]
    # The same after a cancellation, while pods save.
    server.lingering = dict.fromkeys(server.objects, 3)
    backend(server).cancel(job)
    backend(server).submit(asked)
    assert len(server.objects) == count


def test_a_trainjob_is_submitted_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JobSet that Trainer made of the last one is no job of somebody else's; and Trainer may be slow to see the
    runtime."""
    monkeypatch.setattr(kube_backend, "_POLL_S", 0.01)
    asked = request(msgspec.structs.replace(SITE, kind="trainjob"))
    server.not_yet = 3
    backend(server).submit(asked)
    owner = {"kind": "TrainJob", "name": "demo", "controller": True}
    server.put(JOBSET, {"metadata": {"name": "demo", "ownerReferences": [owner]}})
    condition(server, workload_path("trainjob", "default", "demo"), type="Complete", status="True")
    server.posted.clear()
    backend(server).submit(asked)
    assert "TrainJob" in [each["kind"] for each in server.posted]
    server.not_yet = 99
    condition(server, workload_path("trainjob", "default", "demo"), type="Complete", status="True")
    with pytest.raises(KubeError, match="must be created before"):
        backend(server).submit(asked)


def pod(name: str, role: str, phase: str, **more: Any) -> dict[str, Any]:
    """A pod of the run."""
    labels = {"everstep.dev/run": "demo", "everstep.dev/role": role}
    whole = {"metadata": {"name": name, "labels": labels}, "spec": {"nodeName": f"on-{name}"}}
    return {**whole, "status": {"phase": phase}, **more}


def test_status_is_read_from_conditions_and_pods(server: Server) -> None:
    """Whatever the workload's controllers say, with their words."""
    asked = backend(server)
    assert asked.status("jobset/demo").state == "unknown"
    asked.submit(request())
    assert asked.status("jobset/demo").state == "pending"
    waiting = {"conditions": [{"type": "PodScheduled", "status": "False", "message": "Insufficient nvidia.com/gpu"}]}
    for each in (
        pod("s", "supervisor", "Running"),
        pod("a", "agents", "Running"),
        pod("b", "agents", "Running"),
        pod("c", "agents", "Pending", spec={}, status={"phase": "Pending", **waiting}),
    ):
        server.put(f"/api/v1/namespaces/default/pods/{each['metadata']['name']}", each)
    server.put("/api/v1/namespaces/default/pods/x", {"metadata": {"name": "x"}, "status": {"phase": "Running"}})
    seen = asked.status("jobset/demo")
    assert (seen.state, seen.nodes) == ("running", ("on-a", "on-b"))
    assert seen.detail == "2 of 3 agents' pods run; Insufficient nvidia.com/gpu"
    for kind, state in (("Completed", "done"), ("Complete", "done"), ("Failed", "failed")):
        condition(server, JOBSET, type=kind, status="True", message="words")
        assert asked.status("jobset/demo").state == state
    suspended = {"metadata": {}, "spec": {"suspend": True}}
    assert job_status(suspended, ()).state == "pending"
    assert job_status({"metadata": {"deletionTimestamp": "now"}}, ()).state == "cancelled"


def test_drain_and_readmit_undo_each_other_and_nothing_else(server: Server) -> None:
    """Other taints, annotations and cordons stay; a changed node is read again."""
    other = {"key": "dedicated", "value": "training", "effect": "NoSchedule"}
    server.node("node1", taints=[other])
    before = copy.deepcopy(server.objects[f"{NODES}/node1"])
    server.conflicts = 2
    backend(server).drain("node1", "two\nlines")
    spec = server.objects[f"{NODES}/node1"]["spec"]
    ours = {"key": TAINT_BAD, "value": "true", "effect": "NoSchedule"}
    assert spec == {"unschedulable": True, "taints": [other, ours]}
    (seen,) = backend(server).nodes()
    assert (seen.state, seen.reason, seen.ours) == ("ready,cordoned", "everstep: two lines", True)
    backend(server).drain("node1", "everstep: again")
    backend(server).readmit("node1")
    after = server.objects[f"{NODES}/node1"]
    assert (after["spec"], after["metadata"]["annotations"]) == ({"taints": [other], "unschedulable": False}, {})
    assert before["spec"]["taints"] == after["spec"]["taints"]
    backend(server).readmit("node1")


def test_a_cordon_of_others_is_not_lifted(server: Server) -> None:
    """Nor is it one after we have marked the node too."""
    server.node("node1", unschedulable=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="cordoned, and not by everstep"):
            backend(server).readmit("node1")
        backend(server, bad_node="cordon").drain("node1", "bad")
    assert server.objects[f"{NODES}/node1"]["spec"] == {"unschedulable": True, "taints": []}
    with pytest.raises(ValueError, match="no node 'node9'"):
        backend(server).drain("node9", "bad")
    with pytest.raises(ValueError, match="use letters"):
        backend(server).drain("../secrets", "bad")


def test_a_dead_node_is_taken_out_of_service_and_brought_back() -> None:
    """That taint is ours to take away only if it was ours to give."""
    theirs = {"key": TAINT_OUT_OF_SERVICE, "value": "nodeshutdown", "effect": "NoExecute"}
    for taints in ([], [theirs]):
        node: dict[str, Any] = {"metadata": {"name": "n", "resourceVersion": "7"}, "spec": {"taints": taints}}
        patch = mark(node, "dead", taint=True, out_of_service=True)
        assert patch["metadata"]["resourceVersion"] == "7"
        marked = merged(node, patch)
        assert {each["key"] for each in marked["spec"]["taints"]} == {TAINT_BAD, TAINT_OUT_OF_SERVICE}
        assert mark(marked, "dead", taint=True, out_of_service=True)["spec"] == patch["spec"]
        assert merged(marked, unmark(marked))["spec"]["taints"] == taints
    assert unmark({"metadata": {"name": "n"}, "spec": {"unschedulable": True, "taints": [theirs]}}) is None


def test_many_nodes_come_in_pages(server: Server) -> None:
    """None is left out."""
    for index in range(5):
        server.node(f"node{index}")
    assert [each.name for each in backend(server).nodes()] == [f"node{index}" for index in range(5)]


# Over HTTP, with the official client -------------------------------------------------------------------------------


@pytest.fixture
def over_http(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The server behind HTTP, and a kubeconfig that leads there; yields what was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(f"{self.command} {self.path} {self.headers.get('Authorization')}")
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            try:
                code, said = 200, server.call(self.command, self.path, body, self.headers.get("Content-Type", ""))
            except KubeError as error:
                code, said = error.status, {"kind": "Status", "message": str(error), "code": error.status}
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    place = {"server": f"http://127.0.0.1:{listening.server_port}"}
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "contexts": [{"name": name, "context": {"cluster": name, "user": "me"}} for name in ("here", "gone")],
        "clusters": [{"name": "here", "cluster": place}, {"name": "gone", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "me", "user": {"token": "hidden-token"}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield asked
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_the_official_client_speaks_to_a_server(server: Server, over_http: list[str]) -> None:
    """Its kubeconfig's token goes along; refusals come back as the server's words and HTTP's number."""
    server.node("node1")
    client = KubeClient()
    assert client.call("GET", f"{NODES}/node1")["metadata"]["name"] == "node1"
    assert over_http == [f"GET {NODES}/node1 Bearer hidden-token"]
    client.call("PATCH", f"{NODES}/node1", {"metadata": {}, "spec": {"unschedulable": True}}, MERGE_PATCH)
    assert server.objects[f"{NODES}/node1"]["spec"] == {"unschedulable": True}
    server.refuse = ("/api/v1/secrets",)
    with pytest.raises(KubeError, match=r"refused GET /api/v1/secrets \(403\): .* is forbidden") as caught:
        client.call("GET", "/api/v1/secrets?x=1")
    assert caught.value.status == 403
    with pytest.raises(KubeError, match=r"127\.0\.0\.1:9 cannot be reached") as caught:
        KubeClient("gone").call("GET", NODES)
    assert caught.value.status == 0


def test_no_way_to_a_cluster_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a kubeconfig nor a pod: what to set."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ValueError, match=r"no way to a cluster: .*; set KUBECONFIG"):
        KubeClient()


def test_the_command_line_does_all_of_it(
    server: Server,
    over_http: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Dry run, submit, status, a second submit, logs, drain, nodes, readmit, cancel, by their commands."""
    monkeypatch.chdir(tmp_path)
    server.node("node1")
    Path("site.toml").write_text(
        f'[kubernetes]\nimage = "{SITE.image}"\nrun_dir = "/runs"\nmounts = [{{ path = "/runs", claim = "runs" }}]\n'
    )
    words = ["submit", "debug_dense", "--cluster", "kubernetes", "--profile", "site.toml", "--run.name", "demo"]

    def run(*command: str) -> tuple[int, str]:
        code = dispatch(command)
        said = capsys.readouterr()
        return code, said.out + said.err

    assert dispatch([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out  # and nothing but what would be applied: notes for people go elsewhere
    assert (over_http, list(Path().glob("runs/*"))) == ([], [])
    assert run(*words)[0] == 0
    assert [each for each in server.posted if each["kind"] != "Secret"] == list(yaml.safe_load_all(shown))
    assert run("status", "demo")[1].startswith("kubernetes jobset/demo: pending (0 of 0 agents' pods run, the super")
    assert run(*words)[0] == 2
    code, said = run("logs", "demo")
    assert code == 2
    assert "kubectl exec -n default job/demo-supervisor-0 -- everstep logs demo --dir /runs" in said
    owner = ["--cluster", "kubernetes", "--profile", "site.toml"]
    code, said = run("drain", "node1", "--reason", "noisy fan", *owner)
    assert code == 0
    there = "job/demo-supervisor-0 -- everstep drain node1/node1 --reason 'noisy fan' --dir /runs"
    assert said.splitlines()[-1].endswith(f"kubectl exec -n default {there}")
    assert "everstep: noisy fan" in run("nodes", *owner)[1]
    code, said = run("readmit", "node1", "--reason", "repaired", *owner)
    assert (code, "everstep readmit node1/node1 --reason repaired --dir /runs" in said) == (0, True)
    assert server.objects[f"{NODES}/node1"]["spec"]["unschedulable"] is False
    # A profile that leads elsewhere does not hide the job that is there.
    Path("other.toml").write_text(Path("site.toml").read_text() + 'namespace = "other"\n')
    code, said = run(*words[:5], "other.toml", *words[6:])
    assert (code, "already submitted as kubernetes jobset/demo" in said) == (2, True), said
    assert not [path for path in server.objects if "/other/" in path]
    assert run("cancel", "demo")[0] == 0
    assert set(server.objects) == {f"{NODES}/node1"}
