"""What an API server keeps: objects with versions, and what happened to them, for those who watch.

One counter numbers all changes, as etcd's revisions do. Whoever updates with an old version is refused; whoever watches
from a version that was compacted away must list again.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.kubernetes.patches import merged

Object = dict[str, Any]
KEPT_CHANGES = 2000


class Refused(Exception):
    """An answer that is no success, as HTTP and the API say it."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message


def conflict(what: str) -> Refused:
    """The object is not what the caller believes."""
    return Refused(409, "Conflict", f"Operation cannot be fulfilled on {what}: the object has been modified")


def not_found(what: str) -> Refused:
    """There is none."""
    return Refused(404, "NotFound", f"{what} not found")


class Store:
    """Objects by (resource, namespace, name); resource is `pods`, `jobs.batch`, `jobsets.jobset.x-k8s.io` and so on.

    What is given out is nobody else's: it may be changed.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.revision = 0
        self.compacted = 0
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._log: list[tuple[int, str, str, Object, Object | None]] = []
        self._names = itertools.count()

    # Reading ------------------------------------------------------------------------------------------------------

    def get(self, resource: str, namespace: str, name: str) -> Object:
        """One object. Refused if there is none."""
        with self.changed:
            found = self._objects.get((resource, namespace, name))
            if found is None:
                raise not_found(f'{resource} "{name}"')
            return copy.deepcopy(found)

    def find(self, resource: str, namespace: str, name: str) -> Object | None:
        """One object, or None."""
        with self.changed:
            found = self._objects.get((resource, namespace, name))
            return copy.deepcopy(found)

    def list(self, resource: str, namespace: str = "") -> list[Object]:
        """All objects of a resource; without a namespace, of all."""
        with self.changed:
            return [
                copy.deepcopy(found)
                for (kind, place, _), found in sorted(self._objects.items())
                if kind == resource and (not namespace or place == namespace)
            ]

    def everything(self) -> list[tuple[str, Object]]:
        """All objects, with their resource."""
        with self.changed:
            return [(resource, copy.deepcopy(found)) for (resource, _, _), found in sorted(self._objects.items())]

    def since(self, revision: int, resource: str) -> Iterator[tuple[int, str, Object, Object | None]]:
        """What happened after a revision: (revision, ADDED/MODIFIED/DELETED, the object, and what it was before)."""
        with self.changed:
            if revision < self.compacted:
                raise Refused(410, "Expired", f"too old resource version: {revision} ({self.compacted})")
            found = [
                (at, what, now, old) for at, kind, what, now, old in self._log if kind == resource and at > revision
            ]
        yield from found

    def compact(self) -> None:
        """Forget what happened until now."""
        with self.changed:
            self.compacted, self._log = self.revision, []

    # Writing ------------------------------------------------------------------------------------------------------

    def create(self, resource: str, namespace: str, new: Object) -> Object:
        """Keep a new object. Refused if its name is taken."""
        new = copy.deepcopy(new)
        metadata = new.setdefault("metadata", {})
        with self.changed:
            if not metadata.get("name") and metadata.get("generateName"):
                metadata["name"] = f"{metadata['generateName']}{uuid.uuid4().hex[:5]}"
            name = metadata["name"]
            if (resource, namespace, name) in self._objects:
                raise Refused(409, "AlreadyExists", f'{resource} "{name}" already exists')
            if metadata.get("resourceVersion"):
                raise Refused(400, "BadRequest", "resourceVersion should not be set on objects to be created")
            metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
            if namespace:
                metadata["namespace"] = namespace
            return self._keep(resource, namespace, new, None)

    def update(self, resource: str, namespace: str, name: str, change: Callable[[Object], Object]) -> Object:
        """Replace an object by what `change` makes of it. Refused if there is none, or its version is another one."""
        with self.changed:
            old = self._objects.get((resource, namespace, name))
            if old is None:
                raise not_found(f'{resource} "{name}"')
            new = change(copy.deepcopy(old))
            version = new.get("metadata", {}).get("resourceVersion", old["metadata"]["resourceVersion"])
            if version and version != old["metadata"]["resourceVersion"]:
                raise conflict(f'{resource} "{name}"')
            uid = new["metadata"].get("uid", old["metadata"]["uid"])
            if uid != old["metadata"]["uid"]:
                raise conflict(f'{resource} "{name}" (its uid is another one)')
            for kept in ("uid", "creationTimestamp", "name", "namespace", "deletionTimestamp"):
                if kept in old["metadata"]:
                    new["metadata"][kept] = old["metadata"][kept]
            if new["metadata"].get("deletionTimestamp") and _may_go(new):
                return self._remove(resource, namespace, new)
            unchanged = {**new, "metadata": {**new["metadata"], "resourceVersion": old["metadata"]["resourceVersion"]}}
            return copy.deepcopy(old) if unchanged == old else self._keep(resource, namespace, new, old)

    def merge(self, resource: str, namespace: str, name: str, patch: Mapping[str, Any]) -> Object:
        """Merge into an object; what a controller does, which reads before it writes."""
        return self.update(resource, namespace, name, lambda old: merged(old, patch))

    def delete(
        self, resource: str, namespace: str, name: str, grace_s: int | None = None, finalizer: str = ""
    ) -> Object:
        """Delete an object: at once, or, where it has finalizers or a grace time, when these are over."""
        with self.changed:
            old = self._objects.get((resource, namespace, name))
            if old is None:
                raise not_found(f'{resource} "{name}"')
            new = copy.deepcopy(old)
            metadata = new["metadata"]
            if finalizer:
                metadata["finalizers"] = [*metadata.get("finalizers", ()), finalizer]
            if resource == "pods":
                wanted = _grace(new) if grace_s is None else grace_s
                before = metadata.get("deletionGracePeriodSeconds", wanted)
                metadata["deletionGracePeriodSeconds"] = min(wanted, before)
            metadata.setdefault("deletionTimestamp", now())
            if _may_go(new):
                return self._remove(resource, namespace, new)
            return copy.deepcopy(old) if new == old else self._keep(resource, namespace, new, old)

    def _keep(self, resource: str, namespace: str, new: Object, old: Object | None) -> Object:
        self.revision += 1
        new["metadata"]["resourceVersion"] = str(self.revision)
        self._objects[resource, namespace, new["metadata"]["name"]] = new
        self._note(resource, "MODIFIED" if old else "ADDED", new, old)
        return copy.deepcopy(new)

    def _remove(self, resource: str, namespace: str, last: Object) -> Object:
        self.revision += 1
        last["metadata"]["resourceVersion"] = str(self.revision)
        old = self._objects.pop((resource, namespace, last["metadata"]["name"]))
        self._note(resource, "DELETED", last, old)
        return copy.deepcopy(last)

    def _note(self, resource: str, what: str, new: Object, old: Object | None) -> None:
        self._log.append((self.revision, resource, what, copy.deepcopy(new), old))
        if len(self._log) > KEPT_CHANGES:
            self.compacted, self._log = self._log[0][0], self._log[1:]
        self.changed.notify_all()


def now() -> str:
    """The time as the API writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _grace(pod: Object) -> int:
    """A pod that nobody runs, or that has ended, needs no time."""
    ended = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
    if ended or not pod.get("spec", {}).get("nodeName"):
        return 0
    return int(pod["spec"].get("terminationGracePeriodSeconds", 30))


def _may_go(dying: Object) -> bool:
    metadata = dying["metadata"]
    return not metadata.get("finalizers") and not metadata.get("deletionGracePeriodSeconds")
