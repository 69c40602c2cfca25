"""Watching an API server: what comes in over a connection that stays open, as objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

from cluster.kube_calls import KubeApi, KubeClient, KubeError

_CONNECT_S = 5.0
_SLACK_S = 15.0
_CHUNK_BYTES = 1 << 16


class KubeWatching(KubeApi, Protocol):
    """An API server that can be watched."""

    def watch(self, path: str, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Events of a watch, until the server ends it after timeout_s. path: with the query of a watch in it.

        Raises:
            KubeError: if it is refused, or the connection breaks; status 410: one must list again.
        """


class KubeWatchClient(KubeClient):
    """A `KubeWatching` through the official client."""

    def watch(self, path: str, timeout_s: float) -> Iterator[dict[str, Any]]:
        """See `KubeWatching`."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json"}
        if token := self._settings.auth_settings().get("BearerToken"):
            headers[token["key"]] = token["value"]
        url, where = self._settings.host + path, path.partition("?")[0]
        try:
            answer = self._client.rest_client.request(
                "GET", url, headers=headers, _request_timeout=(_CONNECT_S, timeout_s + _SLACK_S)
            )
            response = answer.response if hasattr(answer, "response") else answer
            try:
                if response.status != 200:
                    raise KubeError(f"Kubernetes refused to watch {where} ({response.status})", response.status)
                yield from _events(response.stream(_CHUNK_BYTES, decode_content=True), where)
            finally:
                response.close()
        except ApiException as error:
            raise KubeError(f"{where} cannot be watched: {error.reason}", int(error.status or 0)) from error
        except HTTPError as error:
            raise KubeError(f"the watch of {where} broke: {error}") from error


def _events(chunks: Iterator[bytes], where: str) -> Iterator[dict[str, Any]]:
    """One event a line; an event of type ERROR is raised."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in filter(None, lines):
            try:
                event = json.loads(line)
                kind, found = event["type"], event["object"]
            except (ValueError, KeyError, TypeError) as error:
                raise KubeError(f"the watch of {where} says what no one can read: {error}") from error
            if kind == "ERROR":
                code = found.get("code")
                status = code if isinstance(code, int) else 0
                raise KubeError(f"the watch of {where} ended: {found.get('message', 'without a word')}", status)
            yield event
