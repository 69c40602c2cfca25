"""Which parameter is updated how: a pure function of the configuration, the parameter's name and its number of dims.

So there is nothing to save of it: a resumed run, on any layout, and every export work it out again from config.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from configs.errors import did_you_mean
from configs.schema import OptimizerConfig

_ADAMW_STATE = ("exp_avg", "exp_avg_sq")
_MUON_STATE = ("momentum_buffer",)
# Words of optimizer.no_decay; anything else there, and in muon_except, is a pattern of names.
_VECTORS, _EMBEDDINGS = "vectors", "embeddings"
_EMBEDDING_NAME, _HEAD_NAME = "tok_embeddings.weight", "lm_head.weight"
_SHOWN_NAMES = 3


@dataclass(frozen=True)
class UpdateRule:
    """How one parameter is updated: by Muon or by AdamW."""

    weight_decay: float
    muon: bool = False

    @property
    def state(self) -> tuple[str, ...]:
        """What the optimizer keeps of the parameter: names of tensors that are laid out like it."""
        return _MUON_STATE if self.muon else _ADAMW_STATE


def rule_of(config: OptimizerConfig, name: str, dims: int) -> UpdateRule:
    """The rule for the parameter with this canonical name and so many dims."""
    spared = any(_matches(pattern, name, dims) for pattern in config.no_decay)
    muon = (
        config.name == "muon"
        and dims >= 2
        and name not in (_EMBEDDING_NAME, _HEAD_NAME)
        and not any(fnmatchcase(name, pattern) for pattern in config.muon_except)
    )
    return UpdateRule(0.0 if spared else config.weight_decay, muon)


def check_patterns(config: OptimizerConfig, dims: Mapping[str, int]) -> None:
    """See that every pattern means something. dims: number of dims of every parameter of the whole model, by name.

    Raises:
        ValueError: a pattern matches no parameter; the message has names that it might have meant.
    """
    for pattern in config.no_decay:
        if pattern not in (_VECTORS, _EMBEDDINGS):
            _check_pattern("no_decay", pattern, dims, (_VECTORS, _EMBEDDINGS))
    for pattern in config.muon_except:
        _check_pattern("muon_except", pattern, dims, ())


def _check_pattern(key: str, pattern: str, dims: Mapping[str, int], words: tuple[str, ...]) -> None:
    if any(fnmatchcase(name, pattern) for name in dims):
        return
    near = did_you_mean(pattern, [*words, *dims])
    examples = [near] if near else list(dims)[:_SHOWN_NAMES]
    choices = "".join(f'"{word}", ' for word in words)
    raise ValueError(
        f'optimizer.{key}: "{pattern}" matches no parameter; give {choices}a name, or a pattern of names like '
        f"{', '.join(examples)} (* stands for anything), or remove it"
    )


def _matches(pattern: str, name: str, dims: int) -> bool:
    if pattern == _VECTORS:
        return dims < 2
    return name == _EMBEDDING_NAME if pattern == _EMBEDDINGS else fnmatchcase(name, pattern)
