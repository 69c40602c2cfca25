"""A Hugging Face model folder as the snapshot that a new run begins from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import safetensors
from torch import Tensor

from checkpointing.contents import fresh_tensors, wanted_tensors, weight_of
from checkpointing.imported import SHARD_BYTES, check_unused, write_snapshot
from configs.schema import JobConfig
from parallelism.hf_names import HfNames, hf_names

Progress = Callable[[str, int, int], None]
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What may differ and still be the same weights of the same function.
_FREE = frozenset({"max_position_embeddings", "use_cache", "architectures", "attention_dropout"})
_ROPE = frozenset({"rope_theta", "rope_scaling"})
_NO_LIMIT = frozenset({"use_sliding_window"})


def import_hf(
    source: Path, config: JobConfig, run_dir: Path, progress: Progress, *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Commit the weights in `source` as step 0 of a run without snapshots; moments and counters are zero.

    Weights of any floating type become what the job keeps (fp32). Memory: one logical tensor and what it is made of.
    progress: `write` and bytes. Returns the step, 0.

    Raises:
        ValueError: source is not a model of this job's configuration, or has no safetensors files; the run has
            snapshots; no room.
    """
    check_unused(run_dir)
    names = hf_names(config)
    _check_config(source, names)
    with ExitStack() as stack:
        weights = _Weights(source, stack)

        def value(name: str) -> Tensor | None:
            # An average begins with the weights.
            inner = weight_of(name)
            parts = {} if inner is None else names.names[inner]
            if inner is None or not parts:
                return None
            return names.from_hf(inner, {key: weights.read(key, shape) for key, shape in parts.items()})

        missing = [key for parts in names.names.values() for key in parts if key not in weights.files]
        if missing:
            raise ValueError(f"{source} has no {missing[0]} ({len(missing)} of the model's tensors are missing)")
        wanted = wanted_tensors(names.model) + fresh_tensors(names.model)
        write_snapshot(run_dir, 0, wanted, value, {"tokens_seen": 0}, progress, shard_bytes)
    return 0


class _Weights:
    """The tensors of a folder, each in the file that the index, or the file itself, says."""

    def __init__(self, source: Path, stack: ExitStack) -> None:
        index = source / _INDEX
        if index.is_file():
            listed = _read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(_is_plain(file) for file in listed.values()):
                raise ValueError(f"{index}: weight_map must name files of this folder")
            self.files: dict[str, str] = listed
        elif (source / _SINGLE).is_file():
            self.files = {}
        else:
            raise ValueError(f"{source} has neither {_SINGLE} nor {_INDEX}; only safetensors weights can be imported")
        self._open = {}
        for file in sorted(set(self.files.values())) or [_SINGLE]:
            try:
                self._open[file] = stack.enter_context(safetensors.safe_open(source / file, framework="pt"))
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(f"{source / file} cannot be read: {error}") from error
        self.files = self.files or dict.fromkeys(self._open[_SINGLE].keys(), _SINGLE)
        self._source = source

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, of this shape. ValueError if it is another or cannot be read."""
        file = self.files[name]
        try:
            tensor: Tensor = self._open[file].get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self._source / file} has no whole tensor {name}: {error}") from error
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)} in {self._source}, {list(shape)} in this job")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{name} is {tensor.dtype}: quantised weights cannot be imported; convert them to bf16")
        return tensor


def _is_plain(file: object) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file


def _check_config(source: Path, names: HfNames) -> None:
    """The source must be the model that the job trains: same weights in another function are another model."""
    theirs = _read_json(source / "config.json")
    if "quantization_config" in theirs:
        raise ValueError(f"{source}: quantised weights cannot be imported; convert them to bf16 first")
    ours = {key: value for key, value in names.config.items() if key not in _FREE | _ROPE | _NO_LIMIT}
    different = [
        f"{key} is {theirs[key]!r} there, {value!r} in this job"
        for key, value in ours.items()
        if key in theirs and theirs[key] != value
    ]
    if theirs.get("model_type") != ours["model_type"]:
        different = [f"model_type is {theirs.get('model_type')!r} there, {ours['model_type']!r} in this job"]
    elif _rope(theirs) != _rope(names.config):
        different.append(f"rope is {_rope(theirs)} there, {_rope(names.config)} in this job")
    if different:
        raise ValueError(f"{source} is of another model: {'; '.join(different)}; change [model] to match it")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Theta and scaling in one form, from the fields of transformers 4 or 5."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = scaling.pop("type", "default")
    found = {"rope_theta": config.get("rope_theta", 10_000.0), "rope_type": kind} | scaling
    if found["rope_type"] == "yarn":
        found.setdefault("truncate", True)
        found.setdefault("beta_fast", 32.0)
        found.setdefault("beta_slow", 1.0)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
