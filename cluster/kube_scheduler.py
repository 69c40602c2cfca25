"""The scheduler inside a Kubernetes job: agents run in pods that the Job controller made, one a node.

What the API server knows of pods and nodes is watched (`kube_watch`); what a pod shall do, and how it stands, goes
through files of the run (`kube_orders`). Pods are never made here: one whose node the run gave up is deleted, the Job
makes another, and that is a new spare.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from cluster.kube_calls import FORBIDDEN, KubeError, KubeWatching
from cluster.kube_client import KubeClient
from cluster.kube_names import LABEL_ROLE, LABEL_RUN, Inside, inside
from cluster.kube_nodes import (
    NodeView,
    PodView,
    agent_name,
    by_agent,
    read_node,
    read_pod,
    standing,
    startable,
    why_missing,
)
from cluster.kube_orders import PodOrder, read_order, write_order
from cluster.kube_paths import path_to
from cluster.kube_release import Releases
from cluster.kube_report import Reports
from cluster.kube_states import PodStates
from cluster.kube_watch import Mirror
from cluster.rundir import RunDir
from configs.schema import JobConfig
from health.kube_conditions import KubeJudge
from health.verdict import Verdict

RELEASE_AFTER_S = 4.0
"""How long the pod of a node that was given up is kept: an agent may be started in it again."""
_TICK_S = 0.25
_IDLE_EVERY_S = 5.0
_PATIENCE_S = 120.0
_AGAIN_S = 2.0
_PODS_TIMEOUT_S = 900.0
_SPARES_TIMEOUT_S = 30.0
_SAY_EVERY_S = 60.0
_WRITE_TIMEOUT_S = 15.0
_END_TIMEOUT_S = 5.0
_THREADS = 8
_WORDS_BYTES = 16 << 10
_TAINTING = ("taint", "down")
_T = TypeVar("_T")

logger = logging.getLogger("everstep.kubernetes")


class Handle(msgspec.Struct, frozen=True):
    """An agent: the order that started it, in which pod, and on which Kubernetes node."""

    pod: str
    uid: str
    serial: int
    host: str

    @classmethod
    def of(cls, text: str) -> Handle:
        """Raises ValueError for what is no handle."""
        pod, uid, serial, host = text.split(":")
        return cls(pod, uid, int(serial), host)

    def __str__(self) -> str:
        return f"{self.pod}:{self.uid}:{self.serial}:{self.host}"


class KubeScheduler:
    """See `cluster.scheduler.Scheduler`. A handle is `pod:uid:serial of the order:Kubernetes node`.

    No call of the supervisor's loop waits for the API server or the shared volume; `node_names` and `start` may, and
    those that do so are called in the beginning, or in threads.
    """

    def __init__(
        self, run_dir: RunDir, config: JobConfig, here: Inside, api: KubeWatching, watch_s: float = 60.0
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.api = api
        agents = f"{LABEL_RUN}={here.name},{LABEL_ROLE}=agents"
        self.pods: Mirror[PodView] = Mirror(api, path_to("v1", "Pod", here.namespace), agents, read_pod, watch_s)
        read = partial(read_node, domain_label=here.domain_label)
        self.nodes: Mirror[NodeView] = Mirror(api, path_to("v1", "Node", ""), "", read, watch_s)
        self.states = PodStates(run_dir.path)
        self._bad_node = config.cluster.bad_node
        self._reports = Reports(api, self._bad_node in _TAINTING, self._node)
        self._releases = Releases(api, here.namespace, self._pod, self._node)
        self._judge = KubeJudge()
        self._judged: tuple[int, int, frozenset[str]] = (-1, -1, frozenset())
        self._serving: dict[str, Handle] = {}
        self._hosts: dict[str, str] = {}
        self._known: set[str] = set()
        self._ending: dict[str, Handle] = {}
        self._lock = threading.Lock()
        self._writing: list[concurrent.futures.Future[None]] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "kubernetes")
        self._stop = threading.Event()
        self._tending = threading.Thread(target=self._tend, name="kubernetes", daemon=True)

    @classmethod
    def inside(cls, config: JobConfig, run_dir: RunDir, environ: Mapping[str, str]) -> KubeScheduler:
        """The scheduler of the job that this process runs in.

        Raises:
            ValueError: if it runs in none, or there is no way to the API server.
            KubeError: if the server refuses to show the job's pods.
        """
        scheduler = cls(run_dir, config, inside(environ), KubeClient())
        scheduler.open()
        return scheduler

    def open(self) -> None:
        """Learn how everything stands, and keep watching. KubeError if the server refuses, or stays away."""
        patiently(self.pods.start)
        try:
            patiently(self.nodes.start)
        except KubeError as error:
            if error.status != FORBIDDEN:
                raise
            logger.warning("nodes cannot be watched, so nothing is known of their conditions: %s", error)
        self.states.start()
        self._tending.start()

    def stop(self) -> None:
        """End the threads; agents and pods are left alone."""
        self._stop.set()
        self.pods.stop()
        self.nodes.stop()
        self.states.stop()
        self._pool.shutdown(wait=True)

    def node_names(
        self, count: int, usable: Callable[[Sequence[str]], int] = len, stopped: Callable[[], bool] = bool
    ) -> list[str]:
        """See `Scheduler`: nodes of pods that are up. Waits until there are enough to train, and a little for spares:
        images are pulled, and a queue may admit the job in parts."""
        cluster, began_s = self.config.cluster, time.monotonic()
        enough_s, say_s = float("inf"), began_s
        while True:
            now_s, names = time.monotonic(), self._startable()
            there = usable(names)
            if there >= cluster.nodes:
                enough_s = min(enough_s, now_s)
            if there >= cluster.nodes + cluster.spares or now_s - enough_s > _SPARES_TIMEOUT_S or stopped():
                return names
            if now_s - began_s > _PODS_TIMEOUT_S:
                logger.warning("after %.0f s only %d pods are up that can be used", _PODS_TIMEOUT_S, there)
                return names
            if now_s >= say_s:
                say_s = now_s + _SAY_EVERY_S
                logger.info("waiting for pods: %s", why_missing(list(self.pods.objects().values())))
            time.sleep(_TICK_S)

    def start(self, node: str) -> str:
        """See `Scheduler`. ValueError if no pod of the node is up."""
        pod = by_agent(self.pods.objects().values()).get(node)
        if pod is None or not pod.runs:
            raise ValueError(f"no pod of this job is up on {node}")
        self._await_writes()
        state, last = self.states.of(pod.name), read_order(self.run_dir.path, pod.name)
        serial = max(last.serial if last else 0, state.serial if state else 0) + 1
        host = self._node(pod.node)
        order = PodOrder(agent_name=node, serial=serial, action="start", domain=host.domain if host else "")
        write_order(self.run_dir.path, pod.name, order)
        handle = Handle(pod.name, pod.uid, serial, pod.node)
        self._know(handle)
        self._releases.keep(pod.uid)
        self._reports.withdraw(pod.node)
        return str(handle)

    def alive(self, handle: str) -> bool:
        """See `Scheduler`: as the newest word of the API server and of the pod has it. An agent of a time when the run
        was on another kind of cluster is none of these."""
        try:
            agent = Handle.of(handle)
        except ValueError:
            return False
        lives = self._lives(agent)
        if lives and agent.uid not in self._known:
            self._know(agent)
            self._releases.keep(agent.uid)
        return lives

    def kill(self, node: str, handle: str, for_good: bool = False) -> None:
        """See `Scheduler`: the pod is told to end the agent. For good: after a while it is deleted, if nobody starts
        another; else it stays, since the end of a run, or its new beginning, needs it still."""
        try:
            agent = Handle.of(handle)
        except ValueError:
            return  # see `alive`
        self._know(agent)
        with self._lock:
            self._serving.pop(node, None)
            self._ending[node] = agent
            self._writing.append(self._pool.submit(self._end, node, agent))
        self._judge.forget(node)
        if for_good:
            self._releases.add(agent.pod, agent.uid, time.monotonic() + RELEASE_AFTER_S)

    def appeared(self) -> Sequence[str]:
        """See `Scheduler`: nodes with a pod in which no agent was started yet, and that take new work."""
        with self._lock:
            known = set(self._known)
        nodes, pods = self.nodes.objects(), by_agent(self.pods.objects().values())
        return [name for name in self._startable() if pods[name].uid not in known and _fit(nodes.get(pods[name].node))]

    def verdicts(self, step: int, nodes: Collection[str]) -> Sequence[Verdict]:
        """See `Scheduler`: what conditions, taints and annotations say of nodes that agents of ours are on."""
        with self._lock:
            serving = {node: agent for node, agent in self._serving.items() if node in nodes}
        seen = (self.pods.version, self.nodes.version, frozenset(serving))
        if seen == self._judged:
            return ()
        self._judged = seen
        found: list[Verdict] = []
        for agent in serving.values():
            pod = self._pod(agent.pod)
            if pod is not None and pod.uid == agent.uid:
                found += self._judge.judge(standing(pod, self._node(pod.node)), step)
        return found

    def report_bad(self, node: str, reason: str) -> None:
        """See `Scheduler`: as the configuration says, cordoned, or tainted too; the reason is in an annotation."""
        with self._lock:
            host = self._hosts.get(node, node)
        if self._bad_node != "none":
            self._reports.add(host, reason, time.monotonic())

    def last_words(self, node: str) -> tuple[str, ...]:
        """Last lines of the agent's log; none if it cannot be read."""
        try:
            with (self.run_dir.logs(node) / "agent.log").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _WORDS_BYTES))
                return tuple(log.read(_WORDS_BYTES).decode(errors="replace").splitlines()[-15:])
        except OSError:
            return ()

    def close(self) -> None:
        """Wait for agents that are still being ended; their pods stay, for whoever runs this job next, unless their
        nodes are dead (`_release_lost`)."""
        self._releases.keep_all()
        self._await_writes()
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        while time.monotonic() < deadline_s and any(self._ends_still(each) for each in self._ending.values()):
            time.sleep(_TICK_S)
        self._ending.clear()

    # What it knows ------------------------------------------------------------------------------------------------

    def _pod(self, name: str) -> PodView | None:
        return self.pods.objects().get(name)

    def _node(self, name: str) -> NodeView | None:
        return self.nodes.objects().get(name)

    def _startable(self) -> list[str]:
        return startable(self.pods.objects().values(), self.nodes.objects(), self.states.up())

    def _know(self, agent: Handle) -> None:
        node = agent_name(agent.host)
        with self._lock:
            self._known.add(agent.uid)
            self._hosts[node] = agent.host
            self._serving[node] = agent
            self._ending.pop(node, None)

    def _lives(self, agent: Handle) -> bool:
        pod = self._pod(agent.pod)
        if pod is None or pod.uid != agent.uid or pod.over:
            return False
        state = self.states.of(agent.pod)
        if state is None or state.pod_uid != agent.uid or state.serial < agent.serial:
            return True  # it has not come to that yet
        return state.serial == agent.serial and state.running

    def _ends_still(self, agent: Handle) -> bool:
        """Whether an agent that was told to end may yet; one on a dead node does not hear it."""
        node = self._node(agent.host)
        return self._lives(agent) and not (node is not None and node.dead)

    # Its threads --------------------------------------------------------------------------------------------------

    def _end(self, node: str, agent: Handle) -> None:
        try:
            last = read_order(self.run_dir.path, agent.pod)
            if last is not None and last.serial == agent.serial:
                stop = PodOrder(agent_name=node, serial=agent.serial + 1, action="stop")
                write_order(self.run_dir.path, agent.pod, stop)
        except (OSError, ValueError) as error:
            logger.warning("the agent of %s may live: its pod could not be told to end it: %s", node, error)

    def _await_writes(self) -> None:
        with self._lock:
            writing, self._writing = self._writing, []
        concurrent.futures.wait(writing, _WRITE_TIMEOUT_S)

    def _tend(self) -> None:
        idle_due_s = time.monotonic() + _IDLE_EVERY_S  # whoever takes a run over asks for its agents first
        while not self._stop.wait(_TICK_S):
            now_s = time.monotonic()
            try:
                self._reports.tick(now_s)
                if now_s >= idle_due_s:
                    idle_due_s = now_s + _IDLE_EVERY_S
                    self._release_idle(now_s)
                    self._release_lost(now_s)
                self._releases.tick(now_s)
            except Exception:
                logger.exception("pods and nodes could not be tended; trying again")
                self._stop.wait(_AGAIN_S)

    def _release_idle(self, now_s: float) -> None:
        """Pods without an agent on nodes that were taken out of work by a run of ours: nothing will start there, and
        whoever gave them up may have died before it deleted them."""
        for name, uid in self.states.up().items():
            pod, state = self._pod(name), self.states.of(name)
            if pod is None or pod.uid != uid or not pod.runs or state is None or state.running:
                continue
            node = self._node(pod.node)
            if node is not None and node.ours:
                self._release_unless_serving(pod, now_s)

    def _release_lost(self, now_s: float) -> None:
        """Pods on dead nodes that serve nobody: no kubelet ends them, and the Job waits for them. Where
        all nodes are silent, it is the server that does not hear, and nothing follows."""
        pods = [(pod, self._node(pod.node)) for pod in self.pods.objects().values() if pod.node]
        lost = [pod for pod, node in pods if node is not None and node.dead]
        if len(lost) == len(pods):
            return
        for pod in lost:
            if pod.deleting or not pod.over:
                self._release_unless_serving(pod, now_s)

    def _release_unless_serving(self, pod: PodView, now_s: float) -> None:
        # In one go: an agent that is started meanwhile is known first, and has its pod kept then.
        with self._lock:
            if all(each.uid != pod.uid for each in self._serving.values()):
                self._releases.add(pod.name, pod.uid, now_s + RELEASE_AFTER_S)


def _fit(node: NodeView | None) -> bool:
    return node is None or not node.cordoned


def patiently(ask: Callable[[], _T]) -> _T:
    """Ask, and ask again while the server is away: it may be restarting. KubeError if it refuses or stays away."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return ask()
        except KubeError as error:
            if 400 <= error.status < 500 or time.monotonic() > deadline_s:
                raise
            logger.warning("%s; asking again", error)
            time.sleep(_AGAIN_S)
