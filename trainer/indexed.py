"""Token files on disk: the one place that imports megatron-core's indexed dataset.

`<prefix>.bin` holds the tokens of all documents back to back, `<prefix>.idx` their lengths. Importing megatron-core
takes seconds (it brings its whole model zoo), so it happens on first use; `preload` pays for it ahead of time.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")


def preload() -> ModuleType:
    """Import megatron-core's dataset module; worth calling where workers are forked from.

    Raises:
        ValueError: the package is missing or cannot be imported here.
    """
    with warnings.catch_warnings():
        # Its notes on absent GPU packages concern models and optimizers, none of which is used.
        warnings.simplefilter("ignore")
        try:
            from megatron.core.datasets import indexed_dataset
        except (ImportError, RuntimeError, FileNotFoundError) as error:
            raise ValueError(
                f"megatron-core's dataset module does not import ({error}); install megatron-core with einops and "
                "psutil, and remove transformer-engine from machines that have no GPU"
            ) from error
    module: ModuleType = indexed_dataset
    return module


def bin_path(prefix: Path) -> Path:
    """File of the tokens."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """File of the document lengths."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedCorpus:
    """Documents of one prepared set, mapped read-only.

    Attributes:
        lengths: int64 [documents], tokens of each document.
        tokens: their sum.
    """

    def __init__(self, prefix: Path) -> None:
        """Map the files.

        Raises:
            ValueError: files are missing, empty, or not what the index says.
        """
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise ValueError(f"no prepared corpus at {prefix}: {path} is missing; run `everstep data prepare`")
            if path.stat().st_size == 0:
                raise ValueError(f"{path} is empty; remove it and run `everstep data prepare` again")
        self.prefix = prefix
        _check_index(idx_path(prefix))
        self._dataset: Any = preload().IndexedDataset(str(prefix), mmap=True)
        # A copy: views into the mapping do not keep it alive and crash the process once it is gone.
        sequence_lengths = np.array(self._dataset.sequence_lengths, dtype=np.int64)
        document_starts = np.array(self._dataset.document_indices, dtype=np.int64)
        if len(document_starts) - 1 != len(sequence_lengths) or (np.diff(document_starts) != 1).any():
            raise ValueError(f"{prefix} has documents of several sequences; prepare it with `everstep data prepare`")
        self.lengths: Tokens = sequence_lengths
        self.tokens = int(sequence_lengths.sum())
        self._check_size(prefix)

    def _check_size(self, prefix: Path) -> None:
        size_bytes = bin_path(prefix).stat().st_size
        expected_bytes = self.tokens * np.dtype(self._dataset.index.dtype).itemsize
        if size_bytes != expected_bytes:
            raise ValueError(
                f"{bin_path(prefix)} has {size_bytes} bytes where its index says {expected_bytes}: it was cut off or "
                "replaced; prepare the corpus again"
            )

    def read_into(self, out: Tokens, document: int, offset: int) -> None:
        """Fill `out` [length] with the document's tokens offset .. offset + length."""
        assert offset >= 0
        assert offset + len(out) <= self.lengths[document]
        out[:] = self._dataset.get(document, offset, len(out))

    def read(self, document: int, offset: int = 0, length: int | None = None) -> Tokens:
        """Tokens of (a part of) a document, int64 [length]."""
        out = np.empty(int(self.lengths[document]) - offset if length is None else length, dtype=np.int64)
        self.read_into(out, document, offset)
        return out


def _check_index(path: Path) -> None:
    """Find damage before megatron-core does: its reader would print a traceback of its own while it is torn down."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) == _HEADER.size:
        magic, version, _, sequences, boundaries = _HEADER.unpack(head)
        size_bytes = _HEADER.size + 12 * sequences + 8 * boundaries
        if (magic, version, path.stat().st_size) == (_MAGIC, 1, size_bytes):
            return
    raise ValueError(f"{path} is damaged: not an index, or cut off; prepare the corpus again")


class CorpusWriter:
    """Writes `<prefix>.bin` while documents come, `<prefix>.idx` on `finish`."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._dtype = np.uint16 if vocab_size <= 2**16 else np.int32
        self._builder: Any = preload().IndexedDatasetBuilder(str(bin_path(prefix)), dtype=self._dtype)
        self.documents = 0
        self.tokens = 0

    def add(self, tokens: npt.NDArray[np.integer[Any]]) -> None:
        """Append one document, [tokens]."""
        self._builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self) -> None:
        """Close the tokens and write the index."""
        self._builder.finalize(str(idx_path(self._prefix)))
