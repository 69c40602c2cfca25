"""A snapshot as a Hugging Face model folder: weights in safetensors files, config.json, tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from checkpointing.assemble import SnapshotReader, open_snapshot
from checkpointing.contents import check_shapes, wanted_weights, weight_name
from checkpointing.flatten import DTYPES
from checkpointing.hf_tokenizer import tokenizer_files
from checkpointing.staged import StreamedFile, staged_folder
from configs.load import load_job
from configs.schema import JobConfig
from parallelism.hf_names import HfNames, hf_names

FILE_BYTES = 5_000_000_000
Progress = Callable[[str, int, int], None]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    size_bytes: int


def export_hf(
    run_dir: Path, step: int, output: Path, dtype: Literal["float32", "bfloat16"], progress: Progress,
    *, file_bytes: int = FILE_BYTES, drop_expert_bias: bool = False, averaged: bool = False,
) -> None:  # fmt: skip
    """Write `output`, a folder that `transformers.AutoModelForCausalLM.from_pretrained` reads.

    Memory: one logical tensor and what becomes of it. progress(what, done_bytes, total_bytes): what is `verify`, then
    `write`. file_bytes: the most that one weights file holds, unless a single tensor is larger.
    drop_expert_bias: export a model whose architecture has no place for the balancing biases of its router without
    them; it then routes some tokens to other experts than the trained one. averaged: take the weights' average.

    Raises:
        ValueError: the run keeps no average; no transformers model computes the same; the snapshot is missing or
            damaged (the message names the file); output is not empty; no room.
    """
    config = load_job(run_dir / "config.toml")
    names = hf_names(config)
    wanted = wanted_weights(names.model, averaged)
    with open_snapshot(run_dir, step, [tensor.name for tensor in wanted], progress) as snapshot:
        check_shapes(snapshot, wanted)
        if not drop_expert_bias:
            _check_unplaced(names, snapshot)
        with staged_folder(output) as folder:
            _write_weights(folder, names, snapshot, _DTYPES[dtype], file_bytes, progress, averaged)
            _write_texts(folder, config, names, dtype)


def _check_unplaced(names: HfNames, snapshot: SnapshotReader) -> None:
    """What the format has no place for may be left out only if it changes nothing."""
    for name in (name for name, entries in names.names.items() if not entries):
        if snapshot.read(f"model.{name}").count_nonzero():
            architecture = names.config["architectures"]
            assert isinstance(architecture, Sequence)
            raise ValueError(
                f"{name} is not zero, and {architecture[0]} has no place for it: the router's balancing bias decides "
                "which experts a token goes to. Export with --format dcp, or without the biases (drop_expert_bias), "
                "which changes the model's outputs"
            )


def _write_weights(
    folder: Path, names: HfNames, snapshot: SnapshotReader, dtype: torch.dtype, file_bytes: int, progress: Progress,
    averaged: bool,
) -> None:  # fmt: skip
    entries = [
        _Entry(name, shape, math.prod(shape) * _stored_as(name, dtype).itemsize)
        for parts in names.names.values()
        for name, shape in parts.items()
    ]
    files = _divide(entries, file_bytes)
    total, done = sum(entry.size_bytes for entry in entries), 0
    tensors = _converted(names, snapshot, dtype, averaged)
    for file, contents in files.items():
        with StreamedFile(folder / file) as stream:
            stream.write(_header(contents, dtype))
            for entry in contents:
                progress("write", done, total)
                name, tensor = next(tensors)
                assert (name, tuple(tensor.shape)) == (entry.name, entry.shape)
                stream.write_tensor(tensor)
                done += entry.size_bytes
    progress("write", done, total)
    if len(files) > 1:
        where = {entry.name: file for file, contents in files.items() for entry in contents}
        _write_json(folder, "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _converted(
    names: HfNames, snapshot: SnapshotReader, dtype: torch.dtype, averaged: bool
) -> Iterator[tuple[str, Tensor]]:
    for name, parts in names.names.items():
        if parts:
            for key, value in names.to_hf(name, snapshot.read(weight_name(names.model, name, averaged))).items():
                yield key, value.to(_stored_as(key, dtype))


def _stored_as(name: str, dtype: torch.dtype) -> torch.dtype:
    """Routing compares sums with this bias: transformers too keeps it in fp32 whatever the weights are in."""
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype


def _divide(entries: list[_Entry], file_bytes: int) -> dict[str, list[_Entry]]:
    """Consecutive entries by file; transformers knows the names."""
    groups: list[list[_Entry]] = [[]]
    size_bytes = 0
    for entry in entries:
        if groups[-1] and size_bytes + entry.size_bytes > file_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(entry)
        size_bytes += entry.size_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _header(entries: list[_Entry], dtype: torch.dtype) -> bytes:
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        offsets = (position, position + entry.size_bytes)
        stored = DTYPES[_stored_as(entry.name, dtype)]
        described[entry.name] = {"dtype": stored, "shape": entry.shape, "data_offsets": offsets}
        position += entry.size_bytes
    text = msgspec.json.encode(described)
    text = text.ljust(math.ceil(len(text) / 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _write_texts(folder: Path, config: JobConfig, names: HfNames, dtype: str) -> None:
    files, eos_id = tokenizer_files(config)
    special = {} if eos_id is None else {"eos_token_id": eos_id}
    _write_json(folder, "config.json", {**names.config, "torch_dtype": dtype, "bos_token_id": None, **special})
    _write_json(folder, "generation_config.json", {"_from_model_config": True, **special})
    for name, data in files.items():
        with StreamedFile(folder / name) as stream:
            stream.write(data)


def _write_json(folder: Path, name: str, value: object) -> None:
    with StreamedFile(folder / name) as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
