"""Which parameter is updated how: a pure function of the configuration, the parameter's name and its number of dims.

So there is nothing to save of it: a resumed run, on any layout, and every export work it out again from config.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from configs.errors import did_you_mean
from configs.schema import OptimizerConfig

ADAMW_STATE = ("exp_avg", "exp_avg_sq")
# Words of optimizer.no_decay; anything else there is a pattern of names.
_VECTORS, _EMBEDDINGS = "vectors", "embeddings"
_EMBEDDING_NAME = "tok_embeddings.weight"
_SHOWN_NAMES = 3


@dataclass(frozen=True)
class UpdateRule:
    """How one parameter is updated. state: what the optimizer keeps of it, tensors laid out like the parameter."""

    weight_decay: float
    state: tuple[str, ...] = ADAMW_STATE


def rule_of(config: OptimizerConfig, name: str, dims: int) -> UpdateRule:
    """The rule for the parameter with this canonical name and so many dims."""
    spared = any(_matches(pattern, name, dims) for pattern in config.no_decay)
    return UpdateRule(0.0 if spared else config.weight_decay)


def check_patterns(config: OptimizerConfig, dims: Mapping[str, int]) -> None:
    """See that every pattern means something. dims: number of dims of every parameter of the whole model, by name.

    Raises:
        ValueError: a pattern matches no parameter; the message has names that it might have meant.
    """
    for pattern in config.no_decay:
        if pattern in (_VECTORS, _EMBEDDINGS) or any(fnmatchcase(name, pattern) for name in dims):
            continue
        near = did_you_mean(pattern, [_VECTORS, _EMBEDDINGS, *dims])
        examples = [near] if near else list(dims)[:_SHOWN_NAMES]
        raise ValueError(
            f'optimizer.no_decay: "{pattern}" matches no parameter; give "{_VECTORS}", "{_EMBEDDINGS}" or a pattern '
            f"of names like {', '.join(examples)} (* stands for anything), or remove it"
        )


def _matches(pattern: str, name: str, dims: int) -> bool:
    if pattern == _VECTORS:
        return dims < 2
    return name == _EMBEDDING_NAME if pattern == _EMBEDDINGS else fnmatchcase(name, pattern)
