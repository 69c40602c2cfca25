"""Who may do what: roles and their bindings, as the API server reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.kubernetes.store import Refused, Store

_GROUP = "rbac.authorization.k8s.io"
ADMIN = "system:admin"


def account(namespace: str, name: str) -> str:
    """A ServiceAccount as a user."""
    return f"system:serviceaccount:{namespace}:{name}"


def check(store: Store, user: str, verb: str, resource: str, namespace: str, subresource: str = "") -> None:
    """Refused (403) if no role grants it. resource: as in `Store`."""
    if user == ADMIN:
        return
    plural, _, group = resource.partition(".")
    wanted = f"{plural}/{subresource}" if subresource else plural
    for rule in _rules(store, user, namespace):
        if group in rule.get("apiGroups", ()) and wanted in rule.get("resources", ()) and verb in rule["verbs"]:
            return
    where = f' in the namespace "{namespace}"' if namespace else " at the cluster scope"
    message = f'User "{user}" cannot {verb} resource "{wanted}" in API group "{group}"{where}'
    raise Refused(403, "Forbidden", f"{wanted} is forbidden: {message}")


def _rules(store: Store, user: str, namespace: str) -> Iterator[Mapping[str, Any]]:
    for binding in store.list(f"clusterrolebindings.{_GROUP}"):
        if _names(binding, user):
            yield from _of(store, binding, "")
    for binding in store.list(f"rolebindings.{_GROUP}", namespace) if namespace else ():
        if _names(binding, user):
            yield from _of(store, binding, namespace)


def _names(binding: Mapping[str, Any], user: str) -> bool:
    return any(
        each["kind"] == "ServiceAccount" and account(each["namespace"], each["name"]) == user
        for each in binding.get("subjects", ())
    )


def _of(store: Store, binding: Mapping[str, Any], namespace: str) -> Iterator[Mapping[str, Any]]:
    reference = binding["roleRef"]
    if reference["kind"] == "ClusterRole":
        role = store.find(f"clusterroles.{_GROUP}", "", reference["name"])
    else:
        role = store.find(f"roles.{_GROUP}", namespace, reference["name"])
    yield from (role or {}).get("rules", ())
