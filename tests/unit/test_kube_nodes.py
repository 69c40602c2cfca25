"""Promise: of pods and nodes, what is needed is read rightly from their objects, whatever else is in them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import kube_watch
from cluster.kube_calls import KubeError
from cluster.kube_client import KubeClient, _events
from cluster.kube_nodes import NodeView, PodView, agent_name, by_agent, read_node, read_pod, startable, why_missing
from cluster.kube_scheduler import Handle
from cluster.kube_watch import Mirror
from cluster.rundir import safe_name
from health.kube_conditions import Condition, Taint

_LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
_NODE = st.lists(_LABEL, min_size=1, max_size=4).map(".".join)


def pod(name: str, node: str, phase: str = "Running", **more: Any) -> PodView:
    return PodView(name=name, uid=f"uid of {name}", node=node, phase=phase, **more)


@given(_NODE)
def test_every_nodes_name_is_one_of_the_runs(node: str) -> None:
    name = agent_name(node)
    assert safe_name(name, "node") == name
    assert len(name) <= 100
    assert name == node or len(node) > 100


def test_long_names_stay_apart() -> None:
    assert agent_name("a" * 120) != agent_name("a" * 121)


@given(_LABEL, _LABEL, st.integers(1, 1000), _NODE)
def test_a_handle_comes_back(name: str, uid: str, serial: int, node: str) -> None:
    handle = Handle(name, uid, serial, node)
    assert Handle.of(str(handle)) == handle


def test_the_pod_that_runs_stands_for_its_node() -> None:
    """A failed one, and one that is going, may still be there."""
    pods = [
        pod("new", "n"), pod("old", "n", "Failed"), pod("going", "n", deleting=True), pod("waits", "", "Pending")
    ]  # fmt: skip
    assert {node: each.name for node, each in by_agent(pods).items()} == {"n": "new"}
    assert by_agent(pods[1:3])["n"].name == "going"


def test_only_pods_whose_entries_spoke_are_startable() -> None:
    """In the order of their indices; nodes that take nothing new last, and no silent ones."""
    pods = [pod(f"p{i}", f"n{i}", index=5 - i) for i in range(6)]
    up = {each.name: each.uid for each in pods} | {"p0": "another life"}
    nodes = {
        "n3": NodeView(name="n3", ready="True"),
        "n4": NodeView(name="n4", ready="True", cordoned=True),
        "n5": NodeView(name="n5", ready="Unknown"),
    }
    assert startable(pods, nodes, up) == ["n3", "n2", "n1", "n4"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [("CSPMaintenance", []), ("VMEventScheduled", []), ("KernelDeadlock", ["n"]), ("MemoryPressure", ["n"])],
)
def test_a_node_that_will_be_taken_away_is_not_startable(condition: str, expected: list[str]) -> None:
    """Promise: though nobody cordoned it; what is only suspected is left to who judges."""
    node = NodeView(name="n", ready="True", conditions=(Condition(condition, "True"),))
    assert startable([pod("p", "n")], {"n": node}, {"p": "uid of p"}) == expected


def test_what_is_read_of_a_pod() -> None:
    found = read_pod(
        {
            "metadata": {
                "name": "p",
                "uid": "u",
                "annotations": {"batch.kubernetes.io/job-completion-index": "7"},
                "deletionTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {"nodeName": "n"},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
        }
    )
    assert (found.index, found.node, found.deleting, found.runs) == (7, "n", True, False)
    assert not read_pod({"metadata": {"name": "p", "uid": "u"}}).runs


def test_what_is_read_of_a_node() -> None:
    found = read_node(
        {
            "metadata": {
                "name": "n",
                "labels": {"rack": "r1"},
                "annotations": {"quarantineHealthEvent": "[]", "x": "y"},
            },
            "spec": {"unschedulable": True, "taints": [{"key": "a", "effect": "NoExecute"}]},
            "status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]},
        },
        "rack",
    )
    assert (found.ready, found.dead, found.cordoned, found.domain) == ("Unknown", True, True, "r1")
    assert found.taints == (Taint("a", "", "NoExecute"),)
    assert dict(found.annotations) == {"quarantineHealthEvent": "[]"}
    assert read_node({"metadata": {"name": "n"}}, "").ready == "Unknown"


def test_why_pods_are_missing_is_said_in_their_scheduler_s_words() -> None:
    waiting = pod("p", "", "Pending", why_pending="0/3 nodes are available: 3 Insufficient nvidia.com/gpu")
    assert why_missing([waiting, pod("q", "n")]) == (
        "1 pods do not run: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu"
    )


class Odd:
    """A server that answers with these objects."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def call(self, method: str, path: str, body: object = None, content_type: str = "") -> dict[str, Any]:
        return {"metadata": {"resourceVersion": "5"}, "items": self.items}

    def watch(self, path: str, timeout_s: float) -> Iterator[dict[str, Any]]:
        raise KubeError("no")


def test_an_object_that_cannot_be_read_is_left_out() -> None:
    good = {"metadata": {"name": "p", "uid": "u"}}
    items = [good, {}, {"metadata": []}, {"metadata": {"name": "x", "uid": "u", "annotations": []}, "status": 3}, None]
    mirror: Mirror[PodView] = Mirror(Odd(items), "/pods", "", read_pod)
    mirror.list()
    assert set(mirror.objects()) == {"p"}


@given(st.lists(st.integers(1, 40), max_size=30))
def test_events_are_found_wherever_they_are_cut(cuts: list[int]) -> None:
    data = b'{"type": "ADDED", "object": {"a": "\\u00e9\\n"}}\n{"type": "BOOKMARK", "object": {}}\n'
    chunks, at = [], 0
    for size in cuts:
        chunks.append(data[at : at + size])
        at += size
    chunks.append(data[at:])
    assert [event["type"] for event in _events(iter(chunks), "/pods")] == ["ADDED", "BOOKMARK"]


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b'{"type": "ERROR", "object": {"code": 410, "message": "too old"}}', 410),
        (b'{"type": "ERROR", "object": {"code": "x"}}', 0),
        (b"[]", 0),
        (b"not json", 0),
        (b'{"type": "ADDED"}', 0),
    ],
)
def test_what_ends_a_watch(line: bytes, status: int) -> None:
    with pytest.raises(KubeError) as raised:
        list(_events(iter([line + b"\n"]), "/pods"))
    assert raised.value.status == status


def test_a_watch_outlives_what_nobody_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: it is taken up again after any error, and not without a pause where each ends at once."""
    monkeypatch.setattr(kube_watch, "_SHORTEST_S", 0.2)
    calls: list[float] = []
    enough = threading.Event()

    class Api:
        def call(self, *_: object) -> dict[str, Any]:
            return {}

        def watch(self, path: str, timeout_s: float) -> Iterator[dict[str, Any]]:
            calls.append(time.monotonic())
            if len(calls) == 1:
                raise RuntimeError("a defect")
            if len(calls) == 3:
                enough.set()
            return iter(())

    mirror = Mirror(Api(), "/pods", "", read_pod)
    mirror.start()
    try:
        assert enough.wait(10.0)
    finally:
        mirror.stop()
    assert calls[2] - calls[1] >= 0.2


def test_credentials_that_are_missing_are_an_error_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: whoever asks the server has one kind of error to expect."""
    monkeypatch.setattr(KubeClient, "__init__", lambda self: None)
    client = KubeClient()
    client._settings = SimpleNamespace(host="https://there", auth_settings=missing)
    with pytest.raises(KubeError, match="no credentials for https://there"):
        client.call("GET", "/pods")
    with pytest.raises(KubeError, match="no credentials for https://there"):
        list(client.watch("/pods", 1.0))


def missing() -> None:
    raise FileNotFoundError("token")
