"""Opening a text file whatever it is compressed with."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_PROBE_BYTES = 4096
_CHUNK_BYTES = 1 << 17


def bare_suffix(path: Path) -> str:
    """The suffix that says what is inside, in lower case: `.jsonl` for `a.jsonl.gz`."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's decompressed bytes, for reading forward.

    Raises:
        ValueError: unreadable, damaged, or its compression needs an extra; also while the block reads.
    """
    try:
        with _open(path) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged {path.suffix} file ({error}); fetch it again or leave it out") from error
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error}); make it readable or leave it out") from error


def _open(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return cast("IO[bytes]", gzip.open(path, "rb"))
        case ".bz2":
            return bz2.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            return _open_zstandard(path)
        case _:
            return path.open("rb")


def _open_zstandard(path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{path} needs zstandard: pip install 'everstep[data]'") from error

    class Reader(io.RawIOBase):
        """Frames one after the other. Unlike the library's own stream it notices a file that ends within one."""

        def __init__(self) -> None:
            self._file = path.open("rb")
            self._frame: Any = None
            self._ready = b""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self._ready:
                packed = self._file.read(_CHUNK_BYTES)
                if not packed:
                    if self._frame is not None:
                        raise EOFError("it ends too early")
                    return 0
                self._unpack(packed)
            size = min(len(buffer), len(self._ready))
            buffer[:size], self._ready = self._ready[:size], self._ready[size:]
            return size

        def _unpack(self, packed: bytes) -> None:
            parts = []
            while packed:
                self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    parts.append(self._frame.decompress(packed))
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                packed = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
            self._ready = b"".join(parts)

        def close(self) -> None:
            self._file.close()
            super().close()

    return cast("IO[bytes]", io.BufferedReader(Reader(), buffer_size=_CHUNK_BYTES))


def looks_binary(path: Path) -> bool:
    """Whether the first decompressed bytes hold a NUL, which no text does."""
    with open_bytes(path) as file:
        return b"\0" in file.read(_PROBE_BYTES)
