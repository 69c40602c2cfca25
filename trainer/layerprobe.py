"""Every so many steps, a look at what each layer learns and how each expert is used."""

from __future__ import annotations

import torch.distributed as dist

from configs.models import FAMILIES
from configs.schema import JobConfig
from parallelism.engine import Engine
from parallelism.layers import LayerGauge
from trainer.events import FactKind
from trainer.layers import LayerWatch
from trainer.main import RankContext


class LayerProbe:
    """Looks on every rank and judges on rank 0. After a restart it knows nothing: as it only tells, it tells again."""

    def __init__(self, context: RankContext, config: JobConfig, engine: Engine) -> None:
        self._context = context
        self._numbers = config.numbers
        self._gauge = LayerGauge(config, engine.parts, dist.get_world_size() // config.parallelism.pp)
        self._watch = LayerWatch(FAMILIES[config.model.family][config.model.flavor].top_k)

    def look(self, step: int) -> None:
        """Look, if the step is due; call it between backward and update. Collective."""
        interval = self._numbers.layers_interval_steps
        if not interval or step % interval or step <= self._numbers.warmup_steps:
            return
        seen = self._gauge.look()
        if self._context.rank == 0:
            for finding in self._watch.judge(seen.norms, seen.loads):
                self._context.note(FactKind.NUMBERS_ODD, finding.detail, oddity=finding.oddity)
