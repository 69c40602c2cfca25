"""A copy of some objects of the API server that keeps itself current: listed once, then watched, in a thread.

While the server is away the copy stays as it was, and is brought up to date when the server is back: nothing is
concluded from silence.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

from cluster.kube_calls import GONE, KubeError, KubeWatching

_WATCH_S = 60.0
_PAGE = 500
_BACKOFF_S = (0.2, 30.0)
_SHORTEST_S = 1.0
_T = TypeVar("_T")

logger = logging.getLogger("everstep.kubernetes")


class Mirror(Generic[_T]):
    """All objects at a path, by name, each as `read` makes it. Its own thread writes; any may look.

    version grows with every change. changed is set with it, for who waits.
    """

    def __init__(
        self,
        api: KubeWatching,
        path: str,
        selector: str,
        read: Callable[[dict[str, Any]], _T],
        watch_s: float = _WATCH_S,
    ) -> None:
        self.api = api
        self.path = path
        self.selector = selector
        self.read = read
        self.watch_s = watch_s
        self.version = 0
        self.changed = threading.Event()
        self._objects: Mapping[str, _T] = {}
        self._resource_version = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {path.rpartition('/')[2]}", daemon=True)

    def start(self) -> None:
        """List once, here, and go on in the thread.

        Raises:
            KubeError: if that is refused, or the server does not answer.
        """
        self.list()
        self._thread.start()

    def stop(self) -> None:
        """Look no more. A watch that is open is not waited for."""
        self._stop.set()

    def objects(self) -> Mapping[str, _T]:
        """All of them, as known now; the mapping is never changed."""
        return self._objects

    def list(self) -> None:
        """Bring the copy up to date at once. KubeError if that does not go."""
        found: dict[str, _T] = {}
        more, version = "", ""
        while True:
            answer = self.api.call("GET", self._url(limit=_PAGE, **({"continue": more} if more else {})))
            for item in answer.get("items") or ():
                self._keep(found, item)
            metadata = answer.get("metadata") or {}
            version, more = metadata.get("resourceVersion") or version, metadata.get("continue") or ""
            if not more:
                break
        self._resource_version = version
        if found != self._objects:
            self._publish(found)

    def _run(self) -> None:
        wait_s = _BACKOFF_S[0]
        listed, said = True, ""
        while not self._stop.is_set():
            began_s = time.monotonic()
            try:
                if not listed:
                    self.list()
                    listed = True
                self._watch()
                said = ""
                wait_s = _BACKOFF_S[0]
                # A server that ends each watch at once is not asked without a pause.
                if time.monotonic() - began_s < _SHORTEST_S:
                    self._stop.wait(_SHORTEST_S)
            except Exception as error:
                # A copy that grows old in silence is worse than a defect told.
                if not isinstance(error, KubeError):
                    logger.exception("%s: the watch failed in a way that nobody foresaw", self.path)
                elif error.status == GONE:
                    logger.info("%s: the server has forgotten where the watch was; listing again", self.path)
                elif str(error) != said:
                    said = str(error)
                    logger.warning("%s", said)
                # Whatever broke, a list says where things are now.
                listed = False
                if time.monotonic() - began_s > self.watch_s / 2:
                    wait_s = _BACKOFF_S[0]
                self._stop.wait(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, _BACKOFF_S[1])

    def _watch(self) -> None:
        url = self._url(
            watch="true", allowWatchBookmarks="true", resourceVersion=self._resource_version,
            timeoutSeconds=int(self.watch_s),
        )  # fmt: skip
        for event in self.api.watch(url, self.watch_s):
            if self._stop.is_set():
                return
            self._take(event["type"], event["object"])

    def _take(self, kind: str, item: dict[str, Any]) -> None:
        version = (item.get("metadata") or {}).get("resourceVersion") or ""
        if kind != "BOOKMARK":
            objects = dict(self._objects)
            if kind == "DELETED":
                objects.pop((item.get("metadata") or {}).get("name", ""), None)
            else:
                self._keep(objects, item)
            if objects != self._objects:
                self._publish(objects)
        self._resource_version = version or self._resource_version

    def _keep(self, objects: dict[str, _T], item: dict[str, Any]) -> None:
        try:
            objects[item["metadata"]["name"]] = self.read(item)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            logger.warning("%s: an object that cannot be read is left out: %r", self.path, error)

    def _publish(self, objects: Mapping[str, _T]) -> None:
        self._objects = objects
        self.version += 1
        self.changed.set()

    def _url(self, **query: str | int) -> str:
        wanted = {**query, **({"labelSelector": self.selector} if self.selector else {})}
        return f"{self.path}?{urlencode(wanted)}"
