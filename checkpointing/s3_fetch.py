"""A large object into a file: ranges in parallel, each resumed where its connection was cut."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointing.s3_parts import S3Error
from configs.schema import S3Config

if TYPE_CHECKING:
    from checkpointing.s3_objects import Objects

_MB = 2**20
_MIN_RANGE_BYTES = 8 * _MB
_ATTEMPTS_WITHOUT_PROGRESS = 5
_FIRST_PAUSE_S = 0.2


def fetch_object(objects: Objects, name: str, size_bytes: int, into: Path, settings: S3Config) -> None:
    """Write an object of exactly this size to `into`.

    Raises:
        S3Error: if it is not there, has another size, changes meanwhile, or cannot be had.
        OSError: if `into` cannot be written. On any failure `into` is removed.
    """
    there = objects.describe(name)
    if there is None:
        raise S3Error(f"S3 has no {name}", passing=False)
    if there.size_bytes != size_bytes:
        raise S3Error(f"S3: {name} has {there.size_bytes} bytes, should be {size_bytes}", passing=False)
    stop = threading.Event()
    fd = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.truncate(fd, size_bytes)
        with ThreadPoolExecutor(settings.connections) as pool:
            ranges = [
                pool.submit(_fetch_range, objects, name, there.etag, fd, start, end, stop)
                for start, end in cut(size_bytes, settings.part_mb * _MB, settings.connections)
            ]
            for one in ranges:
                one.result()
    except BaseException:
        into.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def cut(size_bytes: int, part_bytes: int, connections: int) -> list[tuple[int, int]]:
    """Ranges [start, end) that cover size_bytes: none longer than a part, and enough of them to use all connections,
    if that leaves none shorter than 8 MiB (the last one may be)."""
    even_bytes = -(-size_bytes // connections)
    step_bytes = min(part_bytes, max(even_bytes, _MIN_RANGE_BYTES))
    return [(start, min(start + step_bytes, size_bytes)) for start in range(0, size_bytes, step_bytes)]


def _fetch_range(objects: Objects, name: str, etag: str, fd: int, start: int, end: int, stop: threading.Event) -> None:
    """Fetch one range; `stop` is set when it cannot be had, so that the others need not go on."""
    attempts = 0
    while start < end and not stop.is_set():
        before, failure = start, S3Error(f"S3: the answer for {name} ended early")
        try:
            for piece in objects.stream(name, etag, start, end - start):
                start += os.pwrite(fd, piece[: end - start], start)
        except S3Error as error:
            failure = error
        except BaseException:
            stop.set()
            raise
        attempts = 0 if start > before else attempts + 1
        if start < end and (attempts == _ATTEMPTS_WITHOUT_PROGRESS or not failure.passing):
            stop.set()
            raise failure
        if start < end:
            stop.wait(_FIRST_PAUSE_S * 2**attempts * random.random())
