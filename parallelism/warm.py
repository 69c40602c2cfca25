"""Imports that a worker would otherwise do during recovery.

Only imports: nothing here runs autograd or makes threads, so a process that called this may be forked.
"""

from __future__ import annotations

import importlib

MODULES = (
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch._dynamo",
    "parallelism.engine",
    "torchtitan.distributed.activation_checkpoint",
    "torchtitan.components.loss",
    "torchtitan.models.llama3.sharding",
    "torchtitan.models.deepseek_v3.sharding",
    "torchtitan.models.qwen3.sharding",
)
PRELOAD_MODULES = ("parallelism.preload",)


def warm_imports() -> None:
    """Import every module that building an engine and the first steps import."""
    for name in MODULES:
        importlib.import_module(name)
