"""What converted modules share on a rank: the step, the scales of past steps, and weights that are rounded already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from configs.schema import JobConfig
from parallelism.lowp_recipes import RECIPES, Operand, Rounding
from parallelism.precision import Precision


class Kernel(Protocol):
    """What multiplies. Both are differentiable, and see this rank's part of everything as plain tensors."""

    def linear(self, site: Site, x: Tensor, weight: Tensor, first_column: int) -> Tensor:
        """[T, inputs] and [outputs, inputs] to [T, outputs]. first_column: the first output's number in the whole."""

    def grouped(self, site: Site, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """[T, inputs] and [E, outputs, inputs] to [T, outputs]: rows up to offsets[e] are of expert e or earlier."""


class Site:
    """One converted matrix, or stack of experts' matrices. index: its number in the whole model, on all ranks."""

    def __init__(self, shared: Lowp, index: int, name: str) -> None:
        self.shared = shared
        self.index = index
        self.name = name

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        """Stages of a pipeline are cut from copies of the whole model; what they share must stay one."""
        return self

    @property
    def kernel(self) -> Kernel:
        """What multiplies here."""
        return self.shared.kernel


class Lowp:
    """The low precision of one rank's model.

    recipe: what each operand becomes. reuse: whether rounded weights are kept for the rest of the step.
    """

    def __init__(self, config: JobConfig, precision: Precision, kernel: Kernel, reuse: bool) -> None:
        self.precision = precision
        self.recipe: Mapping[Operand, Rounding] = RECIPES[precision.recipe]
        self.kernel = kernel
        self.reuse = reuse
        self.seed = config.run.seed
        self.step = 0
        self.sites: list[Site] = []
        share = config.training.global_batch_size // config.dp_degree
        self._share_tokens = share * config.training.seq_len // config.parallelism.cp
        self._share = 0
        self._rows: dict[object, int] = {}
        self._weights: dict[object, Any] = {}
        self._history_steps = config.precision.amax_history_steps
        self.history: Tensor | None = None
        self._largest = torch.zeros(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lowp:
        """See `Site`."""
        return self

    def add_site(self, name: str) -> Site:
        """A site for one more converted matrix."""
        self.sites.append(Site(self, len(self.sites), name))
        return self.sites[-1]

    @property
    def delayed(self) -> bool:
        """Whether scales come from past steps, and so are state."""
        return any(rounding.delayed for rounding in self.recipe.values())

    @property
    def history_shape(self) -> tuple[int, ...] | None:
        """Shape of the state, once all sites are known; None if there is none."""
        return (len(self.sites), len(Operand), self._history_steps) if self.delayed else None

    def materialise(self, device: torch.device) -> None:
        """Make the state; all sites are known by now."""
        self._largest = torch.zeros(len(self.sites), len(Operand), device=device)
        if self.history_shape is not None:
            self.history = torch.zeros(self.history_shape, device=device)

    # The step -----------------------------------------------------------------------------------------------------

    def begin(self, step: int, dp_rank: int) -> None:
        """The step, and the dp rank whose share of it is computed next."""
        self.step = step
        self._share = dp_rank * self._share_tokens
        self.forget()

    def forget(self) -> None:
        """Leave nothing of what was computed since the last update; it is computed again, or was no step."""
        self._rows.clear()
        self._weights.clear()
        self._largest.zero_()

    def updated(self) -> None:
        """The weights have changed. Collective over all ranks where scales come from past steps."""
        if self.history is not None:
            reducing = dist.all_reduce(self._largest, dist.ReduceOp.MAX, async_op=True)
            assert reducing is not None
            reducing.wait()
            self.history[:, :, 1:] = self.history[:, :, :-1].clone()
            self.history[:, :, 0] = self._largest
        self.forget()

    # What kernels ask ---------------------------------------------------------------------------------------------

    def amax(self, site: Site, operand: Operand, values: Tensor, record: bool) -> Tensor:
        """What an operand's one scale is made for: its own largest value, or that of past steps if there were any.

        record: note its own for steps to come.
        """
        own = values.detach().abs().amax().float() if values.numel() else values.new_zeros((), dtype=torch.float32)
        if self.history is None:
            return own
        if record:
            place = self._largest[site.index, operand]
            place.copy_(torch.maximum(place, own))
        past = self.history[site.index, operand].amax()
        return torch.where(past > 0, past, own)

    def rows(self, key: object, count: int) -> range:
        """Numbers in the global batch of the next `count` rows whose gradients a site, or an expert of it, rounds."""
        first = self._share + self._rows.get(key, 0)
        self._rows[key] = self._rows.get(key, 0) + count
        return range(first, first + count)

    def weight(self, key: object, make: Callable[[], Any]) -> Any:
        """What `make` makes of a weight, made once a step if weights are reused."""
        if not self.reuse:
            return make()
        if key not in self._weights:
            self._weights[key] = make()
        return self._weights[key]

    def first_use(self, key: object) -> bool:
        """Whether a weight is used for the first time since it changed, for kernels that keep it themselves."""
        first = key not in self._weights
        self._weights[key] = True
        return first or not self.reuse


class ScalesState(Stateful):
    """The largest values of past steps, one tensor for the whole model, the same on every rank and layout."""

    def __init__(self, history: Tensor) -> None:
        self.history = history

    def state_dict(self) -> dict[str, Any]:
        """Name to live tensor: [sites, operands, steps]."""
        return {"amax_history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is left to do: the loader wrote into the live tensor."""
        assert state_dict.keys() == {"amax_history"}


def reuses_weights(config: JobConfig) -> bool:
    """Whether rounded weights are kept over the microbatches of a step.

    A kept weight is whole where FSDP2 keeps a piece: a byte a parameter instead of 1 / dp_shard of four.
    """
    wanted = config.precision.reuse_weights
    return wanted == "on" or (wanted == "auto" and config.parallelism.dp_shard * config.parallelism.cp == 1)
