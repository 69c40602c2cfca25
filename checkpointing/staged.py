"""Folders that appear whole or not at all, and files that are written piece by piece with a running checksum."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from checkpointing.checksum import CHUNK_BYTES, Checksum
from checkpointing.disk import sync_dir, write_all

_ZEROS = bytes(CHUNK_BYTES)


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its name when the block ends well, and is removed when it does not.

    Raises:
        ValueError: output is there and not an empty folder, or there is no room left.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ValueError(f"{output} exists and is no empty folder; name another one, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)
        sync_dir(folder)
        folder.replace(output)
        sync_dir(output.parent)
    except OSError as error:
        raise _explained(error, output) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _explained(error: OSError, output: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ValueError(f"no room for {output} ({error.strerror}); make some, or name another place")
    return error


class StreamedFile:
    """A file written from its beginning to its end, never held in memory. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._checksum = Checksum()
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        for start in range(0, len(data), CHUNK_BYTES):
            piece = data[start : start + CHUNK_BYTES]
            write_all(self._fd, piece)
            self._checksum.update(piece)
        self.size_bytes += len(data)

    def write_tensor(self, tensor: Tensor) -> None:
        """Append a tensor's bytes, row by row."""
        self.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)

    def write_zeros(self, size_bytes: int) -> None:
        """Append zeros, as a hole that takes no room where the file system has such."""
        left = size_bytes
        while left:
            piece = min(left, CHUNK_BYTES)
            self._checksum.update(memoryview(_ZEROS)[:piece])
            left -= piece
        self.size_bytes += size_bytes
        os.ftruncate(self._fd, self.size_bytes)
        os.lseek(self._fd, self.size_bytes, os.SEEK_SET)

    def checksum(self) -> str:
        """Of everything written so far."""
        return self._checksum.hex()

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
