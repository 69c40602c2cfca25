"""What the files of the S3 tier share: its error, what is known of an object, and names. No boto3 here."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Protocol

import msgspec

from checkpointing.layout import MANIFEST_NAME, Manifest, SnapshotDamagedError, decode_document, step_dir_name
from checkpointing.sources import SourceError
from configs.schema import S3Config


class S3Error(SourceError):
    """S3 cannot be reached, refuses, or has not got it; one line for a person.

    passing: it may be over when it is tried again, without anybody doing anything.
    """

    def __init__(self, message: str, passing: bool = True) -> None:
        super().__init__(message)
        self.passing = passing


class Limiter(Protocol):
    """A bound on bytes a second (`checkpointing.ratelimit.RateLimit`)."""

    def take(self, size_bytes: int, stop: Callable[[], bool]) -> bool:
        """Wait until these bytes may go; False if they shall not go any more."""


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long one request may take, and how often it is tried, with growing random pauses between."""

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    attempts: int = 4


class StoredObject(msgspec.Struct, frozen=True):
    """An object in a listing."""

    size_bytes: int
    etag: str


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What the server says of one object. xxh3: the checksum that was put beside it, "" if none.

    crc64nvme, sha256: what the server itself has verified, in its own notation, "" where it has not.
    """

    size_bytes: int
    etag: str
    xxh3: str
    crc64nvme: str
    sha256: str


class FileSums(msgspec.Struct, frozen=True, kw_only=True):
    """A local file's size and checksums, all from one reading. crc64nvme: as S3 writes it (base64 of 8 bytes)."""

    size_bytes: int
    xxh3: str
    crc64nvme: str


class Contents(msgspec.Struct, frozen=True):
    """A small object as it was read."""

    data: bytes
    etag: str


class UnfinishedUpload(msgspec.Struct, frozen=True):
    """A multipart upload that was begun and neither completed nor aborted. age_s: by the server's clock."""

    name: str
    upload_id: str
    age_s: float


_SEGMENT = re.compile(r"[A-Za-z0-9._=+@-]+")


def root_key(settings: S3Config, run_name: str) -> str:
    """What every key of a run begins with, with a "/" at its end.

    Raises:
        ValueError: if s3.prefix or the run's name cannot be part of a key.
    """
    segments = [*(settings.prefix.strip("/").split("/") if settings.prefix.strip("/") else []), run_name]
    for segment in segments:
        if not _SEGMENT.fullmatch(segment) or set(segment) == {"."}:
            raise ValueError(
                f"{segment!r} cannot be part of a key in S3: use letters, digits and ._=+@- in s3.prefix and run.name"
            )
    return "/".join(segments) + "/"


def object_name(step: int, file: str) -> str:
    """Name of a snapshot's file below the run's root."""
    return f"{step_dir_name(step)}/{file}"


def manifest_name(step: int) -> str:
    """Name of a snapshot's manifest below the run's root."""
    return object_name(step, MANIFEST_NAME)


def decode_sound(data: bytes, step: int) -> Manifest | None:
    """The manifest in `data` if it is whole and of this step."""
    with contextlib.suppress(SnapshotDamagedError):
        manifest = decode_document(data, Manifest, manifest_name(step))
        return manifest if manifest.step == step else None
    return None
