"""A node's kubelet that runs the pods' commands as real processes: each pod in process and mount namespaces of its own,
its first process number 1, so that all of a pod ends with it.

There are no images: a command finds this machine's files. Each pod has shared memory of its own; other folders that a
volume would be mounted at are put into the command and the variables instead.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.kubernetes.controller import PODS, condition, job_over
from tests.kubernetes.nodes import NODES
from tests.kubernetes.store import Object, Refused, Store, now
from tests.unit.kubejobs import expanded

_TICK_S = 0.05
_ALONE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL")
_SHARED_MEMORY = "/dev/shm"
_WITH_MEMORY = ("sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', _SHARED_MEMORY)
_IMAGE = ("PATH", "PYTHONPATH", "LANG", "TMPDIR", "OMP_NUM_THREADS")


class Container:
    """The one container of a pod, while it runs and after."""

    def __init__(
        self, pod: Object, folder: Path, volumes: Mapping[str, Path], kubeconfig: Callable[[Object], str]
    ) -> None:
        self.uid = pod["metadata"]["uid"]
        self.folder = folder
        self.term_s: float | None = None
        self.reported = False
        spec = pod["spec"]["containers"][0]
        self.name = spec["name"]
        self._places: dict[str, Path] = {}
        for mount in spec.get("volumeMounts", ()):
            if mount["name"] in volumes:
                self._places[mount["mountPath"]] = volumes[mount["name"]]
        environ = {name: os.environ[name] for name in _IMAGE if name in os.environ}
        environ |= {each["name"]: self._moved(_value(each, pod, environ)) for each in spec.get("env", ())}
        if pod["spec"].get("automountServiceAccountToken"):
            (folder / "kubeconfig").write_text(kubeconfig(pod))
            environ["KUBECONFIG"] = str(folder / "kubeconfig")
        command = [self._moved(expanded(word, environ)) for word in spec["command"] + spec.get("args", [])]
        self.log = folder / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*_ALONE, *_WITH_MEMORY, *command],
                cwd=spec.get("workingDir", "/"),
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _moved(self, text: str) -> str:
        """With the folders that stand for mounted volumes."""
        for path, folder in sorted(self._places.items(), key=lambda each: -len(each[0])):
            text = re.sub(rf"(?<![\w/]){re.escape(path)}(?=/|$)", str(folder), text)
        return text

    def first(self) -> psutil.Process | None:
        """The pod's process number 1."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children: list[psutil.Process] = psutil.Process(self.process.pid).children()
            return children[0] if children else None
        return None

    def send(self, number: signal.Signals) -> None:
        """A signal to the first process; SIGKILL ends all of the pod."""
        first = self.first()
        if first is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                first.send_signal(number)

    def exit_code(self) -> int | None:
        """As a shell says it; None while it runs."""
        code = self.process.poll()
        return None if code is None else 128 - code if code < 0 else code


class Kubelet(threading.Thread):
    """Runs what is bound to its node, tells the server how it goes, and gives signs of life.

    scratch: a folder of a short name, for volumes. heard: called with the node's name as often as a real one renews its
    lease.
    """

    def __init__(
        self,
        store: Store,
        node: str,
        folder: Path,
        scratch: Path,
        heard: Callable[[str], None],
        kubeconfig: Callable[[Object], str],
        labels: Mapping[str, str],
    ) -> None:
        super().__init__(name=f"kubelet {node}", daemon=True)
        self.store = store
        self.node = node
        self.folder = folder
        self.scratch = scratch
        self.heard = heard
        self.kubeconfig = kubeconfig
        self.labels = {"kubernetes.io/hostname": node, **labels}
        self.containers: dict[str, Container] = {}
        self._dead = threading.Event()

    def register(self) -> None:
        """Make the node known, as one that is ready; one that is known stays as it was."""
        self.heard(self.node)
        status = {"conditions": [condition("Ready", "KubeletReady", "kubelet is posting ready status")]}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.node, "labels": dict(self.labels)}}
        if self.store.find(NODES, "", self.node) is None:
            self.store.create(NODES, "", {**node, "spec": {}, "status": status})

    def run(self) -> None:
        """Until the node dies."""
        while not self._dead.wait(_TICK_S):
            self.heard(self.node)
            pods = {
                pod["metadata"]["uid"]: pod for pod in self.store.list(PODS) if pod["spec"].get("nodeName") == self.node
            }
            for uid, pod in pods.items():
                with contextlib.suppress(Refused):  # it has changed meanwhile, and is looked at again
                    self._see_to(uid, pod)
            for uid in self.containers.keys() - pods.keys():
                if self.containers[uid].exit_code() is None:
                    self.containers[uid].send(signal.SIGKILL)  # deleted by force

    def lose_power(self) -> None:
        """No process of the node takes another step, and nobody is told."""
        self._dead.set()
        for container in self.containers.values():
            container.send(signal.SIGKILL)
        self.join()
        for container in self.containers.values():
            container.send(signal.SIGKILL)
            container.process.wait(10)

    def _see_to(self, uid: str, pod: Object) -> None:
        container, dying = self.containers.get(uid), pod["metadata"].get("deletionTimestamp")
        if container is None:
            if dying or job_over(pod):
                self._gone(pod)
            elif self._may_begin(pod):
                self._begin(uid, pod)
            return
        code = container.exit_code()
        if code is not None:
            if not container.reported:
                self._ended(pod, container, code)
                container.reported = True
            if dying:
                self._gone(pod)
        elif dying:
            self._end(pod, container)

    def _may_begin(self, pod: Object) -> bool:
        """A pod waits for its secrets; one of a namesake that is still ending does not overlap with it."""
        return all(self._find(each, pod) is not None for each in _sources(pod))

    def _begin(self, uid: str, pod: Object) -> None:
        folder = self.folder / pod["metadata"]["name"]
        folder.mkdir(parents=True)
        volumes = {
            each["name"]: self._fill(each, folder / each["name"], pod) for each in pod["spec"].get("volumes", ())
        }
        there = {name: path for name, path in volumes.items() if path is not None}
        self.containers[uid] = Container(pod, folder, there, self.kubeconfig)
        running = {"name": self.containers[uid].name, "state": {"running": {"startedAt": now()}}}
        self._say(pod, {"phase": "Running", "containerStatuses": [running],
                        "conditions": [condition("Ready", "", "")]})  # fmt: skip

    def _fill(self, volume: Object, folder: Path, pod: Object) -> Path | None:
        """The folder that stands for a volume; None for one that is where the pod has it."""
        if "hostPath" in volume or volume.get("emptyDir", {}).get("medium") == "Memory":
            return None
        if "emptyDir" in volume:
            # Sockets are made in it, whose paths must be short.
            return Path(tempfile.mkdtemp(prefix="v-", dir=self.scratch))
        folder.mkdir(parents=True)
        found = self._find(volume, pod)
        assert found is not None
        mode = volume.get("secret", volume.get("configMap")).get("defaultMode", 0o644)
        for name, text in found.get("data", {}).items():
            (folder / name).write_bytes(base64.b64decode(text) if "secret" in volume else text.encode())
            (folder / name).chmod(mode)
        return folder

    def _find(self, volume: Object, pod: Object) -> Object | None:
        namespace = pod["metadata"]["namespace"]
        if "secret" in volume:
            return self.store.find("secrets", namespace, volume["secret"]["secretName"])
        return self.store.find("configmaps", namespace, volume["configMap"]["name"])

    def _end(self, pod: Object, container: Container) -> None:
        if container.term_s is None:
            container.term_s = time.monotonic()
            container.send(signal.SIGTERM)
        if time.monotonic() - container.term_s > pod["metadata"].get("deletionGracePeriodSeconds", 30):
            container.send(signal.SIGKILL)

    def _ended(self, pod: Object, container: Container, code: int) -> None:
        status = {"name": container.name, "state": {"terminated": {"exitCode": code, "finishedAt": now()}}}
        self._say(pod, {"phase": "Failed" if code else "Succeeded", "containerStatuses": [status]})

    def _gone(self, pod: Object) -> None:
        if pod["metadata"].get("deletionTimestamp"):
            self.store.delete(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], grace_s=0)

    def _say(self, pod: Object, status: Object) -> None:
        def told(old: Object) -> Object:
            before = old.get("status", {})
            kinds = {each["type"] for each in status.get("conditions", ())}
            kept = [each for each in before.get("conditions", ()) if each["type"] not in kinds]
            return {**old, "status": {**before, **status, "conditions": [*kept, *status.get("conditions", ())]}}

        self.store.update(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], told)


def _sources(pod: Object) -> Sequence[Object]:
    return [each for each in pod["spec"].get("volumes", ()) if "secret" in each or "configMap" in each]


def _value(variable: Object, pod: Object, environ: Mapping[str, str]) -> str:
    if "value" in variable:
        return expanded(variable["value"], dict(environ))
    value: object = pod
    for step in variable["valueFrom"]["fieldRef"]["fieldPath"].split("."):
        assert isinstance(value, Mapping)
        value = value[step]
    return str(value)


def missing_binaries() -> list[str]:
    """What the kubelets need, and this machine has not."""
    return [name for name in ("unshare",) if shutil.which(name) is None]
