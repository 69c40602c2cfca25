"""config.json of the transformers model that computes what a torchtitan model computes.

Rope settings are written the way that transformers 4 reads and 5 still understands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from configs.models import FAMILIES
from configs.schema import JobConfig

HfValue = None | bool | int | float | str | Sequence["HfValue"] | Mapping[str, "HfValue"]


def hf_config(config: JobConfig, model: Any) -> dict[str, HfValue]:
    """The fields, from torchtitan's config tree of the model (after overrides). torch_dtype is the caller's to add.

    Raises:
        ValueError: no transformers model computes the same.
    """
    longest = FAMILIES[config.model.family][config.model.flavor].max_seq_len
    common = _common(model, longest)
    if config.model.family == "llama3":
        return common | _llama3(model)
    if config.model.family == "deepseek_v3":
        return common | _deepseek_v3(config, model)
    return common | (_qwen3_moe(config, model) if model.layers[0].moe is not None else _qwen3(model))


def _common(model: Any, longest: int) -> dict[str, HfValue]:
    rope = model.first_attention.rope
    epsilons = {model.norm.eps, *(norm.eps for x in model.layers for norm in (x.attention_norm, x.ffn_norm))}
    if len(epsilons) > 1:
        raise ValueError(f"norms of this flavour differ in eps ({sorted(epsilons)}), which config.json cannot say")
    return {
        "hidden_size": model.dim,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": model.first_attention.n_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": longest,
        "rms_norm_eps": model.norm.eps,
        "tie_word_embeddings": bool(model.enable_weight_tying),
        "rope_theta": float(rope.theta),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def _grouped_heads(model: Any) -> dict[str, HfValue]:
    attention = model.first_attention
    return {
        "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
        "head_dim": attention.head_dim or model.dim // attention.n_heads,
    }


def _llama3(model: Any) -> dict[str, HfValue]:
    rope = model.first_attention.rope
    fields: dict[str, HfValue] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": model.layers[0].feed_forward.w1.out_features,
        "mlp_bias": False,
        **_grouped_heads(model),
    }
    if rope.scaling == "llama":
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": rope.scaling_factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    return fields


def _qwen3(model: Any) -> dict[str, HfValue]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": model.layers[0].feed_forward.w1.out_features,
        "use_sliding_window": False,
        **_grouped_heads(model),
    }


def _qwen3_moe(config: JobConfig, model: Any) -> dict[str, HfValue]:
    moe = model.layers[0].moe
    if (moe.router.score_func, moe.router.route_scale, moe.router.num_expert_groups) != ("softmax", 1.0, None):
        raise ValueError(f"qwen3 {config.model.flavor}: Qwen3MoeForCausalLM has plain softmax routing only")
    width = moe.routed_experts.inner_experts.hidden_dim
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": moe.router.route_norm,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        **_grouped_heads(model),
    }


def _deepseek_v3(config: JobConfig, model: Any) -> dict[str, HfValue]:
    attention, moe = model.first_attention, model.layers[-1].moe
    if moe.router.score_func != "sigmoid":
        raise ValueError(
            f"deepseek_v3 {config.model.flavor} routes by {moe.router.score_func}, and DeepseekV3ForCausalLM by "
            "sigmoid only: no transformers model computes the same; export it with --format dcp"
        )
    dense = sum(layer.moe is None for layer in model.layers)
    width = moe.routed_experts.inner_experts.hidden_dim
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "intermediate_size": model.layers[0].feed_forward.w1.out_features if dense else width,
        "moe_intermediate_size": width,
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank or None,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_experts.w1.out_features // width,
        "num_experts_per_tok": moe.router.top_k,
        "n_group": moe.router.num_expert_groups or 1,
        "topk_group": moe.router.num_limited_groups or 1,
        "norm_topk_prob": moe.router.route_norm,
        "routed_scaling_factor": moe.router.route_scale,
        "first_k_dense_replace": dense,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
        "rope_scaling": _yarn(attention),
    }


def _yarn(attention: Any) -> dict[str, HfValue] | None:
    """torchtitan scales the softmax and never the rotation; equal mscales make transformers do just that."""
    rope = attention.rope
    if rope.scaling != "yarn" or rope.rope_factor <= 1.0:
        return None
    return {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": rope.rope_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": attention.mscale,
        "mscale_all_dim": attention.mscale,
        "original_max_position_embeddings": rope.original_seq_len,
        "truncate": rope.truncate,
    }
