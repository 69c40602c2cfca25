"""Which recipe this rank computes in, and with what: the configuration held against the card and what is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass

import torch

from configs.precision import LOW, Capability
from configs.schema import JobConfig

_PACKAGES = {"te": "transformer_engine", "torchao": "torchao"}


@dataclass(frozen=True)
class Card:
    """What a rank computes on. capability: None for what is no NVIDIA GPU; name: for a person."""

    name: str
    capability: Capability | None
    gpu: bool = True


@dataclass(frozen=True)
class Precision:
    """What a rank computes in. recipe: never `auto`. backend: "" where nothing is converted. param_dtype: fp32 or bf16,
    of all else."""

    recipe: str
    backend: str
    param_dtype: str

    @property
    def low(self) -> bool:
        """Whether modules are converted."""
        return bool(self.backend)


def card_of(device: torch.device) -> Card:
    """The card behind a device."""
    if device.type != "cuda":
        return Card(f"this {device.type.upper()}", None, gpu=False)
    if torch.version.hip:
        return Card(torch.cuda.get_device_name(device), None)
    return Card(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def installed() -> frozenset[str]:
    """Backends whose packages are there; whether they can be loaded is another matter."""
    found = {backend for backend, package in _PACKAGES.items() if importlib.util.find_spec(package) is not None}
    return frozenset({*found, "emulated"})


def choose(config: JobConfig, card: Card, backends: Collection[str]) -> Precision:
    """What to compute in. backends: see `installed`.

    Raises:
        ValueError: this card, or what is installed, cannot do what is asked for; the text says what to set instead.
    """
    wanted = config.precision
    full = "bf16" if card.gpu else "fp32"
    if wanted.recipe not in LOW:
        named: str = wanted.recipe if wanted.recipe != "auto" else wanted.param_dtype
        recipe = full if named == "auto" else named
        return Precision(recipe, "", recipe)
    backend = wanted.backend if wanted.backend != "auto" else _best(config, card, backends)
    _check(config, card, backends, backend)
    return Precision(wanted.recipe, backend, full if wanted.param_dtype == "auto" else wanted.param_dtype)


def _best(config: JobConfig, card: Card, backends: Collection[str]) -> str:
    """On a GPU never the emulation: it would be slower than bf16, which nobody who asks for a recipe can want."""
    if not card.gpu:
        return "emulated"
    facts = LOW[config.precision.recipe]
    fast = [each for each in facts.backends if each != "emulated"]
    if config.training.compile:
        fast = [each for each in fast if each == "torchao"]
    for backend in fast:
        if backend in backends:
            return backend
    if fast:
        return fast[0]
    raise ValueError(
        f"training.compile = true: nothing that computes {config.precision.recipe} can be traced as a whole; set "
        "training.compile = false"
    )


def _check(config: JobConfig, card: Card, backends: Collection[str], backend: str) -> None:
    recipe = config.precision.recipe
    facts = LOW[recipe]
    if backend == "emulated":
        if config.training.compile:
            raise ValueError(
                f"training.compile = true: the emulation of {recipe} cannot be traced; set training.compile = false"
            )
        return
    if card.capability is None and (card.gpu or backend == "te"):
        raise ValueError(
            f'precision.recipe = "{recipe}" with precision.backend = "{backend}": needs an NVIDIA GPU, which '
            f'{card.name} is not; set precision.backend = "emulated", or precision.recipe = "bf16"'
        )
    if card.capability is not None:
        too_old = card.capability < facts.capability
        too_new = facts.before is not None and card.capability >= facts.before
        if too_old or too_new:
            least, has = _dotted(facts.capability), _dotted(card.capability)
            bound = f" and below {_dotted(facts.before)}" if facts.before else ""
            others = [name for name, each in LOW.items() if _fits(card.capability, name) and each.bits >= facts.bits]
            fix = " or ".join(f'"{name}"' for name in [*others, "bf16"])
            raise ValueError(
                f'precision.recipe = "{recipe}": needs a card of compute capability {least}{bound}, and {card.name} '
                f"has {has}; set precision.recipe = {fix}"
            )
    if backend not in backends:
        raise ValueError(
            f'precision.recipe = "{recipe}" with precision.backend = "{backend}": {_PACKAGES[backend]} is not '
            f'installed; install it (docs/precision.md says how), or set precision.recipe = "bf16"'
        )


def _fits(capability: Capability, recipe: str) -> bool:
    facts = LOW[recipe]
    return facts.capability <= capability and (facts.before is None or capability < facts.before)


def _dotted(capability: Capability | None) -> str:
    return "" if capability is None else ".".join(map(str, capability))
