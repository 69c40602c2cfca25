"""Bad data, really on the disk: the tokens that certain batches read are overwritten in the corpus."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from configs.schema import JobConfig
from trainer.indexed import IndexedCorpus, bin_path
from trainer.sampler import Blend, epoch_order, windows_per_epoch


def spoiled_copy(corpus: Path, folder: Path, config: JobConfig, first: int, count: int, token: int) -> Path:
    """A copy of a corpus in which every token of `count` batches from `first` on is `token`; returns its prefix.

    A model gives a token that the corpus hardly has next to no probability, and all gradients point the same way.
    """
    shutil.copytree(corpus, folder)
    prefix = folder / "corpus"
    whole = IndexedCorpus(prefix)
    starts = np.cumsum(whole.lengths) - whole.lengths
    tokens = np.memmap(bin_path(prefix), dtype=np.uint16, mode="r+")
    order = epoch_order(whole.lengths, config.training.seq_len, config.run.seed, 0, 0)
    windows = windows_per_epoch(whole.tokens, config.training.seq_len)
    size = config.training.global_batch_size
    for sample in range((first - 1) * size, (first - 1 + count) * size):
        number = Blend([1.0]).locate(sample).number
        assert number < windows, "only the first epoch is spoiled"
        for piece in order.pieces(number):
            begin = int(starts[piece.document]) + piece.offset
            tokens[begin : begin + piece.length] = token
    tokens.flush()
    return prefix
