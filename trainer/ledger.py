"""The sample ledger: which samples each step really read, so that "exactly once" can be checked after the fact.

`<run>/samples/dp-<rank>.jsonl` gets a line a step. A step that is done again after a failure is written again under
its new generation; the newest generation's lines are the ones that count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from trainer.events import LineFile
from trainer.history import Ranges, batch_of


class LedgerLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One rank's samples of one step: global sample numbers first .. first + count, digest of their token bytes.

    passed: ranges (first, count) of global sample numbers that the whole job left out just before this step. skipped:
    the samples were read, and the update that came of them was not applied.
    """

    step: int
    generation: int
    dp_rank: int
    first: int
    count: int
    digest: str
    passed: Ranges = ()
    skipped: bool = False


def samples_dir(run_dir: Path) -> Path:
    """Folder of the ledger's files."""
    return run_dir / "samples"


class SampleLedger:
    """The lines of one data-parallel rank. One process writes it at a time.

    Append a step's line before its update is applied or snapshotted: a step that counts is then written, unless the
    disk was full until the process died.
    """

    def __init__(self, run_dir: Path, dp_rank: int, generation: int) -> None:
        """Open for appending; ends a line that an earlier writer left cut off."""
        samples_dir(run_dir).mkdir(parents=True, exist_ok=True)
        self._path = samples_dir(run_dir) / f"dp-{dp_rank}.jsonl"
        self._file = LineFile(self._path)
        self._dp_rank = dp_rank
        self._generation = generation

    def append(
        self, step: int, first: int, count: int, digest: str, passed: Ranges = (), skipped: bool = False
    ) -> OSError | None:
        """Write down what this rank reads in a step; on a full disk the line waits in memory, and why is returned.

        A second line of the same step replaces the first: its update turned out to be `skipped`.
        """
        line = LedgerLine(
            step=step, generation=self._generation, dp_rank=self._dp_rank, first=first, count=count, digest=digest,
            passed=passed, skipped=skipped,
        )  # fmt: skip
        return self._file.keep(line)


def committed_samples(run_dir: Path) -> dict[int, tuple[LedgerLine, ...]]:
    """For each step the lines of the last generation that did it, ordered by first sample.

    Ranks that only an older generation had (the layout shrank) do not count. A cut-off line is left out: were it one
    that counts, `check_exactly_once` finds its samples missing.
    """
    by_step: defaultdict[int, dict[int, LedgerLine]] = defaultdict(dict)
    for path in sorted(samples_dir(run_dir).glob("dp-*.jsonl")):
        for line in _whole_lines(path):
            known = by_step[line.step]
            newest = max((other.generation for other in known.values()), default=line.generation)
            if line.generation > newest:
                known.clear()
            if line.generation >= newest:
                known[line.dp_rank] = line
    return {step: tuple(sorted(by_step[step].values(), key=lambda line: line.first)) for step in sorted(by_step)}


def _whole_lines(path: Path) -> Iterator[LedgerLine]:
    decoder = msgspec.json.Decoder(LedgerLine)
    for raw in path.read_bytes().split(b"\n"):
        try:
            line = decoder.decode(raw)
        except msgspec.DecodeError:
            continue
        yield line


def check_exactly_once(
    samples: Mapping[int, Sequence[LedgerLine]], steps: int, global_batch: int, left_out: Ranges = ()
) -> None:
    """Prove that steps 1 .. steps read every global sample number exactly once. Later steps are not looked at.

    left_out: ranges (first, count) of batches, as `trainer.history.union` puts them, that no step may have read.

    Raises:
        ValueError: naming the first step whose samples are missing, doubled, or not its own.
    """
    for step in range(1, steps + 1):
        expected = (batch_of(step, left_out) - 1) * global_batch
        end = expected + global_batch
        lines = sorted(samples.get(step, ()), key=lambda line: line.first)
        if not lines:
            raise ValueError(f"step {step}: no rank wrote down its samples")
        for line in lines:
            if line.first != expected:
                fault = "missing" if line.first > expected else "read twice, or by a wrong step,"
                at = min(line.first, expected)
                raise ValueError(f"step {step}: samples from {at} are {fault} before dp rank {line.dp_rank}'s")
            expected += line.count
        if expected != end:
            raise ValueError(f"step {step}: its samples end before {expected}, not before {end}")
