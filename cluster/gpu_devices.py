"""Which GPU serves which local rank: CUDA's own rules for CUDA_VISIBLE_DEVICES, without CUDA. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def split_visible(value: str | None) -> tuple[str, ...] | None:
    """The entries of CUDA_VISIBLE_DEVICES; None if it is not set, which means all GPUs."""
    return None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())


def visible_indices(visible: Sequence[str] | None, uuids: Mapping[int, str]) -> list[int]:
    """The driver's numbers of the GPUs that programs of this node see, in their order: local rank i uses the i-th.

    uuids: all GPUs of the machine by the driver's number, "" where it could not be read. As CUDA does, an entry may be
    a number or the beginning of a UUID, the first one that names no GPU ends the list, and a repeated one voids it.
    `MIG-GPU-...` entries count as their GPU; other MIG names are not understood and end the list. CUDA's numbers are
    the driver's where all GPUs are of one kind, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    if visible is None:
        return sorted(uuids)
    found: list[int] = []
    for entry in visible:
        index = _find(entry, uuids)
        if index is None:
            break
        if index in found:
            return []
        found.append(index)
    return found


def _find(entry: str, uuids: Mapping[int, str]) -> int | None:
    if entry.isdecimal():
        return int(entry) if int(entry) in uuids else None
    name = entry.removeprefix("MIG-").partition("/")[0]
    if not name.startswith("GPU-"):
        return None
    matching = [index for index, uuid in uuids.items() if uuid.startswith(name)]
    return matching[0] if len(matching) == 1 else None
