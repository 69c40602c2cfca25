"""From nested state dicts to named local tensors and plain values, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
from torch.distributed.tensor import DTensor

from checkpointing.layout import TensorSlice

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Stateful(Protocol):
    """Anything with state: torch's own protocol.

    state_dict() returns nested dicts and lists of tensors (the live ones: loading writes into them) and of plain JSON
    values. After a load, load_state_dict() gets the same structure back, with the loaded values in it.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state back."""


class LocalTensor(NamedTuple):
    """This rank's part of a logical tensor: live memory, and the slice it is (size as end_bytes - start_bytes)."""

    tensor: torch.Tensor
    part: TensorSlice


class FlatState(NamedTuple):
    """A flattened state: tensors in file order (larger elements first, then by name) and the owners of leaves.

    with_leaves: keys of the state whose state_dict holds plain values, which are read anew for every snapshot.
    """

    tensors: list[LocalTensor]
    with_leaves: frozenset[str]


def flatten(state: Mapping[str, Stateful]) -> FlatState:
    """Take a state apart. ValueError, naming the key, for what cannot be saved without pickle."""
    tensors: dict[str, LocalTensor] = {}
    with_leaves = set()
    for key, owner in state.items():
        for name, value in _walk(key, owner.state_dict()):
            if not isinstance(value, torch.Tensor):
                check_json(name, value)
                with_leaves.add(key)
            elif name in tensors:
                raise ValueError(f"two tensors of the state are both called {name}: rename one")
            else:
                tensors[name] = _local(name, value)
    ordered = sorted(tensors.values(), key=lambda local: (-local.tensor.element_size(), local.part.name))
    return FlatState(ordered, frozenset(with_leaves))


def leaves(state: Mapping[str, Stateful], keys: frozenset[str]) -> dict[str, msgspec.Raw]:
    """The plain values of some owners of state, as JSON by name."""
    found = {}
    for key in sorted(keys):
        for name, value in _walk(key, state[key].state_dict()):
            if not isinstance(value, torch.Tensor):
                check_json(name, value)
                found[name] = msgspec.Raw(msgspec.json.encode(value))
    return found


def rebuild(key: str, template: Any, leaf: Callable[[str], Any]) -> Any:
    """`template` (a state dict) with its plain values replaced by leaf(name); tensors stay the live ones."""
    if isinstance(template, torch.Tensor):
        return template
    if isinstance(template, Mapping):
        return {k: rebuild(f"{key}.{k}", v, leaf) for k, v in template.items()}
    if isinstance(template, (list, tuple)):
        return type(template)(rebuild(f"{key}.{i}", v, leaf) for i, v in enumerate(template))
    return leaf(key)


def check_json(name: str, value: Any) -> None:
    """ValueError unless the value survives JSON unchanged."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: JSON has no such number, keep it in a tensor")
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_json(f"{name}.{i}", item)
    elif isinstance(value, Mapping):
        for k, item in value.items():
            check_json(f"{name}.{k}", item)
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"{name} is a {type(value).__name__}: a snapshot holds tensors and plain JSON values only")


def _walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for k, item in value.items():
            yield from _walk(f"{name}.{k}", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _walk(f"{name}.{i}", item)
    else:
        yield name, value


def _local(name: str, tensor: torch.Tensor) -> LocalTensor:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, which safetensors cannot hold")
    if isinstance(tensor, DTensor):
        chunks = tensor.__create_chunk_list__()
        local = tensor.to_local().detach()
        if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(local.shape):
            raise ValueError(f"{name}: its part on this rank is no single box of the logical tensor")
        offsets = tuple(chunks[0].offsets)
    else:
        local, offsets = tensor.detach(), (0,) * tensor.dim()
    part = TensorSlice(
        name=name,
        dtype=DTYPES[tensor.dtype],
        global_shape=tuple(tensor.shape),
        offsets=offsets,
        sizes=tuple(local.shape),
        start_bytes=0,
        end_bytes=local.numel() * local.element_size(),
    )
    return LocalTensor(local, part)
