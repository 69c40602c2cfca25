"""Promise: the table of flavours says what torchtitan builds."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest

from configs.models import FAMILIES
from configs.schema import ModelConfig

FLAVORS = [(family, flavor) for family, flavors in FAMILIES.items() for flavor in flavors]


def registry(family: str) -> dict[str, Callable[..., Any]]:
    """torchtitan's builders of configurations; building one allocates no weights."""
    if family == "llama3":
        from torchtitan.models.llama3 import llama3_configs

        return llama3_configs
    if family == "deepseek_v3":
        from torchtitan.models.deepseek_v3 import deepseekv3_configs

        return deepseekv3_configs
    from torchtitan.models.qwen3 import qwen3_configs

    return qwen3_configs


def build_config(family: str, flavor: str) -> Any:
    builder = registry(family)[flavor]
    moe = {"moe_comm_backend": "standard"} if "moe_comm_backend" in inspect.signature(builder).parameters else {}
    return builder(attn_backend="flex", **moe)


def test_families_are_those_of_the_schema() -> None:
    assert set(FAMILIES) == set(get_args(get_type_hints(ModelConfig)["family"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_flavour_of_the_registry_is_known(family: str) -> None:
    assert set(FAMILIES[family]) == set(registry(family))


@pytest.mark.parametrize(("family", "flavor"), FLAVORS)
def test_facts_match_the_registry(family: str, flavor: str) -> None:
    facts, config = FAMILIES[family][flavor], build_config(family, flavor)
    last = config.layers[-1]
    assert facts.n_layers == len(config.layers)
    assert facts.dim == config.dim
    assert facts.vocab_size == config.vocab_size
    assert facts.n_heads == last.attention.n_heads
    assert facts.n_kv_heads == (getattr(last.attention, "n_kv_heads", None) or last.attention.n_heads)
    assert facts.max_seq_len == last.attention.rope.max_seq_len
    assert facts.tied_embeddings == config.enable_weight_tying
    assert facts.n_dense_layers == sum(layer.moe is None for layer in config.layers)
    assert facts.n_experts == (last.moe.num_experts if last.moe else 0)
    assert facts.top_k == (last.moe.router.top_k if last.moe else 0)


@pytest.mark.parametrize(("family", "flavor"), [pair for pair in FLAVORS if pair[1].startswith("debugmodel")])
def test_parameter_counts_of_small_models_are_exact(family: str, flavor: str) -> None:
    import torch

    with torch.device("meta"):
        model = build_config(family, flavor).build()
    assert FAMILIES[family][flavor].n_params == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("family", "flavor"), [pair for pair in FLAVORS if pair[1][0].isdigit()])
def test_parameter_counts_of_big_models_agree_with_their_names(family: str, flavor: str) -> None:
    """`8B` is 8.03 billion; the loosest name is Llama's 1B, 1.24 billion."""
    named = re.match(r"[\d.]+", flavor)
    assert named is not None
    assert FAMILIES[family][flavor].n_params == pytest.approx(float(named[0]) * 1e9, rel=0.25)
