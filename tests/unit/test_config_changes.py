"""Promise: a resume may change how a run runs, never what it computes, and says why."""

from __future__ import annotations

import msgspec
import pytest

from configs.changes import resume_rule
from configs.load import describe_changes, load_job
from configs.schema import JobConfig

KEYS = [
    f"{section.name}.{field.name}"
    for section in msgspec.structs.fields(JobConfig)
    for field in msgspec.structs.fields(section.type)
]
MAY_CHANGE = {"run.dir", "data.prefetch_steps", "precision.reuse_weights"} | {
    f"training.{name}" for name in ("steps", "microbatch_size", "compile", "activation_checkpoint")
}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_rule_with_a_reason(key: str) -> None:
    allowed, why = resume_rule(key)
    how = {"parallelism", "cluster", "checkpoint", "health", "integrity", "numbers", "telemetry", "s3", "validation"}
    layout = key.partition(".")[0] in how | {"alerts", "evaluation"}
    assert allowed == (layout or key in MAY_CHANGE)
    assert allowed or "another run.name" in why


def test_equal_jobs_have_no_changes() -> None:
    assert describe_changes(load_job("demo"), load_job("demo")) == []


def test_changes_carry_both_values() -> None:
    overrides = ["--parallelism.tp=1", "--parallelism.dp_shard=4", "--run.seed=3", "--training.microbatch_size=2"]
    overrides += ["--data.sets", '[{path = "other"}]']
    changes = {change.key: change for change in describe_changes(load_job("demo"), load_job("demo", overrides))}
    allowed = {"parallelism.tp", "parallelism.dp_shard", "training.microbatch_size"}
    assert {key for key, change in changes.items() if change.allowed} == allowed
    assert {key for key, change in changes.items() if not change.allowed} == {"run.seed", "data.sets"}
    assert (changes["parallelism.dp_shard"].old, changes["parallelism.dp_shard"].new) == (2, 4)
