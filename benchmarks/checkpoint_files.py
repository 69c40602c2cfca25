"""Files of `benchmarks.checkpoint`: writing to the disk's limit, reading cold, forgetting what is cached."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CHUNK_BYTES = 8 << 20


def write_durably(path: Path, tensors: list[torch.Tensor]) -> None:
    """What `dd conv=fsync` does, with the tensors' bytes: large writes and one fsync."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for tensor in tensors:
            data = tensor.view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), CHUNK_BYTES):
                rest = data[start : start + CHUNK_BYTES]
                while rest:
                    rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def read_into(path: Path, tensors: list[torch.Tensor]) -> None:
    """Read a file that `write_durably` wrote into memory that is there."""
    fd = os.open(path, os.O_RDONLY)
    try:
        position = 0
        for tensor in tensors:
            rest = tensor.view(-1).view(torch.uint8).numpy().data
            while rest:
                count = os.preadv(fd, [rest[:CHUNK_BYTES]], position)
                if count == 0:
                    raise OSError(f"{path} ended early")
                rest, position = rest[count:], position + count
    finally:
        os.close(fd)


def forget_cached(folder: Path) -> None:
    """Drop a folder's clean pages from the page cache, so that the next reader reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def fsync_tree(folder: Path, pattern: str) -> None:
    """fsync the files of a folder whose names match, and the folder."""
    for path in [*folder.rglob(pattern), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
