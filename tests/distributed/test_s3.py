"""Promises of the S3 tier against a real server: whole or not there, verified by the server, nothing left behind."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import msgspec
import pytest

from checkpointing.disk import step_dir
from checkpointing.layout import SnapshotDamagedError
from checkpointing.ratelimit import RateLimit
from checkpointing.s3 import Bucket, Patience, S3Error
from checkpointing.s3_parts import UnfinishedUpload
from tests.faultproxy import Fault, FaultKind, FaultProxy
from tests.s3_helpers import QUICK, commit, make_bucket, problems, send, write_snapshot
from tests.s3server import S3Server

pytestmark = pytest.mark.distributed

MB = 2**20
SIZE = 12 * MB + 345  # three parts of 5 MiB


def test_a_snapshot_of_several_parts_comes_back_as_it_was(s3: S3Server, tmp_path: Path) -> None:
    """Same names, same bytes, and listed only once it is committed."""
    bucket = make_bucket(s3)
    manifest = write_snapshot(tmp_path, 10, size_bytes=SIZE)
    send(bucket, tmp_path, manifest)
    assert bucket.committed() == []
    assert commit(bucket, tmp_path, manifest)
    assert bucket.committed() == [(1, 10)]
    assert problems(bucket, 10) == []
    folder = step_dir(tmp_path, 10)
    assert {name.removeprefix("step-10/") for name in bucket.files()} == set(os.listdir(folder))
    assert bucket.manifest(10) == (folder / "manifest.json").read_bytes()
    keys = s3.client().list_objects_v2(Bucket=bucket.settings.bucket)["Contents"]
    assert all(entry["Key"].startswith("everstep/run/step-10/") for entry in keys)


def test_what_is_there_already_is_not_sent_again(s3: S3Server, tmp_path: Path) -> None:
    """Skipped if size and checksum agree; an object that differs, or has lost its checksum, is replaced."""
    bucket = make_bucket(s3)
    manifest = write_snapshot(tmp_path, 10, world_size=1, size_bytes=SIZE)
    path, shard = step_dir(tmp_path, 10) / manifest.shards[0].file, manifest.shards[0]
    assert bucket.upload(path, 10, shard.file) == SIZE
    assert bucket.upload(path, 10, shard.file) == 0
    key = f"{bucket.root}step-10/{shard.file}"
    s3.client().put_object(Bucket=bucket.settings.bucket, Key=key, Body=bytes(SIZE))
    assert not commit(bucket, tmp_path, manifest)  # the right size, and other bytes
    assert bucket.upload(path, 10, shard.file, checksum=shard.checksum) == SIZE
    assert commit(bucket, tmp_path, manifest)
    assert problems(bucket, 10) == []


def test_a_rotten_file_is_not_sent(s3: S3Server, tmp_path: Path) -> None:
    """The run directory's file is compared with its manifest before a byte of it leaves."""
    bucket = make_bucket(s3)
    manifest = write_snapshot(tmp_path, 10, world_size=1)
    path = step_dir(tmp_path, 10) / manifest.shards[0].file
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(SnapshotDamagedError, match=r"step-10/g1-rank00000.safetensors: checksum"):
        send(bucket, tmp_path, manifest)
    assert bucket.files() == {}


def test_the_server_refuses_bytes_that_are_not_those_of_the_checksum(s3: S3Server, tmp_path: Path) -> None:
    """Checksums are compared by the server, for one part and for several; nothing stays of what it refused."""
    from checkpointing.s3_objects import file_sums

    bucket = make_bucket(s3)
    for size_bytes in (5000, SIZE):
        path = tmp_path / "file"
        path.write_bytes(random.Random(1).randbytes(size_bytes))
        sums = file_sums(path)
        path.write_bytes(random.Random(2).randbytes(size_bytes))
        with pytest.raises(S3Error, match="BadDigest"):
            bucket.objects.send(path, "step-1/g1-rank00000.safetensors", sums, None, lambda: False)
    assert bucket.files() == {}
    assert bucket.objects.unfinished() == []


def test_a_server_without_crc64_verifies_sha256(s3: S3Server, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    """Where CRC64NVME is not known, parts and manifests are verified by SHA-256."""
    bucket = make_bucket(s3, s3_proxy.endpoint)
    manifest = write_snapshot(tmp_path, 10, world_size=1, size_bytes=SIZE)
    lacking = Fault(FaultKind.ANSWER, status=501, methods=("PUT", "POST"), header="crc64nvme")
    with s3_proxy.inject(lacking) as injected:
        send(bucket, tmp_path, manifest)
        assert commit(bucket, tmp_path, manifest)
    assert injected.hits >= 1
    there = bucket.objects.describe("step-10/g1-rank00000.safetensors")
    assert there is not None
    assert there.sha256
    assert not there.crc64nvme
    assert problems(bucket, 10) == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(FaultKind.ANSWER, status=500, methods=("PUT", "POST"), count=2),
        Fault(FaultKind.ANSWER, status=503, methods=("PUT", "POST"), count=2),
        Fault(FaultKind.ANSWER_AFTER, status=500, methods=("PUT", "POST"), path="rank00000", count=2),
        Fault(FaultKind.ANSWER_AFTER, status=500, methods=("POST",), path="uploadId", count=1),
        Fault(FaultKind.CUT_REQUEST, methods=("PUT",), path="partNumber", after_bytes=3 * MB, count=2),
        Fault(FaultKind.CUT_RESPONSE, methods=("PUT", "POST"), count=2),
        Fault(FaultKind.SLOW, methods=("PUT",), path="partNumber=1", bytes_per_s=10e6),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_faults_in_an_upload_are_overcome(s3: S3Server, s3_proxy: FaultProxy, tmp_path: Path, fault: Fault) -> None:
    """500, 503, connections cut on either way, slowness: the upload gets whole, and so does the snapshot."""
    bucket = make_bucket(s3, s3_proxy.endpoint, Patience(connect_timeout_s=1.0, read_timeout_s=10.0, attempts=4))
    manifest = write_snapshot(tmp_path, 10, world_size=1, size_bytes=SIZE)
    with s3_proxy.inject(fault) as injected:
        send(bucket, tmp_path, manifest)
    assert injected.hits >= 1
    assert commit(bucket, tmp_path, manifest)
    assert problems(bucket, 10) == []
    assert bucket.objects.unfinished() == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(FaultKind.ANSWER, status=500, methods=("GET",), count=2),
        Fault(FaultKind.ANSWER, status=503, methods=("GET",), count=2),
        Fault(FaultKind.CUT_RESPONSE, methods=("GET",), after_bytes=2 * MB + 1, count=4),
        Fault(FaultKind.CUT_RESPONSE, methods=("GET",), count=2),
        Fault(FaultKind.SLOW, methods=("GET",), bytes_per_s=20e6),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.after_bytes}",
)
def test_faults_in_a_download_are_overcome(s3: S3Server, s3_proxy: FaultProxy, tmp_path: Path, fault: Fault) -> None:
    """What a cut connection lacks is asked for again, and only that."""
    bucket = make_bucket(s3)
    manifest = write_snapshot(tmp_path, 10, world_size=1, size_bytes=SIZE)
    send(bucket, tmp_path, manifest)
    through = _through(bucket, s3_proxy, QUICK)
    into = tmp_path / "into"
    with s3_proxy.inject(fault) as injected:
        through.fetch(10, 1, manifest.shards[0], into)
    assert injected.hits >= 1
    assert into.read_bytes() == (step_dir(tmp_path, 10) / manifest.shards[0].file).read_bytes()


def test_a_download_that_cannot_be_had_leaves_no_file(s3: S3Server, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    """Missing, of another size, or a server that only fails: one line, and nothing in place of the file."""
    bucket = make_bucket(s3)
    manifest = write_snapshot(tmp_path, 10, world_size=1, size_bytes=SIZE)
    send(bucket, tmp_path, manifest)
    shard, into = manifest.shards[0], tmp_path / "into"
    with pytest.raises(S3Error, match="has no step-20/"):
        bucket.fetch(20, 1, shard, into)
    with pytest.raises(S3Error, match=f"has {SIZE} bytes, should be {SIZE + 1}"):
        bucket.fetch(10, 1, msgspec.structs.replace(shard, size_bytes=SIZE + 1), into)
    with pytest.raises(S3Error, match="not the name of a shard"):
        bucket.fetch(10, 1, msgspec.structs.replace(shard, file="../../x"), into)
    through = _through(bucket, s3_proxy, Patience(connect_timeout_s=1.0, read_timeout_s=1.0, attempts=1))
    s3_proxy.inject(Fault(FaultKind.CUT_RESPONSE, methods=("GET",)))
    with pytest.raises(S3Error, match="S3 cannot read step-10/g1-rank00000"):
        through.fetch(10, 1, shard, into)
    assert not into.exists()


def test_refused_connections_are_an_error_and_pass(s3: S3Server, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    """The same client goes on as soon as somebody listens again."""
    through = make_bucket(s3, s3_proxy.endpoint)
    manifest = write_snapshot(tmp_path, 10)
    send(through, tmp_path, manifest)
    s3_proxy.down()
    with pytest.raises(S3Error, match="nobody answers"):
        commit(through, tmp_path, manifest)
    s3_proxy.up()
    assert commit(through, tmp_path, manifest)
    assert problems(through, 10) == []


def test_a_flipped_byte_is_noticed(s3: S3Server, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    """In a manifest by the server's checksum, once it has been asked for again; in a shard by the caller."""
    bucket = make_bucket(s3)
    manifest = write_snapshot(tmp_path, 10, world_size=1)
    send(bucket, tmp_path, manifest)
    assert commit(bucket, tmp_path, manifest)
    through = _through(bucket, s3_proxy, QUICK)
    with s3_proxy.inject(Fault(FaultKind.FLIP, methods=("GET",), path="manifest", after_bytes=100, count=1)) as once:
        assert through.committed() == [(1, 10)]
    assert once.hits == 1
    with (
        s3_proxy.inject(Fault(FaultKind.FLIP, methods=("GET",), path="manifest", after_bytes=100)),
        pytest.raises(S3Error, match="checksum"),
    ):
        through.manifest(10)
    with s3_proxy.inject(Fault(FaultKind.FLIP, methods=("GET",), path="rank00000", after_bytes=100)):
        assert any("checksum" in problem for problem in problems(through, 10))


def test_a_damaged_manifest_in_the_bucket_is_no_snapshot(s3: S3Server, tmp_path: Path) -> None:
    """It is left out, and may be replaced; but the bucket is not taken for an empty one."""
    bucket = make_bucket(s3)
    assert not bucket.anything()
    for step in (10, 20):
        manifest = write_snapshot(tmp_path, step)
        send(bucket, tmp_path, manifest)
        assert commit(bucket, tmp_path, manifest)
    data = bytearray(bucket.manifest(20))
    data[len(data) // 2] ^= 1
    s3.client().put_object(Bucket=bucket.settings.bucket, Key=f"{bucket.root}step-20/manifest.json", Body=bytes(data))
    assert bucket.committed() == [(1, 10)]
    bucket.remove(10)
    assert bucket.committed() == []
    assert bucket.anything()
    assert commit(bucket, tmp_path, manifest)
    assert bucket.committed() == [(1, 20)]


def test_a_stopped_upload_ends_soon_and_leaves_nothing(s3: S3Server, tmp_path: Path) -> None:
    """The rate is held while it lasts; once told to stop, it is aborted."""
    bucket = make_bucket(s3)
    manifest = write_snapshot(tmp_path, 10, world_size=1, size_bytes=SIZE)
    path, stop = step_dir(tmp_path, 10) / manifest.shards[0].file, threading.Event()
    timer = threading.Timer(0.5, stop.set)
    timer.start()
    began = time.monotonic()
    with pytest.raises(S3Error, match="stopped"):
        bucket.upload(path, 10, manifest.shards[0].file, RateLimit(1e6), stop.is_set)
    assert stop.is_set()
    assert time.monotonic() - began < 8
    assert bucket.files() == {}
    assert bucket.objects.unfinished() == []


def test_a_bound_on_the_bandwidth_is_kept(s3: S3Server, tmp_path: Path) -> None:
    """Over all connections together."""
    bucket = make_bucket(s3)
    manifest = write_snapshot(tmp_path, 10, world_size=1, size_bytes=SIZE)
    path = step_dir(tmp_path, 10) / manifest.shards[0].file
    began = time.monotonic()
    bucket.upload(path, 10, manifest.shards[0].file, RateLimit(8e6))
    assert time.monotonic() - began > 0.9 * (SIZE - 1e6) / 8e6


def test_multipart_leftovers_of_a_killed_uploader_are_aborted(s3: S3Server, tmp_path: Path) -> None:
    """Only of the ranks asked for, only if old enough, only of shards, and nothing outside the prefix."""
    bucket = make_bucket(s3)
    client, name = s3.client(), bucket.settings.bucket
    keys = [
        f"{bucket.root}step-10/g1-rank00000.safetensors",
        f"{bucket.root}step-10/g1-rank00001.safetensors",
        f"{bucket.root}notes/g1-rank00000.safetensors",
        "everstep/other/step-10/g1-rank00000.safetensors",
    ]
    for key in keys:
        client.create_multipart_upload(Bucket=name, Key=key)
    assert bucket.abort_leftovers([0], older_than_s=3600) == 0
    assert bucket.abort_leftovers([0], older_than_s=0) == 1
    left = {upload["Key"] for upload in client.list_multipart_uploads(Bucket=name)["Uploads"]}
    assert left == set(keys[1:])
    assert not bucket.objects.abort(UnfinishedUpload("step-10/g1-rank00000.safetensors", "gone", 0.0))


def test_a_snapshot_is_removed_manifest_first(s3: S3Server, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    """A removal cut short leaves leftovers, and no snapshot."""
    bucket = make_bucket(s3)
    for step in (10, 20):
        manifest = write_snapshot(tmp_path, step)
        send(bucket, tmp_path, manifest)
        assert commit(bucket, tmp_path, manifest)
    through = _through(bucket, s3_proxy, QUICK)
    with (
        s3_proxy.inject(Fault(FaultKind.ANSWER, status=503, methods=("DELETE",), path="rank")),
        pytest.raises(S3Error),
    ):
        through.remove(10)
    assert bucket.committed() == [(1, 20)]
    bucket.remove(10)
    assert all(name.startswith("step-20/") for name in bucket.files())
    assert problems(bucket, 20) == []


def test_each_way_of_being_wrong_names_its_setting(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bucket, nobody there, credentials unknown, wrong or missing."""
    bucket = make_bucket(s3)
    settings = bucket.settings
    absent = msgspec.structs.replace(settings, bucket="no-such-bucket")
    with pytest.raises(S3Error, match=r"no bucket 'no-such-bucket' .* set s3.bucket"):
        Bucket(absent, "run", QUICK).committed()
    deaf = msgspec.structs.replace(settings, endpoint="http://127.0.0.1:9")
    with pytest.raises(S3Error, match=r"nobody answers at http://127.0.0.1:9 \(s3.endpoint\)"):
        Bucket(deaf, "run", QUICK).committed()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(S3Error, match=r"SignatureDoesNotMatch.*AWS_SECRET_ACCESS_KEY"):
        Bucket(settings, "run", QUICK).committed()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(S3Error, match=r"InvalidAccessKeyId.*set AWS_ACCESS_KEY_ID"):
        Bucket(settings, "run", QUICK).committed()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(S3Error, match=r"no credentials were found: set AWS_ACCESS_KEY_ID"):
        Bucket(settings, "run", QUICK).committed()


def _through(bucket: Bucket, proxy: FaultProxy, patience: Patience) -> Bucket:
    """The same bucket, through the proxy."""
    return Bucket(msgspec.structs.replace(bucket.settings, endpoint=proxy.endpoint), "run", patience)
