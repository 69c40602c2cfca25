"""Promise: `--section.key value` reaches every key with the right type, and a wrong one says so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.load import ConfigError, load_job
from configs.schema import DataSet


def test_both_forms_and_every_kind_of_value() -> None:
    overrides = ["--training.steps", "7", "--optimizer.lr=1e-4", "--optimizer.eps", ".5", "--training.compile", "true"]
    overrides += ["--run.name=x-1", "--data.sets", '[{path = "a"}, {path = "b", weight = 2}]']
    job = load_job("debug_dense", [*overrides, "--optimizer.warmup_steps=0"])
    assert (job.training.steps, job.optimizer.lr, job.training.compile, job.run.name) == (7, 1e-4, True, "x-1")
    assert job.optimizer.eps == 0.5
    assert job.data.sets == (DataSet(path="a"), DataSet(path="b", weight=2.0))


def test_last_of_equal_overrides_wins_and_bare_booleans_are_true() -> None:
    job = load_job("debug_dense", ["--training.compile", "--run.seed", "1", "--run.seed=2"])
    assert job.training.compile is True
    assert job.run.seed == 2


@pytest.mark.parametrize("text", ["2024", "2024-01-01", "true", "1e5", "demo", '"demo"', "a=b"])
def test_text_keys_take_text_whatever_it_looks_like(text: str) -> None:
    assert load_job("debug_dense", [f"--telemetry.wandb_project={text}"]).telemetry.wandb_project == text.strip('"')


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--training.stepz", "5"], ["command line: --training.stepz", '"5"', "did you mean training.steps?"]),
        (["--trainig.steps", "5"], ["--trainig.steps", "did you mean training.steps?"]),
        (["--steps=5"], ["--steps", "did you mean training.steps?"]),
        (["--training.steps", "many"], ['--training.steps "many"', "a whole number"]),
        (["--training.steps=-3"], ["--training.steps -3", "1 or more"]),
        (["--training.steps", "-3"], ["--training.steps -3", "1 or more"]),
        (["--training.steps"], ["--training.steps", "value is missing", "a whole number"]),
        (["--training.steps", "--run.seed", "1"], ["--training.steps", "value is missing"]),
        (["training.steps=5"], ["'training.steps=5'", "--section.key value"]),
        (["--optimizer.schedule", "cosin"], ['--optimizer.schedule "cosin"', 'did you mean "cosine"?']),
        (["--data.sets.path", "x"], ["--data.sets.path", "give data.sets as a whole"]),
        (["--data.sets", '[{pth = "x"}]'], ["data.sets[0].pth", "did you mean", '"path"']),
        (["--training.steps", "5\nseq_len = 3"], ["--training.steps", "a whole number"]),
        (["--run.name=a\udcffb"], ["--run.name", "UTF-8"]),
        (["--parallelism.tp", "3"], ["tp 3"]),
    ],
)
def test_wrong_overrides_name_the_command_line_key_and_fix(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job("debug_dense", overrides)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_file_and_command_line_are_told_apart() -> None:
    with pytest.raises(ConfigError) as caught:
        load_job("debug_dense", ["--checkpoint.persist_interval_steps=3", "--checkpoint.ram_interval_steps=2"])
    assert str(caught.value).startswith("command line: --checkpoint.persist_interval_steps 3: ")
    with pytest.raises(ConfigError) as caught:
        load_job("debug_dense", ["--training.steps=1"])
    assert "debug_dense.toml: optimizer.warmup_steps = 2: " in str(caught.value)


def problem_keys(arguments: list[str]) -> list[str] | None:
    """The keys that a refusal names, or None for a job that loads."""
    try:
        load_job("debug_dense", arguments)
    except ConfigError as error:
        return [problem.key for problem in error.problems]
    return None


@given(st.lists(st.text(max_size=30), max_size=4))
def test_no_argument_ends_in_another_exception(arguments: list[str]) -> None:
    assert (problem_keys(arguments) is None) == (not arguments)


@given(
    st.sampled_from(["run.name", "training.steps", "optimizer.lr", "data.sets", "training.compile"]),
    st.text(max_size=40) | st.text(alphabet="[]{}=\"'0123456789.e-,", max_size=20),
)
def test_no_value_ends_in_another_exception_and_refusals_name_the_key(key: str, value: str) -> None:
    keys = problem_keys([f"--{key}={value}"])
    if keys is not None:
        assert any(each.startswith(key) or each == "optimizer.warmup_steps" for each in keys)


def test_values_without_end_are_text_or_refused() -> None:
    assert problem_keys(["--training.steps=" + "9" * 5000]) == ["training.steps"]
    assert problem_keys(["--data.sets=" + "[" * 5000]) == ["data.sets"]
