"""Promises of the S3 tier's pure parts: what is sent, what is removed, how ranges are cut, how long pauses are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.keep import KeptInfo, kept_steps
from checkpointing.layout import VERSION, Manifest, Shard, shard_file_name
from checkpointing.s3_due import Backoff, Served, due_snapshots
from checkpointing.s3_fetch import cut
from checkpointing.s3_parts import StoredObject, manifest_name, object_name, root_key
from checkpointing.s3_retention import plan_removal
from configs.schema import S3Config

AGES = st.tuples(st.integers(1, 3), st.integers(1, 8).map(lambda number: number * 10))


def manifest(generation: int, step: int, world_size: int = 2) -> Manifest:
    """A manifest of empty shards of 7 bytes."""
    shards = tuple(
        Shard(
            rank=rank,
            file=shard_file_name(generation, rank),
            size_bytes=7,
            checksum="",
            data_start_bytes=0,
            tensors=(),
            scalars={},
            leaves={},
        )
        for rank in range(world_size)
    )
    return Manifest(
        version=VERSION, step=step, generation=generation, world_size=world_size, mesh={}, t_wall_s=0.0, shards=shards
    )


def settings(keep_last: int = 2, keep_every_steps: int = 0, prefix: str = "everstep") -> S3Config:
    return S3Config(bucket="b", prefix=prefix, keep_last=keep_last, keep_every_steps=keep_every_steps)


@st.composite
def buckets(draw: st.DrawFn) -> tuple[dict[str, StoredObject], dict[int, Manifest]]:
    """A bucket's objects and sound manifests: whole snapshots, some without a shard or with a short one, some with a
    damaged manifest or none, and shards of other generations beside them."""
    files, manifests = {}, {}
    for step, generation in draw(st.dictionaries(st.integers(1, 8).map(lambda n: n * 10), st.integers(1, 3))).items():
        one = manifest(generation, step)
        for shard in one.shards:
            size_bytes = draw(st.sampled_from([7, 7, 7, 7, 7, 3, None]))
            if size_bytes is not None:
                files[object_name(step, shard.file)] = StoredObject(size_bytes, "")
        state = draw(st.sampled_from(["sound", "sound", "sound", "damaged", "none"]))
        if state != "none":
            files[manifest_name(step)] = StoredObject(100, f"etag-{step}")
        if state == "sound":
            manifests[step] = one
    for generation, step in draw(st.lists(AGES, max_size=4)):
        files[object_name(step, shard_file_name(generation, 1))] = StoredObject(7, "")
    files["notes.txt"] = files["step-10/notes.txt"] = StoredObject(1, "")
    return files, manifests


def whole(files: Collection[str], manifests: dict[int, Manifest], sizes: dict[str, StoredObject]) -> dict[int, int]:
    """step: generation of the snapshots of which every file is there in full."""
    return {
        step: one.generation
        for step, one in manifests.items()
        if manifest_name(step) in files
        and all(
            object_name(step, s.file) in files and sizes[object_name(step, s.file)].size_bytes == 7 for s in one.shards
        )
    }


@given(buckets(), st.integers(2, 3), st.sampled_from([0, 20, 30]), st.sets(AGES, max_size=3))
def test_removal_keeps_what_must_stay(
    bucket: tuple[dict[str, StoredObject], dict[int, Manifest]],
    keep_last: int,
    keep_every_steps: int,
    awaited: set[tuple[int, int]],
) -> None:
    """Of whole snapshots exactly those stay that the rule keeps, and they stay whole; without any, nothing goes."""
    files, manifests = bucket
    plan = plan_removal(files, manifests, settings(keep_last, keep_every_steps), awaited)
    gone = {name for name, _ in plan.manifests.values()} | {name for names in plan.shards.values() for name in names}
    before, after = whole(files, manifests, files), whole(files.keys() - gone, manifests, files)
    infos = [KeptInfo(step=step, generation=generation) for step, generation in before.items()]
    assert set(after) == kept_steps(infos, keep_last, keep_every_steps, 0)
    assert bool(gone) <= bool(before)
    assert gone <= files.keys() - {"notes.txt", "step-10/notes.txt"}
    newest = max(((generation, step) for step, generation in before.items()), default=(0, 0))
    for generation, step in {*awaited, *((g, s) for g in range(1, 4) for s in range(10, 90, 10) if (g, s) > newest)}:
        assert object_name(step, shard_file_name(generation, 1)) not in gone


def test_removal_takes_leftovers_and_superseded_shards() -> None:
    """Shards of older steps without a manifest, and an older generation's beside a newer one's manifest."""
    one, two = manifest(1, 10), manifest(2, 20)
    names = [object_name(m.step, s.file) for m in (one, two) for s in m.shards]
    files = dict.fromkeys([*names, manifest_name(20), object_name(20, shard_file_name(1, 0))], StoredObject(7, "e"))
    plan = plan_removal(files, {20: two}, settings(), ())
    assert plan.manifests == {}
    assert plan.shards == {10: tuple(names[:2]), 20: (object_name(20, shard_file_name(1, 0)),)}
    assert 10 not in plan_removal(files, {20: two}, settings(), {(1, 10)}).shards


@given(st.lists(AGES, unique_by=lambda age: age[1]), st.sets(AGES), st.integers(2, 3), st.sampled_from([0, 20]))
def test_due_is_what_would_stay_and_is_not_there(
    local: list[tuple[int, int]], committed: set[tuple[int, int]], keep_last: int, keep_every_steps: int
) -> None:
    """Newest first, nothing twice, nothing that the fence refuses; the newest local snapshot is due if it is new."""
    due = due_snapshots([manifest(*age) for age in local], committed, settings(keep_last, keep_every_steps))
    ages = [(one.generation, one.step) for one in due]
    assert ages == sorted(set(ages), reverse=True)
    assert not set(ages) & committed
    assert all(generation >= max((g for g, _ in committed), default=0) for generation, _ in ages)
    if local and max(local) > max(committed, default=(0, 0)):
        assert ages[0] == max(local)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 10))
def test_every_shard_is_one_nodes(shards: int, world_size: int, per_node: int) -> None:
    """However many ranks wrote it, and however few are left: each shard is sent by one node, and one node commits."""
    nodes = [
        Served(
            ranks=frozenset(range(start, min(start + per_node, world_size))),
            generation=1,
            world_size=world_size,
            last_step=1,
        )
        for start in range(0, world_size, per_node)
    ]
    owned = [shard.rank for node in nodes for shard in node.shards(manifest(1, 10, shards))]
    assert sorted(owned) == list(range(shards))
    assert sum(node.commits for node in nodes) == 1


@pytest.mark.parametrize(
    ("generation", "step", "wanted"), [(1, 20, True), (1, 25, False), (1, 33, True), (3, 20, False)]
)
def test_what_belongs_in_the_bucket(generation: int, step: int, wanted: bool) -> None:
    """Every interval_steps-th, the last one, and nothing of a generation newer than the node's own."""
    served = Served(ranks=frozenset([0]), generation=2, world_size=2, last_step=33)
    assert served.wants(manifest(generation, step), interval_steps=10) is wanted


@given(st.integers(1, 1 << 40), st.integers(5, 64), st.integers(1, 32))
def test_ranges_cover_an_object_once(size_bytes: int, part_mb: int, connections: int) -> None:
    """No gap, no overlap, no range longer than a part."""
    size_bytes = min(size_bytes, part_mb << 30)
    ranges = cut(size_bytes, part_mb << 20, connections)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size_bytes
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert all(0 < end - start <= part_mb << 20 for start, end in ranges)


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0.01, 10), st.floats(1, 60))
def test_pauses_grow_to_a_cap(failures: int, chance: float, first_s: float, cap_s: float) -> None:
    """Never more than the cap, never less than half of what the number of failures asks for."""
    backoff = Backoff(first_s=first_s, cap_s=cap_s)
    pause_s = backoff.pause_s(failures, chance)
    assert min(cap_s, first_s) / 2 <= pause_s <= cap_s
    assert backoff.pause_s(failures + 1, chance) >= pause_s


@pytest.mark.parametrize(
    ("prefix", "root"),
    [("everstep", "everstep/run/"), ("", "run/"), ("/a/b/", "a/b/run/"), ("team=x/y", "team=x/y/run/")],
)
def test_a_run_has_a_root(prefix: str, root: str) -> None:
    """One slash between its parts, none in front."""
    assert root_key(settings(prefix=prefix), "run") == root


@pytest.mark.parametrize("prefix", ["..", "a/../b", "a//b", "a b", "."])
def test_a_prefix_that_is_no_key_is_refused(prefix: str) -> None:
    """It says which setting."""
    with pytest.raises(ValueError, match=r"s3\.prefix"):
        root_key(settings(prefix=prefix), "run")


def test_agents_do_not_import_boto3_before_they_need_it() -> None:
    """Importing the uploader, and making a bucket, loads neither boto3 nor torch."""
    code = (
        "import sys; from checkpointing.s3_upload import Uploader; from checkpointing.s3 import Bucket\n"
        "from configs.schema import S3Config; Bucket(S3Config(bucket='b'), 'run')\n"
        "sys.exit(sorted({'boto3', 'botocore', 'awscrt', 'torch'} & sys.modules.keys()) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_missing_boto3_names_the_extra() -> None:
    """Without the optional packages it says how to get them."""
    code = (
        "import sys; sys.modules['boto3'] = None\n"
        "from checkpointing.s3 import Bucket; from configs.schema import S3Config\n"
        "Bucket(S3Config(bucket='b'), 'run').committed()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'everstep[s3]'" in result.stderr.splitlines()[-1]
