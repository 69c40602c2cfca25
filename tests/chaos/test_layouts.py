"""A run goes on with another layout: other degrees, another number of ranks."""

from __future__ import annotations

import shutil

import pytest

from tests.chaos.conftest import MakeJob

pytestmark = pytest.mark.chaos

BASE = ("--cluster.spares", "0", "--checkpoint.keep_last", "10")
PP = ("--parallelism.pp", "2", "--parallelism.dp_shard", "2", "--parallelism.tp", "1")
FSDP = ("--parallelism.pp", "1", "--parallelism.dp_shard", "4", "--parallelism.tp", "1")
OTHER = {
    "two-ranks": ("--cluster.nodes", "1", "--parallelism.dp_shard", "1", "--parallelism.tp", "2"),
    "fsdp-to-tp": ("--parallelism.dp_shard", "1", "--parallelism.tp", "4"),
    "pp": PP,
}
# fp32 on CPU: a layout only changes the order of sums.
TOLERANCE = 2e-4


@pytest.mark.long
def test_a_resume_on_another_layout_continues_the_run(make_job: MakeJob) -> None:
    """Promise: 4 ranks to 2, FSDP to TP, FSDP x TP to PP and back to FSDP: losses go on within float tolerance."""
    start = make_job("layout", BASE).start("--training.steps", "6")
    assert start.finish() == 0, start.said()
    copies = {}
    for name, overrides in OTHER.items():
        copies[name] = make_job(f"layout-{name}", (*BASE, *overrides))
        shutil.copytree(start.run_dir, copies[name].run_dir)
        config = copies[name].run_dir / "config.toml"
        config.write_text(config.read_text().replace('name = "layout"', f'name = "layout-{name}"'))
    start.start("--training.steps", "12")
    assert start.finish() == 0, start.said()
    unchanged = start.losses()
    for job in copies.values():
        job.start("--training.steps", "9")
        assert job.finish() == 0, job.said()
    copies["pp"].start("--training.steps", "12", *FSDP)
    assert copies["pp"].finish() == 0, copies["pp"].said()
    for job in copies.values():
        continued = job.losses()
        for step in range(7, max(continued) + 1):
            assert continued[step] == pytest.approx(unchanged[step], abs=TOLERANCE), f"{job.name}, step {step}"
