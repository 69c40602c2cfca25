"""`python -m benchmarks.recovery`: from SIGKILL of one worker to the next finished step, against torchrun."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.common import JOB, console, show, small_corpus, tail, wait_for_quiet, wait_until, workspace
from benchmarks.recovery_sides import Everstep, Recovery, Side, Step, Torchrun, kill_and_recover
from benchmarks.results import Result, Series, machine, now, ratio, series, settings, versions, write_result
from trainer.main import PRELOAD

RANKS = 2
SETTLE_STEPS = 8
SETTLE_S = 2.0
TIMEOUT_S = 60.0
MODEL = {
    "layers": 6, "vocab_size": 2048, "steps": 100_000, "seq_len": 64, "global_batch_size": 8, "microbatch_size": 4,
    "ranks": RANKS,
}  # fmt: skip

NOTES = (
    "first step: the first one that the new workers finish, which may repeat a finished one; new step: the first that "
    "had not been finished before the kill, so training is past the step that was in flight.",
    "torchrun at its best: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (without it restarts on gloo hang), a monitor interval "
    "of 20 ms as everstep's, torch's distributed checkpoint of every step in shared memory, byte code cached. "
    "everstep keeps every step in shared memory too, with checksums, and every 10th on disk.",
    "limit: a step cannot take less than a step, and a process that is warm has to be forked.",
)


@dataclass
class Samples:
    """What was measured of one side."""

    recoveries: list[Recovery] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    failures: int = 0


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4, help="jobs a side, in turn")
    parser.add_argument("--kills", type=int, default=3, help="kills in each job")
    parser.add_argument("--saver", choices=("save", "async"), default="save", help="how torchrun's side saves")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for a quiet machine")
    options = parser.parse_args()
    if not options.no_wait:
        wait_for_quiet()
    here, taken_at, began_s = machine(), now(), time.monotonic()
    dice = random.Random(1)
    with workspace("recovery") as place:
        corpus = small_corpus(place.disk / "corpus")
        job = place.disk / "job.toml"
        job.write_text(JOB.format(corpus=corpus, **MODEL))
        sides: list[Side] = [Everstep(place, job, RANKS), Torchrun(place, job, RANKS, options.saver)]
        samples = {side.name: Samples() for side in sides}
        for block in range(options.blocks):
            for side in sides:
                _block(side, samples[side.name], options.kills, block, dice)
        fork_s = _fork_times()
    for name, sample in samples.items():
        if not sample.recoveries:
            raise SystemExit(f"{name} never recovered: nothing to compare")
    found = [*_series("everstep", samples["everstep"]), *_series("torchrun", samples["torchrun"])]
    found.append(series("limit", "one step, undisturbed (everstep)", "s", samples["everstep"].step_s))
    found.append(series("limit", "fork of a warm process", "s", fork_s))
    result = Result(
        benchmark="recovery",
        taken_at=taken_at,
        seconds=round(time.monotonic() - began_s, 1),
        machine=here,
        versions=versions(),
        settings=settings({**MODEL, "blocks": options.blocks, "kills": options.kills, "saver": options.saver,
                           "failures everstep": samples["everstep"].failures,
                           "failures torchrun": samples["torchrun"].failures}),
        series=tuple(found),
        ratios=tuple(
            ratio(f"{name}, everstep of torchrun", _named(found, "everstep", name), _named(found, "torchrun", name))
            for name in ("kill to new step", "kill to first step")
        ),
        notes=NOTES,
    )  # fmt: skip
    show(result)
    console.print(f"written to {write_result(result)}")


def _block(side: Side, into: Samples, kills: int, block: int, dice: random.Random) -> None:
    """One job: start it, kill it several times, stop it."""
    began_s = time.time()
    side.start()
    try:
        wait_until(lambda: bool(side.steps()), f"{side.name}'s first step", TIMEOUT_S)
        into.start_s.append(side.steps()[0].t_wall_s - began_s)
        for kill in range(kills):
            life = side.steps()[-1].life
            wait_until(lambda life=life: _settled(side.steps(), life), f"steps of {side.name}", TIMEOUT_S)  # type: ignore[misc]
            step_s = _plain_steps(side.steps(), life)
            into.step_s.extend(step_s)
            recovery = kill_and_recover(
                side, (block + kill) % RANKS, dice.uniform(0.0, 2.0) * statistics.median(step_s), TIMEOUT_S
            )
            into.recoveries.append(recovery)
            console.print(
                f"{side.name}: new step after {recovery.new_step_s:.2f} s, first after {recovery.first_step_s:.2f} s, "
                f"{recovery.repeated} repeated; "
                + ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in recovery.phases.items()) + " ms",
                highlight=False,
            )  # fmt: skip
    except TimeoutError as error:
        into.failures += 1
        console.print(f"[bold red]{error}[/]; its last lines:")
        console.print(tail(side.log), markup=False, highlight=False)
    finally:
        side.stop()


def _settled(steps: Sequence[Step], life: int) -> bool:
    mine = [step for step in steps if step.life == life]
    return len(mine) >= SETTLE_STEPS and time.time() - mine[0].t_wall_s >= SETTLE_S


def _plain_steps(steps: Sequence[Step], life: int) -> list[float]:
    """Times between the later finished steps of a life, seconds; the first ones are slower."""
    ends = [step.t_wall_s for step in steps if step.life == life][SETTLE_STEPS // 2 :]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _fork_times(count: int = 20) -> list[float]:
    """From asking a warm fork server for a process to that process' end, seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    times = []
    for _ in range(count + 1):
        began_s = time.monotonic()
        process = context.Process(target=time.monotonic)
        process.start()
        process.join()
        times.append(time.monotonic() - began_s)
    return times[1:]


def _series(side: str, samples: Samples) -> list[Series]:
    recoveries = samples.recoveries
    found = [
        series(side, "kill to new step", "s", [each.new_step_s for each in recoveries]),
        series(side, "kill to first step", "s", [each.first_step_s for each in recoveries]),
    ]
    for phase in recoveries[0].phases:
        found.append(series(side, f"  {phase}", "s", [each.phases[phase] for each in recoveries]))
    found.append(series(side, "finished steps repeated", "steps", [each.repeated for each in recoveries]))
    found.append(series(side, "generations a recovery took", "steps", [each.lives for each in recoveries]))
    found.append(series(side, "one step, undisturbed", "s", samples.step_s))
    found.append(series(side, "start of the job to its first step", "s", samples.start_s))
    return found


def _named(found: Sequence[Series], side: str, name: str) -> Series:
    return next(each for each in found if (each.side, each.name) == (side, name))


if __name__ == "__main__":
    main()
