"""The patches that an API server takes: merge, strategic merge and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Lists that a strategic merge patch merges, by the field that tells their elements apart.
_KEYS = {"conditions": "type", "taints": "key", "containerStatuses": "name", "ownerReferences": "uid"}


def merged(old: Any, patch: Any, strategic: bool = False) -> Any:
    """RFC 7386; strategic: lists of the kinds above are merged too."""
    if not isinstance(patch, Mapping):
        return patch
    base = dict(old) if isinstance(old, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            base.pop(key, None)
        elif strategic and key in _KEYS and isinstance(value, Sequence):
            base[key] = _merged_list(base.get(key) or [], value, _KEYS[key])
        else:
            base[key] = merged(base.get(key), value, strategic)
    return base


def _merged_list(old: Sequence[Any], patch: Sequence[Any], key: str) -> list[Any]:
    found = {each[key]: each for each in old}
    for each in patch:
        found[each[key]] = merged(found.get(each[key]), each, strategic=True)
    return list(found.values())


def json_patched(old: dict[str, Any], operations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """RFC 6902: add, replace, remove and test. ValueError where it does not fit."""
    for operation in operations:
        *steps, last = [step.replace("~1", "/").replace("~0", "~") for step in operation["path"].split("/")[1:]]
        place: Any = old
        for step in steps:
            place = place[int(step)] if isinstance(place, list) else place[step]
        match operation["op"], place:
            case "test", _:
                if (place[int(last)] if isinstance(place, list) else place.get(last)) != operation["value"]:
                    raise ValueError(f"{operation['path']} is not what was expected")
            case "remove", list():
                del place[int(last)]
            case "remove", _:
                del place[last]
            case "add", list():
                place.insert(len(place) if last == "-" else int(last), operation["value"])
            case "add" | "replace", _:
                place[int(last) if isinstance(place, list) else last] = operation["value"]
            case other, _:
                raise ValueError(f"unknown operation {other!r}")
    return old
