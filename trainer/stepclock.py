"""A rank's clock from its start to its agent: times each step, and leaves what it found in the node's memory."""

from __future__ import annotations

import contextlib
import dataclasses

from parallelism.clock import running_clock
from parallelism.engine import Engine
from trainer.events import StepTimes
from trainer.main import RankContext
from trainer.paths import times_path
from trainer.timings import TimesFile


class StepClock:
    """Publishes what an engine's clock says. Without a file there is nothing to publish, and no clock runs."""

    def __init__(self, engine: Engine, context: RankContext, file: TimesFile | None) -> None:
        self.clock = engine.clock
        self._context = context
        self._file = file

    def finish(self) -> None:
        """A step ended, its snapshot included."""
        split = self.clock.finish()
        if split is not None and self._file is not None:
            times = StepTimes(**dataclasses.asdict(split))
            self._file.write(self._context.local_rank, self._context.start.generation, times)


def start_clock(engine: Engine, context: RankContext, on: bool, stack: contextlib.ExitStack) -> StepClock:
    """Have the engine's clock run until the stack closes, if it is `on` (health.probe_steps)."""
    if not on:
        return StepClock(engine, context, None)
    engine.clock = stack.enter_context(running_clock(engine.device, engine.parts if engine.schedule else ()))
    file = TimesFile(times_path(context.ram_dir), context.heart.slots.local_ranks).open()
    stack.callback(file.close)
    return StepClock(engine, context, file)
