"""The job's key as a Secret: new with each submission, and in no other object, argument or variable.

`python -m cluster.kube_key FOLDER` writes it into a folder, for those who apply manifests by hand.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from cluster.keys import JobKeys, new_keys, read_keys
from cluster.kube_plan import KubePlan
from cluster.kube_pods import Manifest
from cluster.rundir import RunDir
from trainer.paths import transfer_key_path


def new_key_files() -> Mapping[str, bytes]:
    """What a run has in `secrets/`, by name of the file."""
    run_dir = RunDir(Path("/"))
    keys = msgspec.json.encode(new_keys())
    return {run_dir.keys.name: keys, transfer_key_path(run_dir.path).name: secrets.token_bytes(32)}


def secret(plan: KubePlan, files: Mapping[str, bytes]) -> Manifest:
    """The Secret that all pods of the job mount as files."""
    data = {name: base64.b64encode(content).decode() for name, content in files.items()}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": plan.metadata(f"{plan.name}-key"),
        "type": "Opaque",
        "data": data,
    }


def submission_of(folder: Path) -> str:
    """What tells this submission from others of the same run: made of its key, and no secret.

    Raises:
        OSError: if there is no key.
        ValueError: if it is damaged or others may read it.
    """
    keys: JobKeys = read_keys(folder / "job.json")
    return hashlib.sha256(f"{keys.server.public}{keys.client.public}".encode()).hexdigest()[:16]


def link_keys(run_dir: RunDir, folder: Path) -> None:
    """Have the run's keys be those in folder, where every pod has them mounted: none lies on the shared volume.

    To be called by who holds the run: a live supervisor's keys must not change.

    Raises:
        OSError: if the run directory cannot be written.
    """
    place = run_dir.keys.parent
    if place.is_symlink():
        if place.readlink() == folder:
            return
    elif place.exists():
        # From a time when the run was on another kind of cluster; it may go back there.
        before = place.with_name(f"{place.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        place.rename(before)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder)
    temporary.replace(place)


def main() -> int:
    """Entry point."""
    folder = Path(sys.argv[1])
    folder.mkdir(mode=0o700)
    for name, content in new_key_files().items():
        fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
