"""The low precision of a rank's model, with the kernel that computes it; what there is none of is not imported."""

from __future__ import annotations

import torch

from configs.schema import JobConfig
from parallelism.lowp_emulated import EmulatedKernel
from parallelism.lowp_state import Kernel, Lowp, reuses_weights
from parallelism.precision import Precision


def build_lowp(config: JobConfig, precision: Precision, device: torch.device) -> Lowp | None:
    """What converted modules will share; None if the recipe converts none.

    Raises:
        ValueError: the backend's package cannot be loaded.
    """
    if not precision.low:
        return None
    return Lowp(config, precision, _kernel(precision, device), reuses_weights(config))


def _kernel(precision: Precision, device: torch.device) -> Kernel:
    if precision.backend == "te":
        from parallelism.lowp_te import TransformerEngineKernel

        return TransformerEngineKernel(precision.recipe)
    if precision.backend == "torchao":
        from parallelism.lowp_torchao import torchao_kernel

        return torchao_kernel(precision.recipe, emulate=device.type == "cpu")
    return EmulatedKernel()
