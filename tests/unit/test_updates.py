"""Promise: each parameter is decayed as the rule says; a pattern that means nothing is refused with names that do."""

from __future__ import annotations

import msgspec
import pytest
import torch

from configs.schema import OptimizerConfig
from parallelism.optimizer import build_optimizer
from parallelism.updates import check_patterns, rule_of
from tests.unit import stories

DIMS = {
    "tok_embeddings.weight": 2,
    "layers.0.attention.qkv_linear.wqkv.weight": 2,
    "layers.0.attention_norm.weight": 1,
    "layers.0.moe.router.gate.weight": 2,
    "layers.0.moe.routed_experts.inner_experts.w1_EFD": 3,
    "norm.weight": 1,
    "lm_head.weight": 2,
}


def decayed(**changes: object) -> set[str]:
    config = msgspec.structs.replace(OptimizerConfig(weight_decay=0.3), **changes)
    check_patterns(config, DIMS)
    decays = {name: rule_of(config, name, dims).weight_decay for name, dims in DIMS.items()}
    assert set(decays.values()) <= {0.0, 0.3}
    return {name for name, decay in decays.items() if decay}


def test_norms_and_embeddings_are_spared_by_default_and_nothing_else() -> None:
    spared = {"tok_embeddings.weight", "layers.0.attention_norm.weight", "norm.weight"}
    assert decayed() == DIMS.keys() - spared
    assert decayed(no_decay=()) == DIMS.keys()
    assert decayed(no_decay=("embeddings",)) == DIMS.keys() - {"tok_embeddings.weight"}


def test_patterns_spare_what_they_match() -> None:
    assert decayed(no_decay=("*.router.*", "lm_head.weight")) == DIMS.keys() - {
        "layers.0.moe.router.gate.weight",
        "lm_head.weight",
    }
    assert decayed(weight_decay=0.0) == set()


def test_muon_takes_hidden_matrices_and_stacks_of_them() -> None:
    """Embeddings, head and vectors stay with AdamW, as does what muon_except names."""
    config = OptimizerConfig(name="muon", muon_except=("*.router.gate.weight",))
    check_patterns(config, DIMS)
    rules = {name: rule_of(config, name, dims) for name, dims in DIMS.items()}
    assert {name for name, rule in rules.items() if rule.muon} == {
        "layers.0.attention.qkv_linear.wqkv.weight",
        "layers.0.moe.routed_experts.inner_experts.w1_EFD",
    }
    assert {rule.state for rule in rules.values() if rule.muon} == {("momentum_buffer",)}
    assert {rule.state for rule in rules.values() if not rule.muon} == {("exp_avg", "exp_avg_sq")}
    assert not any(rule_of(OptimizerConfig(), name, dims).muon for name, dims in DIMS.items())
    with pytest.raises(ValueError, match=r'muon_except: "\*\.gate" matches no parameter'):
        check_patterns(OptimizerConfig(muon_except=("*.gate",)), DIMS)


@pytest.mark.parametrize(
    ("pattern", "offered"), [("lm_haed.weight", "lm_head.weight"), ("vector", "vectors"), ("*.bias", "tok_embeddings")]
)
def test_a_pattern_that_matches_nothing_is_refused_with_names_that_exist(pattern: str, offered: str) -> None:
    with pytest.raises(ValueError, match=offered) as refused:
        check_patterns(OptimizerConfig(no_decay=("vectors", pattern)), DIMS)
    assert f'optimizer.no_decay: "{pattern}" matches no parameter' in str(refused.value)


class _Small(torch.nn.Module):
    """Three parameters of different fates, under the names that a model gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = torch.nn.Embedding(4, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.lm_head = torch.nn.Linear(4, 4)


def test_an_update_decays_what_the_rule_says() -> None:
    """Without gradients to speak of, decayed weights shrink by lr times decay and spared ones stay."""
    config = msgspec.structs.replace(stories.job(), optimizer=OptimizerConfig(weight_decay=0.5))
    model = _Small()
    optimizer = build_optimizer(config, [model])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, parameter in model.named_parameters():
        left = 0.95 if name == "lm_head.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), left * before[name])
