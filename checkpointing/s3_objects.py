"""Objects below one prefix of a bucket: the only import site of boto3 (and slow to import, so import this lazily).

Every method may be called from several threads. All names are relative to the run's root, and nothing outside of it
is ever touched. Retries with growing random pauses are botocore's ("standard" mode), multipart uploads s3transfer's.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.config
from awscrt.checksums import crc64nvme
from botocore import exceptions as failures
from s3transfer.exceptions import CancelledError
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from checkpointing.checksum import CHUNK_BYTES, Checksum
from checkpointing.s3_parts import (
    Contents,
    Description,
    FileSums,
    Limiter,
    Patience,
    S3Error,
    StoredObject,
    UnfinishedUpload,
)
from configs.schema import S3Config

_MB = 2**20
_PIECE_BYTES = _MB
_LOOK_AGAIN_S = 0.1
_READ_ATTEMPTS = 3
_CRC64, _SHA256 = "CRC64NVME", "SHA256"
_XXH3 = "xxh3-128"  # name of the metadata entry
_ABSENT = {"NoSuchKey", "404", "NotFound"}
_LOST_RACE = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_BAD_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
_LACKING = {"NotImplemented", "InvalidRequest", "InvalidArgument", "501", "400"}


class Objects:
    """The objects of one run. Creating one does no I/O but reading the user's AWS configuration."""

    def __init__(self, settings: S3Config, root: str, patience: Patience) -> None:
        self.settings = settings
        self.root = root
        self._bucket = settings.bucket
        self._algorithm = _CRC64
        self._streams = threading.BoundedSemaphore(settings.connections)
        self._transfers = TransferConfig(
            multipart_threshold=settings.part_mb * _MB,
            multipart_chunksize=settings.part_mb * _MB,
            max_request_concurrency=settings.connections,
            max_submission_concurrency=1,
        )
        with self._said("use the settings"):
            self._client: Any = boto3.session.Session().client(
                "s3",
                region_name=settings.region,
                endpoint_url=settings.endpoint or None,
                config=botocore.config.Config(
                    connect_timeout=patience.connect_timeout_s,
                    read_timeout=patience.read_timeout_s,
                    retries={"mode": "standard", "total_max_attempts": patience.attempts},
                    max_pool_connections=2 * settings.connections + 4,  # sending, fetching, and small requests
                    s3={"addressing_style": "path"} if settings.endpoint else {},
                ),
            )

    def listing(self, prefix: str = "") -> dict[str, StoredObject]:
        """Every object whose name begins with prefix. S3Error."""
        found = {}
        with self._said("list objects"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self.root + prefix):
                for entry in page.get("Contents", ()):
                    found[entry["Key"].removeprefix(self.root)] = StoredObject(entry["Size"], entry["ETag"])
        return found

    def folders(self) -> list[str]:
        """Names of the folders right below the root. S3Error."""
        names = []
        with self._said("list snapshots"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self.root, Delimiter="/"):
                names += [
                    entry["Prefix"].removeprefix(self.root).strip("/") for entry in page.get("CommonPrefixes", ())
                ]
        return names

    def describe(self, name: str) -> Description | None:
        """What the server knows of an object; None if it is not there. S3Error."""
        try:
            with self._said(f"look at {name}"):
                head = self._client.head_object(Bucket=self._bucket, Key=self.root + name, ChecksumMode="ENABLED")
        except S3Error as error:
            if _code(error.__cause__) in _ABSENT:
                return None
            raise
        return Description(
            size_bytes=head["ContentLength"],
            etag=head["ETag"],
            xxh3=head.get("Metadata", {}).get(_XXH3, ""),
            crc64nvme=head.get("ChecksumCRC64NVME", ""),
            sha256=head.get("ChecksumSHA256", ""),
        )

    def get(self, name: str, known: Contents | None = None) -> Contents | None:
        """A whole small object, its checksum verified where the server has one; None if it is not there. S3Error.

        known: what an earlier call gave; it is given back, unread, if the object has not changed since.
        """
        condition = {"IfNoneMatch": known.etag} if known else {}
        for attempts_left in reversed(range(_READ_ATTEMPTS)):
            try:
                with self._said(f"read {name}"):
                    answer = self._client.get_object(
                        Bucket=self._bucket, Key=self.root + name, ChecksumMode="ENABLED", **condition
                    )
                    return Contents(answer["Body"].read(), answer["ETag"])
            except S3Error as error:
                code = _code(error.__cause__)
                if known is not None and code in {"304", "NotModified"}:
                    return known
                if code in _ABSENT:
                    return None
                if code or not attempts_left:  # what breaks off in the middle of an answer, botocore does not retry
                    raise
        raise AssertionError("unreachable")

    def stream(self, name: str, etag: str, start_bytes: int, size_bytes: int) -> Iterator[memoryview]:
        """A range of an object in pieces; it ends early, or with an S3Error, where the connection does.

        No more than s3.connections of them are open at once, however many objects are read.
        """
        with self._streams, self._said(f"read {name}"):
            answer = self._client.get_object(
                Bucket=self._bucket,
                Key=self.root + name,
                IfMatch=etag,
                Range=f"bytes={start_bytes}-{start_bytes + size_bytes - 1}",
            )
            with contextlib.closing(answer["Body"]) as body:
                while piece := body.read(_PIECE_BYTES):
                    yield memoryview(piece)

    def put_if(self, name: str, data: bytes, replaces_etag: str | None = None) -> bool:
        """Put a small object: only if there is none, or only in place of the one with this etag. False if that is not
        how it is. The server verifies its CRC64NVME. S3Error.
        """
        condition = {"IfNoneMatch": "*"} if replaces_etag is None else {"IfMatch": replaces_etag}
        try:
            with self._said(f"write {name}"):
                self._with_checksum(
                    lambda algorithm: self._client.put_object(
                        Body=data, ChecksumAlgorithm=algorithm, Bucket=self._bucket, Key=self.root + name, **condition
                    )
                )
        except S3Error as error:
            if _code(error.__cause__) in _LOST_RACE | (_ABSENT if replaces_etag is not None else set()):
                return False
            raise
        return True

    def send(self, path: Path, name: str, sums: FileSums, limit: Limiter | None, stop: Callable[[], bool]) -> None:
        """Upload a file in parallel parts. When this returns, the server has compared what it has with `sums`: the
        CRC64NVME of the whole object, or, where it does not know that, the SHA-256 of each part. A failed or stopped
        upload is aborted, if the server can still be reached.

        Raises:
            S3Error: if it was not to be done, or was stopped, or what arrived is not what `sums` was taken from.
            OSError: if the file cannot be read.
        """
        with self._said(f"upload {name}"):
            self._with_checksum(lambda algorithm: self._transfer(path, name, sums, algorithm, limit, stop))
            if sums.size_bytes >= self._transfers.multipart_threshold:
                # An upload is begun twice if the answer to its beginning gets lost; the other one would stay for ever.
                for upload in self.unfinished(name):
                    self.abort(upload)

    def _with_checksum(self, call: Callable[[str], Any]) -> None:
        """Call with the best algorithm that the server knows; which one that is, it says by refusing the other."""
        algorithm = self._algorithm
        try:
            call(algorithm)
        except (failures.ClientError, _UnverifiedError) as error:
            if algorithm == _SHA256 or (isinstance(error, failures.ClientError) and _code(error) not in _LACKING):
                raise
            self._algorithm = _SHA256
            call(_SHA256)

    def _transfer(
        self, path: Path, name: str, sums: FileSums, algorithm: str, limit: Limiter | None, stop: Callable[[], bool]
    ) -> None:
        checksum = {"ChecksumCRC64NVME": sums.crc64nvme} if algorithm == _CRC64 else {"ChecksumAlgorithm": _SHA256}
        progress = _Progress(limit, stop)
        with TransferManager(self._client, self._transfers) as manager:
            future = manager.upload(
                str(path), self._bucket, self.root + name, {**checksum, "Metadata": {_XXH3: sums.xxh3}}, [progress]
            )
            while not progress.done.wait(_LOOK_AGAIN_S):
                if stop():
                    future.cancel()
            try:
                future.result()
            except CancelledError as error:
                raise S3Error(f"S3: the upload of {name} was stopped") from error
        there = self.describe(name)
        if there is None or there.size_bytes != sums.size_bytes or not (there.crc64nvme or there.sha256):
            raise _UnverifiedError(
                f"S3 does not verify checksums at {self._place}: use a server that knows CRC64NVME or SHA-256",
                passing=False,
            )

    def delete(self, name: str, etag: str | None = None) -> bool:
        """Delete an object, with an etag only if it is still that one (False if not). S3Error."""
        condition = {"IfMatch": etag} if etag is not None else {}
        try:
            with self._said(f"delete {name}"):
                self._client.delete_object(Bucket=self._bucket, Key=self.root + name, **condition)
        except S3Error as error:
            if _code(error.__cause__) in _LOST_RACE | _ABSENT:
                return False
            raise
        return True

    def unfinished(self, prefix: str = "") -> list[UnfinishedUpload]:
        """Multipart uploads of names that begin with prefix that nobody has completed or aborted. S3Error."""
        found = []
        with self._said("list unfinished uploads"):
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self.root + prefix):
                now = email.utils.parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
                for upload in page.get("Uploads", ()):
                    name = upload["Key"].removeprefix(self.root)
                    age_s = (now - upload["Initiated"]).total_seconds()
                    found.append(UnfinishedUpload(name, upload["UploadId"], age_s))
        return found

    def abort(self, upload: UnfinishedUpload) -> bool:
        """Abort a multipart upload and free its parts; False if it is over already. S3Error."""
        try:
            with self._said(f"abort the upload of {upload.name}"):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self.root + upload.name, UploadId=upload.upload_id
                )
        except S3Error as error:
            if _code(error.__cause__) in {"NoSuchUpload", "404"}:
                return False
            raise
        return True

    @property
    def _place(self) -> str:
        return self.settings.endpoint or f"AWS, region {self.settings.region}"

    @contextlib.contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """Turn whatever boto3 raises into an S3Error with words for a person; its cause stays boto3's."""
        try:
            yield
        except (failures.BotoCoreError, failures.ClientError) as error:
            raise explain(error, what, self.settings) from error


class _UnverifiedError(S3Error):
    """The server did not verify what it got."""


class _Progress(BaseSubscriber):
    """Holds an upload's threads to the limit while they send, and tells when all is over."""

    def __init__(self, limit: Limiter | None, stop: Callable[[], bool]) -> None:
        self.done = threading.Event()
        self._limit = limit
        self._stop = stop

    def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
        """s3transfer's hook; a retry takes bytes back, which went over the wire nevertheless."""
        if self._limit is not None and bytes_transferred > 0 and not self._limit.take(bytes_transferred, self._stop):
            future.cancel()

    def on_done(self, future: Any, **_: Any) -> None:
        """s3transfer's hook."""
        self.done.set()


def file_sums(path: Path) -> FileSums:
    """Size and checksums of a file in one reading, in bounded pieces. OSError if it cannot be read."""
    running, crc, size_bytes = Checksum(), 0, 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            running.update(buffer[:count])
            crc = crc64nvme(buffer[:count], crc)
            size_bytes += count
    notation = base64.b64encode(crc.to_bytes(8, "big")).decode()
    return FileSums(size_bytes=size_bytes, xxh3=running.hex(), crc64nvme=notation)


def explain(error: Exception, what: str, settings: S3Config) -> S3Error:
    """One line that says what failed, why, and which setting to look at."""
    place = f"at {settings.endpoint}" if settings.endpoint else f"in AWS region {settings.region}"
    credentials = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role"
    code, detail = _code(error), " ".join(str(error).split())
    if code == "NoSuchBucket":
        return S3Error(f"S3 cannot {what}: there is no bucket {settings.bucket!r} {place}: create it, or set s3.bucket")
    if code in _BAD_CREDENTIALS or isinstance(error, failures.NoCredentialsError | failures.PartialCredentialsError):
        found = "no credentials were found" if not code else f"the credentials are refused {place} ({code})"
        return S3Error(f"S3 cannot {what}: {found}: set {credentials}")
    if code in {"AccessDenied", "403", "Forbidden"}:
        return S3Error(
            f"S3 cannot {what}: access to bucket {settings.bucket!r} is denied {place}: allow it, or set {credentials}"
        )
    if code in {"AuthorizationHeaderMalformed", "PermanentRedirect", "301", "IllegalLocationConstraintException"}:
        return S3Error(f"S3 cannot {what}: bucket {settings.bucket!r} is in another region: set s3.region ({detail})")
    if isinstance(error, failures.EndpointConnectionError | failures.ConnectTimeoutError):
        return S3Error(f"S3 cannot {what}: nobody answers {place} (s3.endpoint)")
    return S3Error(f"S3 cannot {what}: {detail}", passing=code not in _ABSENT | _LOST_RACE)


def _code(error: BaseException | None) -> str:
    """S3's own code of an error, its HTTP status if it has none, "" if it is no answer of the server's."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, failures.ClientError) else ""
