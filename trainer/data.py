"""A rank's batches: the samples that the sampler names, read from the indexed sets, ahead of time."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from configs.schema import DataConfig, JobConfig
from trainer.history import Ranges, batch_of, passed_over
from trainer.indexed import IndexedCorpus, Tokens
from trainer.prepared import file_digest, is_whole, read_info
from trainer.sampler import Blend, EpochOrder, epoch_order, step_samples, windows_per_epoch


@dataclass(frozen=True)
class StepBatch:
    """What one data-parallel rank trains on in one step.

    Attributes:
        batch: position in the job's stream of batches; the step's number if nothing before it was left out.
        passed: ranges (first, count) of global sample numbers, of all ranks, that were left out just before it.
        tokens: int64 [local_batch, seq_len + 1]; inputs are [:, :-1], labels [:, 1:].
        first: global sample number of the first row; rows are consecutive.
        count: local_batch.
        digest: xxh3 of the token bytes (little-endian int64), hexadecimal.
    """

    step: int
    batch: int
    passed: Ranges
    tokens: Tokens
    first: int
    count: int
    digest: str


def document_positions(tokens: Tokens, eod_id: int) -> Tokens:
    """Position of every input token in its document, int64 [B, S] for tokens [B, S + 1]; 0 follows each EOD."""
    inputs = tokens[:, :-1]
    places = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int64), inputs.shape)
    begins = np.zeros(inputs.shape, dtype=bool)
    begins[:, 1:] = inputs[:, :-1] == eod_id
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)


class SetReader:
    """Samples of one set by number, for ever: sample i is window i mod W of epoch i div W.

    Holds the order of the two epochs used last: 8 bytes for each document and window, and 8 more a document.
    """

    def __init__(self, corpus: IndexedCorpus, seq_len: int, seed: int, set_index: int) -> None:
        """Raises ValueError when the set does not fill one window."""
        self.windows = windows_per_epoch(corpus.tokens, seq_len)
        if self.windows == 0:
            raise ValueError(
                f"{corpus.prefix} has {corpus.tokens} tokens, fewer than one sample of training.seq_len + 1 = "
                f"{seq_len + 1}; prepare more text or lower training.seq_len"
            )
        self._corpus = corpus
        self._seq_len = seq_len
        self._key = (seed, set_index)
        self._orders: dict[int, EpochOrder] = {}

    def read_into(self, out: Tokens, number: int) -> None:
        """Fill `out` [seq_len + 1] with sample `number`."""
        epoch, position = divmod(number, self.windows)
        start = 0
        for piece in self._order(epoch).pieces(position):
            self._corpus.read_into(out[start : start + piece.length], piece.document, piece.offset)
            start += piece.length

    def _order(self, epoch: int) -> EpochOrder:
        order = self._orders.pop(epoch, None)
        if order is None:
            order = epoch_order(self._corpus.lengths, self._seq_len, *self._key, epoch)
        self._orders[epoch] = order
        while len(self._orders) > 2:
            del self._orders[next(iter(self._orders))]
        return order


class StepReader:
    """Reads any step of a job, in any order: a pure function of the configuration, what is left out, and the step."""

    def __init__(
        self, config: JobConfig, dp_rank: int, dp_degree: int, vocab_size: int = 0, left_out: Ranges = ()
    ) -> None:  # fmt: skip
        """Map the sets.

        Args:
            left_out: positions of batches that no step reads, as `trainer.history.union` puts them.
            vocab_size: the model's; 0 takes model.vocab_size, which is 0 itself if the flavour's own is used.

        Raises:
            ValueError: a set is missing, damaged, too short, or made for another vocabulary or tokenizer; the global
                batch does not divide by dp_degree.
        """
        self._global_batch = config.training.global_batch_size
        if self._global_batch % dp_degree:
            raise ValueError(
                f"training.global_batch_size = {self._global_batch} does not divide by the {dp_degree} data-parallel "
                "ranks; make it a multiple"
            )
        self._dp_rank, self._dp_degree = dp_rank, dp_degree
        self._left_out = left_out
        self._seq_len = config.training.seq_len
        self._vocab_size = vocab_size or config.model.vocab_size
        self._prefixes = [Path(data_set.path) for data_set in config.data.sets]
        for prefix in self._prefixes:
            _check_facts(prefix, config.data, self._vocab_size)
        self._blend = Blend([data_set.weight for data_set in config.data.sets])
        self._sets = [
            SetReader(IndexedCorpus(prefix), self._seq_len, config.run.seed, set_index)
            for set_index, prefix in enumerate(self._prefixes)
        ]

    def read(self, step: int) -> StepBatch:
        """The rank's part of a step; steps count from 1.

        Raises:
            ValueError: a token is not in the vocabulary.
        """
        batch, size = batch_of(step, self._left_out), self._global_batch
        passed = tuple(((first - 1) * size, count * size) for first, count in passed_over(step, self._left_out))
        samples = step_samples(batch, size, self._dp_rank, self._dp_degree)
        tokens = np.empty((len(samples), self._seq_len + 1), dtype="<i8")
        for row, sample in zip(tokens, samples, strict=True):
            draw = self._blend.locate(sample)
            self._sets[draw.set_index].read_into(row, draw.number)
            self._check_ids(row, draw.set_index)
        digest = xxhash.xxh3_64_hexdigest(tokens.data)
        return StepBatch(step, batch, passed, tokens, samples.start, len(samples), digest)

    def _check_ids(self, row: Tokens, set_index: int) -> None:
        if self._vocab_size and int(row.max()) >= self._vocab_size:
            raise ValueError(
                f"{self._prefixes[set_index]} has token {row.max()} but the model's vocabulary ends before "
                f"{self._vocab_size}; raise model.vocab_size or prepare the set with the model's tokenizer"
            )


def _check_facts(prefix: Path, data: DataConfig, vocab_size: int) -> None:
    """Hold a set against its recorded facts; sets made by other tools have none."""
    info = read_info(prefix)
    if info is None:
        return
    if not is_whole(prefix, info):
        raise ValueError(f"{prefix} is not whole: its files differ in size from what was written; prepare it again")
    if vocab_size and info.vocab_size > vocab_size:
        raise ValueError(
            f"{prefix} uses {info.vocab_size} token ids but the model has {vocab_size}; set model.vocab_size to at "
            f"least {info.vocab_size} or prepare the set with a smaller vocabulary"
        )
    tokenizer = Path(data.tokenizer)
    if not tokenizer.is_file():
        raise ValueError(f"data.tokenizer = {data.tokenizer!r} does not exist; name the tokenizer.json of {prefix}")
    if file_digest(tokenizer) != info.tokenizer_digest:
        raise ValueError(f"{prefix} was not made with data.tokenizer = {data.tokenizer!r}; prepare it again with that")


class Prefetcher:
    """Reads steps ahead in one background thread, in order."""

    def __init__(self, reader: StepReader, first_step: int, last_step: int, depth: int) -> None:
        """Start reading steps first_step .. first_step + depth - 1; never beyond last_step."""
        assert depth >= 1
        self._reader = reader
        self._next_step = first_step
        self._last_step = last_step
        self._pending: deque[tuple[int, Future[StepBatch]]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        if self._next_step <= self._last_step:
            self._pending.append((self._next_step, self._thread.submit(self._reader.read, self._next_step)))
            self._next_step += 1

    def get(self, step: int) -> StepBatch:
        """The batch of the next step, waiting for it if need be; steps are asked for in order, each once.

        Raises:
            Exception: whatever reading this step raised.
        """
        assert self._pending, f"step {step} is beyond the last one, or the prefetcher is closed"
        expected, future = self._pending[0]
        assert step == expected, f"step {expected} comes next, not {step}"
        batch = future.result()
        self._pending.popleft()
        self._submit()
        return batch

    def close(self) -> None:
        """Drop what is not read yet and end the thread; returns after the read in flight, milliseconds."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
