"""What is asked of an API server, by path: every kind of object alike, custom ones too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
NOT_FOUND, CONFLICT, FORBIDDEN, GONE = 404, 409, 403, 410


class KubeError(OSError):
    """The API server refused, or could not be reached. status is HTTP's, 0 if there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class KubeApi(Protocol):
    """An API server."""

    def call(
        self, method: str, path: str, body: object = None, content_type: str = "application/json"
    ) -> dict[str, Any]:
        """One request; returns the object of its answer. KubeError with the server's words."""


class KubeWatching(KubeApi, Protocol):
    """An API server that can be watched."""

    def watch(self, path: str, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Events of a watch, until the server ends it after timeout_s. path: with the query of a watch in it.

        Raises:
            KubeError: if it is refused, or the connection breaks; status 410: one must list again.
        """
