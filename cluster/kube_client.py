"""The way to an API server through the official client: its kubeconfigs, credentials and certificates.

The one import site of `kubernetes`, which is imported when it is needed: it takes a while, and may not be installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.kube_calls import KubeError

_CONNECT_S, _READ_S = 5.0, 30.0
_SLACK_S = 15.0
_CHUNK_BYTES = 1 << 16


class KubeClient:
    """See `cluster.kube_calls.KubeWatching`. Any number of threads may use one."""

    def __init__(self, context: str = "") -> None:
        """context: one of the kubeconfig's; "": its current one, or, in a pod without a kubeconfig, the pod's account.

        Raises:
            ValueError: if the client is not installed, or there is neither.
        """
        try:
            from kubernetes import client, config
        except ImportError as error:
            raise ValueError("Kubernetes needs its client: pip install 'everstep[kubernetes]'") from error
        settings = client.Configuration()
        try:
            if context or _has_kubeconfig():
                config.load_kube_config(
                    # Named, since the client looks at the variable only when it is imported.
                    config_file=os.environ.get("KUBECONFIG") or None,
                    context=context or None,
                    client_configuration=settings,
                    persist_config=False,
                )
            else:
                config.load_incluster_config(client_configuration=settings)
        except (config.ConfigException, OSError) as error:
            fix = "set KUBECONFIG, or kubernetes.context in the profile"
            raise ValueError(f"no way to a cluster: {error}; {fix}") from error
        settings.retries = 1
        self._settings = settings
        self._client = client.ApiClient(settings)

    def call(
        self, method: str, path: str, body: object = None, content_type: str = "application/json"
    ) -> dict[str, Any]:
        """See `KubeApi`."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Content-Type": content_type, **self._asked_headers()}
        url, timeout = self._settings.host + path, (_CONNECT_S, _READ_S)
        try:
            answer = self._client.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=timeout
            )  # fmt: skip
            status, data = int(answer.status), answer.data if answer.data is not None else answer.read()
        except ApiException as error:
            status, data = int(error.status or 0), error.body or b""
            if not status:
                raise KubeError(f"{self._settings.host} cannot be reached: {error.reason}") from error
        except (HTTPError, OSError) as error:
            raise KubeError(f"{self._settings.host} cannot be reached: {error}") from error
        return _answered(f"{method} {path.partition('?')[0]}", status, data)

    def watch(self, path: str, timeout_s: float) -> Iterator[dict[str, Any]]:
        """See `KubeWatching`."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        url, where = self._settings.host + path, path.partition("?")[0]
        timeout, headers = (_CONNECT_S, timeout_s + _SLACK_S), self._asked_headers()
        try:
            answer = self._client.rest_client.request("GET", url, headers=headers, _request_timeout=timeout)
            response = answer.response
            try:
                if response.status != 200:
                    _answered(f"to watch {where}", response.status, response.read(decode_content=True))
                yield from _events(response.stream(_CHUNK_BYTES, decode_content=True), where)
            finally:
                response.close()
        except ApiException as error:
            raise KubeError(f"{where} cannot be watched: {error.reason}", int(error.status or 0)) from error
        except KubeError:
            raise
        except (HTTPError, OSError) as error:
            raise KubeError(f"the watch of {where} broke: {error}") from error

    def _asked_headers(self) -> dict[str, str]:
        """KubeError if the credentials cannot be had now: a file of them may be missing for a moment."""
        from kubernetes.config import ConfigException

        try:
            return self._headers()
        except (ConfigException, OSError) as error:
            raise KubeError(f"no credentials for {self._settings.host} now: {error}") from error

    def _headers(self) -> dict[str, str]:
        """Credentials are asked for each time: a pod's token is renewed every hour."""
        headers = {"Accept": "application/json"}
        if token := self._settings.auth_settings().get("BearerToken"):
            headers[str(token["key"])] = str(token["value"])
        return headers


def _answered(what: str, status: int, data: bytes | str) -> dict[str, Any]:
    try:
        said = json.loads(data) if data else {}
    except ValueError:
        said = {"message": str(data)[:200]}
    if not isinstance(said, dict):
        said = {"message": "no object"}
    if not 200 <= status < 300:
        words = said.get("message") or said.get("reason") or "without a word"
        raise KubeError(f"Kubernetes refused {what} ({status}): {words}", status)
    return said


def _events(chunks: Iterator[bytes], where: str) -> Iterator[dict[str, Any]]:
    """One event a line; an event of type ERROR is raised."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in filter(None, lines):
            try:
                event = json.loads(line)
                kind, found = event["type"], dict(event["object"])
            except (ValueError, KeyError, TypeError) as error:
                raise KubeError(f"the watch of {where} says what no one can read: {error}") from error
            if kind == "ERROR":
                code = found.get("code")
                status = code if isinstance(code, int) else 0
                raise KubeError(f"the watch of {where} ended: {found.get('message', 'without a word')}", status)
            yield event


def _has_kubeconfig() -> bool:
    named = os.environ.get("KUBECONFIG", "")
    return bool(named) or (Path.home() / ".kube" / "config").exists()
