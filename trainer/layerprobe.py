"""Every so many steps, a look at what each layer learns and how each expert is used."""

from __future__ import annotations

import torch.distributed as dist

from configs.models import FAMILIES
from configs.schema import JobConfig
from parallelism.engine import Engine
from parallelism.layers import LayerGauge
from trainer.events import FactKind
from trainer.layers import Balance, LayerWatch, balance
from trainer.main import RankContext


class LayerProbe:
    """Looks on every rank and judges on rank 0. After a restart it knows nothing: as it only tells, it tells again."""

    def __init__(self, context: RankContext, config: JobConfig, engine: Engine) -> None:
        self._context = context
        self._numbers = config.numbers
        self._gauge = LayerGauge(config, engine.parts, dist.get_world_size() // config.parallelism.pp)
        facts = FAMILIES[config.model.family][config.model.flavor]
        self._has_experts = facts.is_moe
        self._balance: Balance | None = None
        self._watch = LayerWatch(facts.top_k)

    def look(self, step: int) -> None:
        """Look, if the step is due; call it between backward and update. Collective.

        In the first steps nothing is judged, but the load of experts is looked at all the same.
        """
        interval = self._numbers.layers_interval_steps
        judged = step > self._numbers.warmup_steps
        if not interval or step % interval or not (judged or self._has_experts):
            return
        seen = self._gauge.look()
        self._balance = balance(seen.loads)
        if judged and self._context.rank == 0:
            for finding in self._watch.judge(seen.norms, seen.loads):
                self._context.note(FactKind.NUMBERS_ODD, finding.detail, oddity=finding.oddity)

    def take_balance(self) -> Balance | None:
        """How experts were used at the last look, once; None if there was none since."""
        found, self._balance = self._balance, None
        return found
