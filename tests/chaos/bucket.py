"""A run's bucket under siege: what is whole in it, damage to its objects, and a server that fails."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from checkpointing.checksum import checksum
from checkpointing.layout import MANIFEST_NAME, Manifest, step_dir_name
from checkpointing.s3 import Bucket
from checkpointing.s3_parts import decode_sound
from configs.schema import S3Config
from tests.chaos.damage import Age
from tests.faultproxy import Fault, FaultKind, FaultProxy
from tests.s3server import S3Server

OUTAGES = ("500", "503", "slow", "answers cut off", "requests cut off", "bits flipped on the way", "down")
# Nothing is done to these requests: they are only seen. Sending is slowed down, or it would be over at once.
_SENSORS = {
    "uploading": Fault(FaultKind.SLOW, methods=("PUT",), path=r"\.safetensors", bytes_per_s=4e6),
    "finishing an upload": Fault(FaultKind.SLOW, methods=("POST",), path=r"uploadId=", bytes_per_s=1e9),
    "committing in the bucket": Fault(FaultKind.SLOW, methods=("PUT",), path=r"manifest\.json", bytes_per_s=1e9),
    "pruning the bucket": Fault(FaultKind.SLOW, methods=("DELETE",), bytes_per_s=1e9),
}


class BesiegedBucket:
    """One job's bucket, looked at past the proxy that the job uses."""

    def __init__(self, server: S3Server, proxy: FaultProxy, run_name: str, dice: random.Random) -> None:
        self.proxy = proxy
        self.dice = dice
        self.name = server.create_bucket()
        self._client: Any = server.client()
        self._near = Bucket(S3Config(bucket=self.name, endpoint=server.endpoint), run_name)
        self._down = False

    def settings(self, interval_steps: int) -> tuple[str, ...]:
        """Of the job."""
        return (
            "--s3.bucket", self.name, "--s3.endpoint", self.proxy.endpoint, "--s3.part_mb", "5",
            "--s3.interval_steps", str(interval_steps),
        )  # fmt: skip

    # What is in it ------------------------------------------------------------------------------------------------

    def committed(self) -> list[Age]:
        """Newest first."""
        return self._near.committed()

    def newest_good(self, floor: Age) -> Age:
        """Age of the newest snapshot of which every byte is right; looked for again as long as it is older than floor,
        since retention may remove what is being looked at."""
        newest: Age = (-1, -1)
        for _ in range(5):
            manifests = self._near.manifests()
            for manifest in sorted(manifests.values(), key=_age, reverse=True):
                if _age(manifest) > newest and self._is_whole(manifest):
                    newest = _age(manifest)
                    break
            if newest >= floor:
                break
        return newest

    def good(self) -> list[Age]:
        """All that are whole."""
        return [_age(manifest) for manifest in self._near.manifests().values() if self._is_whole(manifest)]

    def unfinished(self) -> list[str]:
        """Multipart uploads that nobody finished: they cost as much as objects, and no listing shows them."""
        return [upload.name for upload in self._near.objects.unfinished()]

    def _is_whole(self, manifest: Manifest) -> bool:
        folder = step_dir_name(manifest.step)
        return all(self._read(f"{folder}/{s.file}") == (s.size_bytes, s.checksum) for s in manifest.shards)

    def _read(self, name: str) -> tuple[int, str]:
        try:
            data = self._client.get_object(Bucket=self.name, Key=self._near.root + name)["Body"].read()
        except self._client.exceptions.NoSuchKey:
            return -1, ""
        return len(data), checksum(data)

    # Damage -------------------------------------------------------------------------------------------------------

    def damage(self) -> tuple[str, Age] | None:
        """Damage an object of a whole snapshot, unless it is the only one; what was done, and to which."""
        good = self.good()
        if len(good) < 2:
            return None
        age = self.dice.choice(sorted(good))
        folder = step_dir_name(age[1])
        names = [name for name in self._near.files(age[1]) if f"/g{age[0]}-" in name]
        manifest = f"{folder}/{MANIFEST_NAME}"
        name = self.dice.choice([manifest, *[self.dice.choice(names)] * 3]) if names else manifest
        how = self.dice.choice(["flipped", "flipped", "truncated", "removed"])
        key = self._near.root + name
        try:
            there = self._client.get_object(Bucket=self.name, Key=key)
            if (found := decode_sound(self._near.manifest(age[1]), age[1])) is None or _age(found) != age:
                return None
        except (self._client.exceptions.NoSuchKey, ValueError):
            return None
        data = bytearray(there["Body"].read())
        if how == "removed":
            self._client.delete_object(Bucket=self.name, Key=key)
        else:
            if how == "flipped":
                data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
            else:
                del data[self.dice.randrange(len(data)) :]
            self._client.put_object(Bucket=self.name, Key=key, Body=bytes(data), Metadata=there["Metadata"])
        return f"{name} {how} in the bucket", age

    # A server that fails ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def seen(self, what: str) -> Iterator[Callable[[], bool]]:
        """Whether such a request has come in since."""
        injected = self.proxy.inject(_SENSORS[what])
        try:
            yield lambda: injected.hits > 0
        finally:
            injected.remove()

    def fail(self, how: str) -> None:
        """From now on, until heal."""
        part = self.dice.choice([0.3, 0.7, 1.0])
        after = self.dice.randrange(1, 200_000)
        match how:
            case "500" | "503":
                self.proxy.inject(Fault(FaultKind.ANSWER, status=int(how), probability=part))
                self.proxy.inject(Fault(FaultKind.ANSWER_AFTER, status=int(how), probability=part))
            case "slow":
                self.proxy.inject(Fault(FaultKind.SLOW, bytes_per_s=500e3))
            case "answers cut off":
                self.proxy.inject(
                    Fault(FaultKind.CUT_RESPONSE, after_bytes=self.dice.choice([0, after]), probability=part)
                )
            case "requests cut off":
                self.proxy.inject(Fault(FaultKind.CUT_REQUEST, after_bytes=after, probability=part))
            case "bits flipped on the way":
                self.proxy.inject(Fault(FaultKind.FLIP, after_bytes=after, probability=part))
            case "down":
                self.proxy.down()
                self._down = True

    def heal(self) -> None:
        """All is well again."""
        self.proxy.clear()
        if self._down:
            self._down = False
            self.proxy.up()


def sensors() -> tuple[str, ...]:
    """What can be seen of uploads."""
    return tuple(_SENSORS)


def _age(manifest: Manifest) -> Age:
    return manifest.generation, manifest.step
