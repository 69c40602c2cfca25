"""A snapshot as a checkpoint folder of torch.distributed.checkpoint, with the keys that torchtitan's own has.

    layers.0.attention.wo.weight                     the model's tensors, as its state_dict has them
    optimizer.state.<parameter>.exp_avg              AdamW's moments, exp_avg_sq and step; Muon's momentum_buffer
    optimizer.param_groups.<parameter>.lr            its settings
    ema.layers.0.attention.wo.weight                 the average of a weight, where the run keeps one
    train_state.step, train_state.ntokens_seen       for torchtitan
    everstep.step, everstep.tokens_seen              the same as tensors: read back without unpickling anything

The folder is written by torch itself, `.metadata` included, which is a pickle: that is its format and not ours.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from checkpointing.assemble import SnapshotReader, open_snapshot
from checkpointing.contents import (
    COUNTER,
    check_shapes,
    kept_as,
    wanted_tensors,
    wanted_weights,
    weight_name,
    weight_of,
)
from checkpointing.staged import staged_folder
from configs.load import load_job
from configs.schema import OptimizerConfig
from parallelism.outline import Outline, outline
from parallelism.updates import UpdateRule, rule_of

FILE_BYTES = 512 * 2**20
STEP_KEY, TOKENS_KEY = "everstep.step", "everstep.tokens_seen"
AVERAGE_KEY = "ema."
Progress = Callable[[str, int, int], None]


def export_dcp(
    run_dir: Path, step: int, output: Path, progress: Progress, *, file_bytes: int = FILE_BYTES, averaged: bool = False
) -> None:
    """Write `output`, a folder that torch.distributed.checkpoint.load and torchtitan read on any number of ranks.

    It has no state of a learning rate schedule and of a data loader: name those in torchtitan's
    `checkpoint.exclude_from_loading`. Memory: one logical tensor and file_bytes, since torch's writer keeps what it
    has put into the file that it is at. progress(what, done_bytes, total_bytes): what is `verify`, then `write`.
    averaged: put the weights' average in their place, and leave out what the optimizer keeps of those.

    Raises:
        ValueError: the run keeps no average; the snapshot is missing or damaged (the message names the file), or of
            another model than config.toml describes; output is not empty; no room.
    """
    config = load_job(run_dir / "config.toml")
    model = outline(config)
    wanted = wanted_weights(model, averaged=True) if averaged else wanted_tensors(model)
    with open_snapshot(run_dir, step, [tensor.name for tensor in wanted], progress) as snapshot:
        check_shapes(snapshot, wanted)
        source = _Source(model, snapshot)
        state = _weights(model, source, averaged)
        if not averaged:
            state |= _optimizer(model, config.optimizer, source)
        tokens_seen = int(snapshot.scalars.get("tokens_seen", 0))
        state["train_state"] = {"step": step, "ntokens_seen": tokens_seen}
        state["everstep"] = {"step": torch.tensor(step), "tokens_seen": torch.tensor(tokens_seen)}
        with staged_folder(output) as folder:
            _save(state, _Writer(folder, file_bytes), _LazyPlanner(source, progress))


class _Source:
    """Where the value of each key of the checkpoint comes from; the last logical tensor read is kept for its parts."""

    def __init__(self, model: Outline, snapshot: SnapshotReader) -> None:
        self._model = model
        self._snapshot = snapshot
        self._parts: dict[str, Tensor] = {}
        self.origins: dict[str, str] = {}

    def read(self, key: str) -> Tensor:
        """The whole tensor for one key."""
        if key not in self._parts:
            name = self.origins[key]
            self._parts = {}
            tensor = self._snapshot.read(name)
            inner = weight_of(name)
            prefix = AVERAGE_KEY if key.startswith(AVERAGE_KEY) else ""
            parts = {key: tensor} if inner is None else self._model.split(inner, tensor)
            self._parts = {prefix + part: value for part, value in parts.items()} if inner else parts
        return self._parts[key]


def _weights(model: Outline, source: _Source, averaged: bool) -> dict[str, Any]:
    """The model's part of the state dict to save; tensors of the snapshot stand in it as meta tensors, and `source`
    learns their names."""
    state: dict[str, Any] = {}
    for name, tensor in model.tensors.items():
        for key, part in model.split(name, tensor).items():
            state[key] = part
            source.origins[key] = weight_name(model, name, averaged)
            if model.has_average and not averaged and name in model.parameters:
                state[AVERAGE_KEY + key] = part
                source.origins[AVERAGE_KEY + key] = weight_name(model, name, averaged=True)
    return state


def _optimizer(model: Outline, optimizer: OptimizerConfig, source: _Source) -> dict[str, Any]:
    """The optimizer's part."""
    inner: dict[str, Any] = {}
    for name, parameter in model.parameters.items():
        rule = rule_of(optimizer, name, parameter.dim())
        entries = {kind: kept_as(kind, name) for kind in rule.state} | ({} if rule.muon else {"step": COUNTER})
        for kind, origin in entries.items():
            inner[f"state.{name}.{kind}"] = torch.empty((), device="meta") if kind == "step" else parameter
            source.origins[f"optimizer.state.{name}.{kind}"] = origin
        for setting, value in _settings(optimizer, rule).items():
            inner[f"param_groups.{name}.{setting}"] = value
    return {"optimizer": inner}


def _settings(config: OptimizerConfig, rule: UpdateRule) -> dict[str, Any]:
    """What torch's own optimizer keeps beside a parameter's moments."""
    return _defaults(config, rule) | {"initial_lr": config.lr * (config.muon_lr_ratio if rule.muon else 1.0)}


def _defaults(config: OptimizerConfig, rule: UpdateRule) -> dict[str, Any]:
    if rule.muon:
        return torch.optim.Muon(
            [torch.zeros(1, 1)],
            lr=config.lr * config.muon_lr_ratio,
            weight_decay=rule.weight_decay,
            momentum=config.muon_momentum,
            nesterov=config.muon_nesterov,
            ns_steps=config.muon_iterations,
            adjust_lr_fn=config.muon_scale,
        ).defaults
    return torch.optim.AdamW(
        [torch.zeros(1)],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=rule.weight_decay,
        fused=True,
    ).defaults


class _LazyPlanner(DefaultSavePlanner):
    """torch's planner over meta tensors: a value is read when its turn to be written comes."""

    def __init__(self, source: _Source, progress: Progress) -> None:
        super().__init__()
        self._source = source
        self._progress = progress
        self._done, self._total = 0, 0

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self._total = sum(map(_size_bytes, plan.items))
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        self._progress("write", self._done, self._total)
        self._done += _size_bytes(write_item)
        key = write_item.index.fqn
        return self._source.read(key) if key in self._source.origins else super().resolve_data(write_item)


class _Writer(dcp.FileSystemWriter):
    """torch's writer, given a few tensors at a time: it keeps all that goes into one file until that is closed."""

    def __init__(self, folder: Path, file_bytes: int) -> None:
        super().__init__(folder, thread_count=1)
        self._file_bytes = file_bytes

    def storage_meta(self) -> StorageMeta:
        """Without the folder's name, which is about to change."""
        return StorageMeta(save_id=self.save_id)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_divide(plan.items, self._file_bytes)):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            results += super().write_data(dataclasses.replace(plan, items=items, storage_data=prefix), planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _divide(items: list[WriteItem], file_bytes: int) -> list[list[WriteItem]]:
    """Consecutive items by file, all plain values in the first."""
    groups: list[list[WriteItem]] = [[item for item in items if item.type == WriteItemType.BYTE_IO]]
    size_bytes = 0
    for item in (item for item in items if item.type != WriteItemType.BYTE_IO):
        if groups[-1] and size_bytes + _size_bytes(item) > file_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(item)
        size_bytes += _size_bytes(item)
    return groups


def _size_bytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return item.tensor_data.size.numel() * item.tensor_data.properties.dtype.itemsize


def _save(state: dict[str, Any], writer: _Writer, planner: _LazyPlanner) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        # It is no Exception, and hides what went wrong on the only rank there is.
        cause = next((cause for cause, _ in error.failures.values()), None)
        if isinstance(cause, Exception):
            raise _first_os_error(cause) or cause from None
        raise


def _first_os_error(error: BaseException | None) -> OSError | None:
    """What a full disk said, before torch's archive writer complained that it could not finish its archive."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
