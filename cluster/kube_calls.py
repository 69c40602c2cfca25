"""The few calls to an API server that submitting needs, by path: every kind of object alike, custom ones too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

MERGE_PATCH = "application/merge-patch+json"
NOT_FOUND, CONFLICT, FORBIDDEN = 404, 409, 403

_CONNECT_S, _READ_S = 5.0, 30.0


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


class KubeClient:
    """A `KubeApi` through the official client: its kubeconfigs, credentials and certificates."""

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

        headers = {"Accept": "application/json", "Content-Type": content_type}
        if token := self._settings.auth_settings().get("BearerToken"):
            headers[token["key"]] = token["value"]
        try:
            answer = self._client.rest_client.request(
                method,
                self._settings.host + path,
                headers=headers,
                body=body,
                _request_timeout=(_CONNECT_S, _READ_S),
            )
            status, data = int(answer.status), answer.data if answer.data is not None else answer.read()
        except ApiException as error:
            status, data = int(error.status or 0), error.body or b""
            if not status:
                raise KubeError(f"{self._settings.host} cannot be reached: {error.reason}") from error
        except HTTPError as error:
            raise KubeError(f"{self._settings.host} cannot be reached: {error}") from error
        return _answered(method, path, status, data)


def _answered(method: str, path: str, status: int, data: bytes | str) -> dict[str, Any]:
    try:
        said = json.loads(data) if data else {}
    except ValueError:
        said = {"message": str(data)[:200]}
    if not isinstance(said, dict):
        said = {"message": "no object"}
    if not 200 <= status < 300:
        words = said.get("message") or said.get("reason") or "without a word"
        raise KubeError(f"Kubernetes refused {method} {path.partition('?')[0]} ({status}): {words}", status)
    return said


def _has_kubeconfig() -> bool:
    named = os.environ.get("KUBECONFIG", "")
    return bool(named) or (Path.home() / ".kube" / "config").exists()
