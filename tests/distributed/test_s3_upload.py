"""Promises of the uploader: it never disturbs, says once what is wrong, catches up, and tidies the bucket."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from checkpointing.disk import step_dir
from checkpointing.layout import Manifest
from checkpointing.s3 import Bucket
from checkpointing.s3_due import Backoff
from checkpointing.s3_upload import Uploader, UploadEvent, UploadEventKind
from tests.faultproxy import Fault, FaultKind, FaultProxy
from tests.s3_helpers import QUICK, commit, make_bucket, problems, send, write_snapshot
from tests.s3server import S3Server

pytestmark = pytest.mark.distributed

MB = 2**20
COMMITTED, BEHIND, CAUGHT_UP, FAILED = UploadEventKind


class Node:
    """An uploader of one node, what it said, and how to wait for it to say something."""

    def __init__(self, bucket: Bucket, run_dir: Path) -> None:
        self.events: list[UploadEvent] = []
        self.said = threading.Condition()
        self.uploader = Uploader(bucket, run_dir, bucket.settings, self._hear, 0.05, Backoff(first_s=0.1, cap_s=0.5))
        self.uploader.start()

    def wait_for(self, kind: UploadEventKind, timeout_s: float = 30.0) -> UploadEvent:
        with self.said:
            assert self.said.wait_for(lambda: any(e.kind is kind for e in self.events), timeout_s), self.events
            return next(event for event in self.events if event.kind is kind)

    def kinds(self) -> list[UploadEventKind]:
        return [event.kind for event in self.events]

    def steps(self) -> list[int]:
        return [event.step for event in self.events if event.kind is COMMITTED]

    def _hear(self, event: UploadEvent) -> None:
        with self.said:
            self.events.append(event)
            self.said.notify_all()


MakeNode = Callable[[Bucket, Path], Node]


@pytest.fixture
def make_node() -> Iterator[MakeNode]:
    """Makes nodes whose threads end with the test."""
    nodes: list[Node] = []

    def make(bucket: Bucket, run_dir: Path) -> Node:
        nodes.append(Node(bucket, run_dir))
        return nodes[-1]

    yield make
    ended = [node.uploader.stop(30.0) for node in nodes]
    assert all(ended)


def again(of: Bucket, **settings: object) -> Bucket:
    """Another client of the same bucket."""
    return Bucket(msgspec.structs.replace(of.settings, **settings), "run", QUICK)


def test_two_nodes_send_their_shards_and_one_commits(s3: S3Server, tmp_path: Path, make_node: MakeNode) -> None:
    """Each sends its ranks' shards; what is not due stays out; the last step is sent whatever its number."""
    bucket = make_bucket(s3)
    for step in (10, 15, 20, 23):
        write_snapshot(tmp_path, step, size_bytes=6 * MB)
    first, second = make_node(bucket, tmp_path), make_node(again(bucket), tmp_path)
    first.uploader.serve([0], 1, 2, last_step=23)
    assert not first.uploader.flush(1.0)
    assert first.uploader.pending()
    assert bucket.committed() == []
    second.uploader.serve([1], 1, 2, last_step=23)
    assert second.uploader.flush(30.0)
    assert first.uploader.flush(30.0)
    assert bucket.committed() == [(1, 23), (1, 20)]  # keep_last is 2: what would go at once is not sent
    assert first.kinds() == [COMMITTED, COMMITTED]
    assert second.kinds() == []
    assert first.events[0].size_bytes == 12 * MB
    assert problems(bucket, 23) == []
    assert problems(bucket, 20) == []


def test_fewer_nodes_go_on_with_what_more_have_written(s3: S3Server, tmp_path: Path, make_node: MakeNode) -> None:
    """A snapshot of four ranks, of which two are left: each of those sends two shards."""
    bucket = make_bucket(s3)
    write_snapshot(tmp_path, 10, world_size=4)
    node = make_node(bucket, tmp_path)
    node.uploader.serve([0, 1], 2, 2, last_step=100)
    assert node.uploader.flush(30.0)
    assert bucket.committed() == [(1, 10)]
    assert problems(bucket, 10) == []


def test_an_outage_is_said_once_and_caught_up_with(tmp_path: Path, s3: S3Server, make_node: MakeNode) -> None:
    """The server dies and comes back: one event each, nothing raised, and the bucket has the newest."""
    bucket = make_bucket(s3)
    node = make_node(bucket, tmp_path)
    node.uploader.serve([0, 1], 1, 2, last_step=100)
    write_snapshot(tmp_path, 10)
    assert node.uploader.flush(30.0)
    s3.stop()
    try:
        for step in (20, 30, 40):
            write_snapshot(tmp_path, step)
        behind = node.wait_for(BEHIND)
        assert "nobody answers" in behind.detail
        assert behind.step in (20, 30, 40)
        assert not node.uploader.flush(1.0)
        shutil.rmtree(step_dir(tmp_path, 30))  # as retention does meanwhile
        assert node.kinds() == [COMMITTED, BEHIND]
    finally:
        s3.start()
    caught_up = node.wait_for(CAUGHT_UP)
    assert caught_up.seconds > 0.5
    assert node.uploader.flush(30.0)
    assert node.steps() == [10, 40, 20]  # newest first
    assert node.kinds().count(BEHIND) == 1
    assert bucket.committed() == [(1, 40), (1, 20)]
    assert problems(bucket, 40) == []


def test_faults_all_along_end_in_whole_snapshots(
    s3: S3Server, s3_proxy: FaultProxy, tmp_path: Path, make_node: MakeNode
) -> None:
    """500, 503, cut connections and flipped bits at random: the bucket still gets every byte right."""
    bucket = make_bucket(s3)
    for fault in (
        Fault(FaultKind.ANSWER, status=500, probability=0.1),
        Fault(FaultKind.ANSWER, status=503, probability=0.05),
        Fault(FaultKind.CUT_REQUEST, methods=("PUT",), after_bytes=2000, probability=0.2),
        Fault(FaultKind.CUT_RESPONSE, probability=0.1),
        Fault(FaultKind.FLIP, methods=("GET",), after_bytes=300, probability=0.1),
    ):
        s3_proxy.inject(fault)
    write_snapshot(tmp_path, 10, size_bytes=6 * MB)
    write_snapshot(tmp_path, 20)
    node = make_node(again(bucket, endpoint=s3_proxy.endpoint), tmp_path)
    node.uploader.serve([0, 1], 1, 2, last_step=100)
    for _ in range(60):
        if node.uploader.flush(1.0):
            break
    assert bucket.committed() == [(1, 20), (1, 10)], node.events
    assert problems(bucket, 10) == []
    assert problems(bucket, 20) == []
    s3_proxy.clear()


def test_bad_credentials_say_which_setting(
    s3: S3Server, tmp_path: Path, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One event that says what to set; training goes on, and so would the upload once they are right."""
    bucket = make_bucket(s3)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    node = make_node(again(bucket), tmp_path)
    node.uploader.serve([0, 1], 1, 2, last_step=100)
    assert "AWS_SECRET_ACCESS_KEY" in node.wait_for(BEHIND).detail  # before there is anything to send
    other = make_node(again(bucket, bucket="no-such-bucket"), tmp_path)
    other.uploader.serve([0, 1], 1, 2, last_step=100)
    other.wait_for(BEHIND)
    assert node.kinds() == [BEHIND]


def test_a_snapshot_with_a_rotten_shard_is_given_up(s3: S3Server, tmp_path: Path, make_node: MakeNode) -> None:
    """It is said, nothing of it is committed, and others are sent."""
    bucket = make_bucket(s3)
    write_snapshot(tmp_path, 10)
    rotten = write_snapshot(tmp_path, 20)
    path = step_dir(tmp_path, 20) / rotten.shards[1].file
    path.write_bytes(bytes(rotten.shards[1].size_bytes))
    node = make_node(bucket, tmp_path)
    node.uploader.serve([0, 1], 1, 2, last_step=100)
    assert node.uploader.flush(30.0)
    assert "step-20/g1-rank00001.safetensors: checksum" in node.wait_for(FAILED).detail
    assert bucket.committed() == [(1, 10)]


def test_an_orphan_agent_neither_sends_nor_removes(s3: S3Server, tmp_path: Path, make_node: MakeNode) -> None:
    """An agent of generation 1 does not take up generation 2's snapshots, nor commit beside them."""
    bucket = make_bucket(s3)
    newer = write_snapshot(tmp_path / "new", 30, 2)
    send(bucket, tmp_path / "new", newer)
    assert commit(bucket, tmp_path / "new", newer)
    write_snapshot(tmp_path / "old", 40, 1)
    write_snapshot(tmp_path / "old", 50, 2)
    before = bucket.files()
    orphan = make_node(again(bucket), tmp_path / "old")
    orphan.uploader.serve([0, 1], 1, 2, last_step=100)
    assert orphan.uploader.flush(30.0)
    assert bucket.files() == before
    assert orphan.kinds() == []


def test_retention_keeps_what_it_says(s3: S3Server, tmp_path: Path, make_node: MakeNode) -> None:
    """keep_last and keep_every_steps; leftovers go; nothing outside the run's prefix is touched."""
    bucket = make_bucket(s3, keep_last=2, keep_every_steps=20)
    foreign = "everstep/run2/step-10/g1-rank00000.safetensors"
    s3.client().put_object(Bucket=bucket.settings.bucket, Key=foreign, Body=b"x")
    s3.client().put_object(Bucket=bucket.settings.bucket, Key=bucket.root + "notes.txt", Body=b"x")
    send(bucket, tmp_path / "gone", write_snapshot(tmp_path / "gone", 5))  # never committed
    node = make_node(bucket, tmp_path)
    node.uploader.serve([0, 1], 1, 2, last_step=100)
    for step in (10, 20, 30, 40, 50):
        write_snapshot(tmp_path, step)
        assert node.uploader.flush(30.0)
    assert bucket.committed() == [(1, 50), (1, 40), (1, 20)]
    folders = {name.partition("/")[0] for name in bucket.files()}
    assert folders == {"step-20", "step-40", "step-50", "notes.txt"}
    assert s3.client().head_object(Bucket=bucket.settings.bucket, Key=foreign)["ContentLength"] == 1
    assert problems(bucket, 20) == []


def test_the_last_good_snapshot_stays_until_a_newer_one_is_whole(
    s3: S3Server, tmp_path: Path, make_node: MakeNode
) -> None:
    """Shards vanish from newer snapshots in the bucket: those do not count, and the older whole one stays."""
    bucket = make_bucket(s3)
    manifests: list[Manifest] = [write_snapshot(tmp_path, step) for step in (10, 20, 30)]
    for manifest in manifests:
        send(bucket, tmp_path, manifest)
        assert commit(bucket, tmp_path, manifest)
    for step in (20, 30):
        bucket.objects.delete(f"step-{step}/g1-rank00000.safetensors")
    node = make_node(bucket, tmp_path)
    node.uploader.serve([0, 1], 1, 2, last_step=100)
    write_snapshot(tmp_path, 40)
    assert node.uploader.flush(30.0)
    assert (1, 10) in bucket.committed()
    assert problems(bucket, 10) == []
    assert problems(bucket, 40) == []


def test_leftovers_of_a_killed_agent_are_aborted_by_the_next(s3: S3Server, tmp_path: Path, make_node: MakeNode) -> None:
    """Multipart uploads of this node's ranks, as soon as it serves them; not those of other nodes."""
    bucket = make_bucket(s3)
    client, name = s3.client(), bucket.settings.bucket
    for rank in (0, 1):
        client.create_multipart_upload(Bucket=name, Key=f"{bucket.root}step-10/g1-rank0000{rank}.safetensors")
    node = make_node(again(bucket), tmp_path)
    node.uploader.serve([0], 2, 2, last_step=100)
    assert node.uploader.flush(30.0)
    assert [upload.name for upload in bucket.objects.unfinished()] == ["step-10/g1-rank00001.safetensors"]


def test_the_thread_yields_and_ends(s3: S3Server, tmp_path: Path, make_node: MakeNode) -> None:
    """It is nicer than training, bounded in bandwidth, and ends in the middle of an upload without leaving anything."""
    bucket = make_bucket(s3, max_mb_per_s=1.0)
    write_snapshot(tmp_path, 10, size_bytes=12 * MB)
    node = make_node(bucket, tmp_path)
    node.uploader.serve([0, 1], 1, 2, last_step=100)
    deadline = time.monotonic() + 20
    while not bucket.objects.unfinished():
        assert time.monotonic() < deadline
    thread = next(t for t in threading.enumerate() if t.name == "s3-uploader" and t.is_alive())
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) == os.getpriority(os.PRIO_PROCESS, 0) + 10
    began = time.monotonic()
    assert node.uploader.stop(20.0)
    assert time.monotonic() - began < 10
    assert bucket.objects.unfinished() == []
    assert bucket.committed() == []
