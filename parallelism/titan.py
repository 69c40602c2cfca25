"""The one place that imports torchtitan (0.3.0; with `lowp_modules`), and where each of its quirks is met.

Written against torch 2.13; what differs between the versions we allow (2.11 to 2.13) and torchtitan's own target:

- torch < 2.14: torchtitan's default `spmd_types` backend does not work, `partial_dtensor` does. Pipeline schedules
  have no `arg_mbs` (lists of microbatches); the whole local batch goes in and is split along dim 0, which newer ones
  accept too. `torch.distributed.set_timeout` is missing; nothing here needs it.
- torch 2.11: `torch.distributed.fsdp.DataParallelMeshDims` is missing, a name torchtitan imports but the
  partial_dtensor backend never uses: an empty class stands in. One process, FSDP2 and TP work there; PP and EP do not.

On CPU: torchtitan takes the type of the accelerator for its meshes and assumes CUDA if there is none; FlexAttention
has no backward; gloo has no PREMUL_SUM, so FSDP2 must sum plainly (we divide by the number of tokens ourselves).

`update_from_config` of torchtitan's model configs is not called: it imports torchtitan's whole trainer (1,100 modules,
about 2 s). What it does for us is two lines of `_prepare_model_config`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.fsdp
from torch import Tensor, nn

from configs.schema import JobConfig, ModelConfig
from parallelism.lowp_state import Lowp
from parallelism.mesh import World

SPMD_BACKEND = "partial_dtensor"
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module"


@dataclass(frozen=True)
class Blueprint:
    """A model not yet on any device: torchtitan's spec, the whole model on meta, and its size.

    n_params counts all parameters of the whole model, flops_per_token one forward and backward.
    """

    spec: Any
    model: nn.Module
    n_params: int
    flops_per_token: float
    needs_masks: bool


@dataclass(frozen=True)
class Pipeline:
    """This rank's share of the model, sharded but without storage. schedule is None without pipeline parallelism."""

    parts: list[nn.Module]
    schedule: Any
    has_first_stage: bool
    has_last_stage: bool


def prepare_process(device: torch.device) -> None:
    """Set torchtitan's process-wide switches for `device`. Idempotent; call before anything else here."""
    if not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"):
        setattr(torch.distributed.fsdp, "DataParallelMeshDims", type("DataParallelMeshDims", (), {}))  # noqa: B010
    import torchtitan.distributed.parallel_dims
    import torchtitan.distributed.utils

    torchtitan.distributed.parallel_dims.device_type = device.type
    torchtitan.distributed.utils.set_spmd_backend(SPMD_BACKEND)
    if device.type == "cuda":
        _be_deterministic()
    _silence_known_noise()


def _be_deterministic() -> None:
    """A resumed run can only be equal to an undisturbed one if no kernel depends on the order of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _silence_known_noise() -> None:
    # A gradient norm over two mesh axes is reduced axis by axis; torch says so once per rank and layout.
    logging.getLogger("torch.distributed.tensor._redistribute").addFilter(_is_not_norm_reduction)
    # Routers ask for fp32 through autocast; on CPU it cannot, and need not: they compute in fp32 already.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")


def _is_not_norm_reduction(record: logging.LogRecord) -> bool:
    return "_NormPartial" not in record.getMessage()


def build_dims(config: JobConfig, world: World) -> Any:
    """The mesh of the job as torchtitan's ParallelDims, with all its process groups. Collective."""
    from torchtitan.distributed import ParallelDims

    layout = config.parallelism
    dims = ParallelDims(
        dp_replicate=layout.dp_replicate,
        dp_shard=layout.dp_shard,
        cp=layout.cp,
        tp=layout.tp,
        pp=layout.pp,
        ep=layout.ep,
        world_size=world.world_size,
        spmd_backend=SPMD_BACKEND,
    )
    dims.build_mesh()
    return dims


def blueprint(config: JobConfig, device: torch.device, lowp: Lowp | None = None) -> Blueprint:
    """The model of `config` on the meta device. lowp: what its converted modules share; None: none is converted.

    Raises:
        ValueError: torchtitan has no such flavour, or the configuration asks for what the family cannot do.
    """
    spec = _registry_entry(config.model)
    with_flex = config.model.attention == "flex" or (config.model.attention == "auto" and device.type != "cpu")
    if with_flex and device.type == "cpu":
        raise ValueError("model.attention = 'flex' has no backward on CPU; use 'auto' or 'sdpa'")
    _prepare_model_config(spec.model, config, with_flex)
    if lowp is not None:
        from parallelism.lowp_modules import convert

        convert(spec.model, config, lowp)
    with torch.device("meta"), _one_rope_table():
        model = spec.model.build()
    n_params, flops_per_token = spec.model.get_nparams_and_flops(model, config.training.seq_len)
    return Blueprint(spec, model, int(n_params), float(flops_per_token), with_flex)


@contextlib.contextmanager
def _one_rope_table() -> Iterator[None]:
    """Let all layers share one placeholder of the rope cache while a model is built on meta.

    torchtitan computes it anew for each, some forty meta operations a layer, for the shape alone: half of the time
    that building a model takes.
    """
    from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

    tables: dict[str, Tensor] = {}
    originals = {kind: kind._precompute_cache for kind in (ComplexRoPE, CosSinRoPE)}

    def shared(rope: Any) -> Tensor:
        key = repr(rope.config)
        if key not in tables:
            tables[key] = originals[type(rope)](rope)
        return tables[key]

    for kind in originals:
        kind._precompute_cache = shared
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind._precompute_cache = original


def _registry_entry(model: ModelConfig) -> Any:
    if model.family == "llama3":
        from torchtitan.models.llama3 import llama3_configs as flavors
        from torchtitan.models.llama3 import model_registry
    elif model.family == "deepseek_v3":
        from torchtitan.models.deepseek_v3 import deepseekv3_configs as flavors
        from torchtitan.models.deepseek_v3 import model_registry
    else:
        from torchtitan.models.qwen3 import model_registry
        from torchtitan.models.qwen3 import qwen3_configs as flavors
    if model.flavor not in flavors:
        raise ValueError(f"model.flavor {model.flavor!r} is not one of {model.family}'s: {', '.join(flavors)}")
    extra = {"moe_comm_backend": "standard"} if _takes_moe_backend(flavors[model.flavor]) else {}
    return model_registry(model.flavor, **extra)


def _takes_moe_backend(build: Callable[..., Any]) -> bool:
    return "moe_comm_backend" in build.__code__.co_varnames[: build.__code__.co_argcount]


def _prepare_model_config(model: Any, config: JobConfig, with_flex: bool) -> None:
    """Edit torchtitan's model config in place: overrides, attention, rope length, sharding declarations."""
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention

    _cut_layers(model, config.model.layers)
    if config.model.vocab_size:
        model.vocab_size = config.model.vocab_size
        model.tok_embeddings.num_embeddings = config.model.vocab_size
        model.lm_head.out_features = config.model.vocab_size
    if not with_flex:
        for _, _, parent, name in list(model.traverse(FlexAttention.Config)):
            setattr(parent, name, ScaledDotProductAttention.Config())
    if config.training.seq_len > model.max_seq_len:
        raise ValueError(f"training.seq_len {config.training.seq_len} exceeds the model's longest, {model.max_seq_len}")
    for layer in model.layers:
        layer.attention.rope = dataclasses.replace(layer.attention.rope, max_seq_len=config.training.seq_len)
    _check_layout(model, config)
    _declare_sharding(model, config)


def _cut_layers(model: Any, layers: int) -> None:
    if not layers:
        return
    if layers > len(model.layers):
        raise ValueError(f"model.layers = {layers}, but the flavour has only {len(model.layers)}; give fewer, or 0")
    was_moe = any(layer.moe is not None for layer in model.layers)
    kept = model.layers[:layers]
    if was_moe and all(layer.moe is None for layer in kept):
        dense = sum(layer.moe is None for layer in model.layers)
        raise ValueError(f"model.layers = {layers} leaves no mixture-of-experts layer; give at least {dense + 1}, or 0")
    model.layers = kept


def _check_layout(model: Any, config: JobConfig) -> None:
    layout = config.parallelism
    if layout.cp > 1:
        raise ValueError("parallelism.cp > 1 is not supported yet; set it to 1")
    if layout.pp > 1 and model.enable_weight_tying:
        raise ValueError(
            "this flavour ties embedding and output weights, which pipelining cannot; set parallelism.pp = 1"
        )
    heads = [model.first_attention.n_heads, getattr(model.first_attention, "n_kv_heads", None)]
    for count in filter(None, heads):
        if count % layout.tp:
            raise ValueError(f"parallelism.tp = {layout.tp} must divide the model's {count} attention heads")
    experts = [layer.moe.num_experts for layer in model.layers if layer.moe is not None]
    if layout.ep > 1 and not experts:
        raise ValueError("parallelism.ep > 1 needs a mixture-of-experts flavour; set it to 1")
    if experts and experts[0] % layout.ep:
        raise ValueError(f"parallelism.ep = {layout.ep} must divide the model's {experts[0]} experts")


def _declare_sharding(model: Any, config: JobConfig) -> None:
    ep = config.parallelism.ep > 1
    if config.model.family == "llama3":
        from torchtitan.models.llama3.sharding import set_llama3_sharding_config

        set_llama3_sharding_config(model, enable_sp=True)
    elif config.model.family == "deepseek_v3":
        from torchtitan.models.deepseek_v3.sharding import set_deepseek_v3_sharding_config

        set_deepseek_v3_sharding_config(model, enable_sp=True, enable_ep=ep)
    else:
        from torchtitan.models.qwen3.sharding import set_qwen3_sharding_config

        set_qwen3_sharding_config(model, enable_sp=True, enable_ep=ep)


def parallelise(
    plan: Blueprint,
    config: JobConfig,
    dims: Any,
    device: torch.device,
    param_dtype: str,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Pipeline:
    """Cut the meta model into this rank's stages and shard them. No storage is allocated.

    param_dtype: fp32 or bf16, what parameters are gathered and activations computed in. loss: of one microbatch's
    logits and labels, for a pipeline to call.
    """
    from torchtitan.config import CompileConfig

    training, layout = _titan_configs(config, param_dtype)
    arguments = {
        "parallel_dims": dims,
        "training": training,
        "parallelism": layout,
        "compile_config": CompileConfig(enable=config.training.compile, components=["model"]),
        "ac_config": _activation_checkpointing(config),
        "dump_folder": "",
    }
    if config.parallelism.pp == 1:
        pipeline = Pipeline([plan.spec.parallelize_fn(plan.model, **arguments)], None, True, True)
    else:
        schedule, parts, first, last = plan.spec.pipelining_fn(
            plan.model,
            device=device,
            model_config=plan.spec.model,
            parallelize_fn=plan.spec.parallelize_fn,
            loss_fn=lambda logits, labels: (loss(logits, labels), {}),
            **arguments,
        )
        pipeline = Pipeline(parts, schedule, first, last)
    if device.type == "cpu":
        _sum_plainly(pipeline.parts)
    return pipeline


def _titan_configs(config: JobConfig, param_dtype: str) -> tuple[Any, Any]:
    from torchtitan.config import ParallelismConfig, TrainingConfig

    training, layout = config.training, config.parallelism
    names = {"bf16": "bfloat16", "fp32": "float32"}
    titan_training = TrainingConfig(
        local_batch_size=training.global_batch_size // config.dp_degree,
        seq_len=training.seq_len,
        mixed_precision_param=names[param_dtype],
        mixed_precision_reduce=names[config.precision.reduce_dtype],
        disable_cuda_graphs=True,
    )
    titan_layout = ParallelismConfig(
        data_parallel_replicate_degree=layout.dp_replicate,
        data_parallel_shard_degree=layout.dp_shard,
        tensor_parallel_degree=layout.tp,
        pipeline_parallel_degree=layout.pp,
        expert_parallel_degree=layout.ep,
        context_parallel_degree=layout.cp,
        pipeline_parallel_schedule=layout.pp_schedule,
        pipeline_parallel_microbatch_size=layout.pp_microbatch_size,
        spmd_backend=SPMD_BACKEND,
    )
    return titan_training, titan_layout


def _activation_checkpointing(config: JobConfig) -> Any:
    if config.training.activation_checkpoint == "none":
        return None
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

    return FullAC.Config() if config.training.activation_checkpoint == "full" else SelectiveAC.Config()


def _sum_plainly(parts: list[nn.Module]) -> None:
    for part in parts:
        for module in part.modules():
            if isinstance(module, torch.distributed.fsdp.FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over all tokens, in fp32; logits [B, S, V] may be sharded over tp, labels [B, S]."""
    from torchtitan.components.loss import cross_entropy_loss

    return cross_entropy_loss(logits, labels)


def attention_masks(part: nn.Module, positions: Tensor) -> Any:
    """FlexAttention's block mask: causal within each document; positions [B, S] restart at 0 where one begins."""
    return part.get_attention_masks(positions)  # type: ignore[operator]


def register_load_balancing(
    plan: Blueprint, optimizer: torch.optim.Optimizer, parts: list[nn.Module], dims: Any
) -> None:
    """Let `optimizer.step` first move the expert biases towards balance (arXiv 2408.15664). No-op without experts."""
    if plan.spec.post_optimizer_build_fn is not None:
        plan.spec.post_optimizer_build_fn(optimizer, parts, dims)


def expert_token_counters(parts: list[nn.Module]) -> list[Tensor]:
    """The buffers in which experts count their tokens until the next update."""
    return [buffer for part in parts for name, buffer in part.named_buffers() if name.endswith("tokens_per_expert_E")]


def canonical_name(name: str) -> str:
    """A parameter's name without the segments that wrappers add."""
    return ".".join(segment for segment in name.split(".") if segment != _CHECKPOINT_WRAPPER)


def fused_heads(parts: list[nn.Module]) -> dict[str, tuple[int, int]]:
    """By canonical name of a fused query-key-value projection's weight: query heads of a key head, size of a head."""
    from torchtitan.models.common.attention import FusedQKVLinear

    return {
        canonical_name(f"{name}.wqkv.weight"): (module.heads_per_kv, module.head_dim)
        for part in parts
        for name, module in part.named_modules()
        if isinstance(module, FusedQKVLinear)
    }


def initialisers(part: nn.Module) -> list[tuple[str, nn.Parameter, Callable[[Tensor], object]]]:
    """(canonical name, parameter, in-place initialiser) of every parameter that has one of its own.

    A tied parameter appears under the name that carries its initialiser.
    """
    from torchtitan.models.common.param_init import skip_param_init

    found = []
    for prefix, module in part.named_modules():
        rules = getattr(module, "_param_init", None) or {}
        for name, parameter in module.named_parameters(recurse=False):
            assert name in rules, f"{prefix}.{name} has no initialiser"
            if rules[name] is not skip_param_init:
                found.append((canonical_name(f"{prefix}.{name}"), parameter, rules[name]))
    return found


def retie(part: nn.Module) -> None:
    """Giving storage to a meta model unties its embedding and output weights; tie them again."""
    if getattr(part, "enable_weight_tying", False):
        part.tok_embeddings.weight = part.lm_head.weight  # type: ignore[union-attr]


def reset_buffers(part: nn.Module) -> None:
    """Compute what is no parameter: rope caches, expert biases and counters, keeping their placement."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    from torchtitan.protocols.module import Module

    for module in part.modules():
        if not isinstance(module, Module):
            continue
        placed = {name: buffer for name, buffer in module._buffers.items() if isinstance(buffer, DTensor)}
        module._init_self_buffers(buffer_device=None)
        for name, old in placed.items():
            fresh = module._buffers[name]
            if fresh is not None and not isinstance(fresh, DTensor):
                module._buffers[name] = distribute_tensor(fresh, old.device_mesh, old.placements, src_data_rank=None)
