"""Promise: a configuration is accepted exactly when its numbers fit together, and a refusal says what to set."""

from __future__ import annotations

from math import prod
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from configs.load import ConfigError, check_files, load_job
from configs.schema import JobConfig

SMALL = st.integers(1, 6)


def load(*overrides: str, preset: str = "debug_dense") -> JobConfig:
    return load_job(preset, list(overrides))


def message(*overrides: str, preset: str = "debug_dense") -> str | None:
    """What a refusal says, or None for a job that loads."""
    try:
        load(*overrides, preset=preset)
    except ConfigError as error:
        return str(error)
    return None


def refusal(*overrides: str, preset: str = "debug_dense") -> str:
    text = message(*overrides, preset=preset)
    assert text is not None, "the configuration was accepted"
    return text


def accepted(*overrides: str, preset: str = "debug_dense") -> bool:
    return message(*overrides, preset=preset) is None


@given(
    degrees=st.fixed_dictionaries(dict.fromkeys(("pp", "dp_replicate", "dp_shard", "tp"), SMALL)),
    schedule=st.sampled_from(["1F1B", "Interleaved1F1B"]),
    surplus=st.integers(-1, 1),
    layers=SMALL,
)
def test_a_mesh_is_accepted_exactly_when_it_fits(
    degrees: dict[str, int], schedule: str, surplus: int, layers: int
) -> None:
    """16 heads, 2048 tokens of vocabulary, 720 sequences of 64 tokens."""
    pp, dp, tp = degrees["pp"], degrees["dp_replicate"] * degrees["dp_shard"], degrees["tp"]
    interleaved = schedule == "Interleaved1F1B"
    ranks = prod(degrees.values()) + surplus
    assume(ranks > 0)
    fits = (
        surplus == 0
        and 720 % dp == 0
        and 16 % tp == 0
        and (pp == 1 or layers >= pp * (2 if interleaved else 1))
        and (pp == 1 or not interleaved or (720 // dp) % pp == 0)
    )
    arguments = [f"--parallelism.{axis}={degree}" for axis, degree in degrees.items()]
    arguments += [f"--parallelism.pp_schedule={schedule}", f"--model.layers={layers}", "--training.seq_len=64"]
    arguments += [f"--cluster.ranks_per_node={ranks}", "--training.global_batch_size=720"]
    arguments += ["--training.microbatch_size=1"]
    assert accepted(*arguments) == fits


@given(pp=SMALL, dp_shard=SMALL, tp=SMALL, nodes=SMALL, ranks=SMALL)
def test_the_offered_fix_of_a_wrong_product_fixes_it(pp: int, dp_shard: int, tp: int, nodes: int, ranks: int) -> None:
    arguments = [f"--parallelism.pp={pp}", f"--parallelism.dp_shard={dp_shard}", f"--parallelism.tp={tp}"]
    arguments += [f"--cluster.nodes={nodes}", f"--cluster.ranks_per_node={ranks}"]
    assume(pp * dp_shard * tp != nodes * ranks)
    line = next(line for line in refusal(*arguments).splitlines() if "dp_replicate 1" in line and "ranks, but" in line)
    assert f"pp {pp} * dp_replicate 1 * dp_shard {dp_shard} * cp 1 * tp {tp} = {pp * dp_shard * tp} ranks" in line
    for offer in line.partition("; set ")[2].split(" or ") if "; set " in line else []:
        key, _, value = offer.partition(" = ")
        assert "ranks, but" not in (message(*arguments, f"--{key}={value}") or "")


@given(batch=st.integers(1, 64), dp_shard=SMALL, microbatch=st.integers(1, 8))
def test_batches_are_accepted_exactly_when_they_divide(batch: int, dp_shard: int, microbatch: int) -> None:
    arguments = [f"--parallelism.dp_shard={dp_shard}", f"--cluster.ranks_per_node={dp_shard}"]
    arguments += [f"--training.global_batch_size={batch}", f"--training.microbatch_size={microbatch}"]
    assert accepted(*arguments) == (batch % dp_shard == 0 and (batch // dp_shard) % microbatch == 0)


@given(ep=st.integers(2, 16), dp_shard=SMALL, tp=st.sampled_from([1, 2, 4]))
def test_expert_parallelism_divides_ranks_and_experts(ep: int, dp_shard: int, tp: int) -> None:
    arguments = [f"--parallelism.ep={ep}", f"--parallelism.dp_shard={dp_shard}", f"--parallelism.tp={tp}"]
    arguments += [f"--cluster.ranks_per_node={dp_shard * tp}", f"--training.global_batch_size={2 * dp_shard}"]
    assert accepted(*arguments, preset="debug_moe") == ((dp_shard * tp) % ep == 0 and 8 % ep == 0)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--parallelism.ep=2"], ["parallelism.ep", "no experts", "parallelism.ep = 1"]),
        (["--parallelism.cp=2"], ["--parallelism.cp 2", "does not run yet", "parallelism.cp = 1"]),
        (["--parallelism.tp=32"], ["16 heads", "1, 2, 4, 8, 16"]),
        (["--parallelism.tp=2", "--model.vocab_size=2049"], ["vocabulary of 2049", "model.vocab_size = 2050"]),
        (["--training.seq_len=127", "--parallelism.tp=2"], ["--training.seq_len 127", "multiple of 2"]),
        (["--training.seq_len=262144"], ["positions for 131072 tokens"]),
        (["--training.global_batch_size=5"], ["dp_replicate 1 * dp_shard 2 = 2", "set 6"]),
        (["--training.microbatch_size=3"], ["--training.microbatch_size 3", "1, 2"]),
        (["--parallelism.pp=4", "--model.layers=2"], ["--parallelism.pp 4", "4 stages of 2 layers", "at most 2"]),
        (["--model.layers=7"], ["--model.layers 7", "6 layers", "give fewer"]),
        (["--optimizer.warmup_steps=21"], ["training.steps = 20", "at most 20", "at least 21"]),
        (["--optimizer.schedule=wsd", "--optimizer.decay_fraction=1.0"], ["decay_fraction", "at most 0.9"]),
        (["--evaluation.command=['lm_eval']"], ["would never be run", "evaluation.interval_steps, for example to 100"]),
        (["--evaluation.interval_steps=20"], ["nothing to run", "evaluation.command"]),
        (["--evaluation.interval_steps=15", "--evaluation.command=['x']"], ["every 10 steps", "set 20"]),
        (["--evaluation.ema=true"], ["no average of the weights", "set ema.decay"]),
        (["--optimizer.muon_momentum=1.0"], ["optimizer.muon_momentum", "below 1"]),
        (["--optimizer.decay_shape=sqrt"], ["cosine has its own shape", 'set optimizer.schedule = "wsd"']),
        (["--optimizer.beta2=1.0"], ["optimizer.beta2", "below 1"]),
        (["--checkpoint.ram_interval_steps=4"], ["persist_interval_steps = 10", "multiple of", "set 12"]),
        (["--checkpoint.keep_every_steps=15"], ["keep_every_steps 15", "set 20"]),
        (["--checkpoint.peer_wait_s=10"], ["peer_wait_s", "hang_floor_s = 3", "set 1.5"]),
        (["--health.heartbeat_timeout_s=1"], ["more than two intervals", "set 2.5"]),
        (["--health.hang_floor_s=1"], ["hang_floor_s", "heartbeat_interval_s = 0.5", "set 3"]),
        (["--numbers.max_skips=9"], ["numbers.skip_window_steps", "among 8", "set at least 9"]),
        (["--data.sets=[]"], ["data.sets", "no data", "[[data.sets]]"]),
        (["--model.family=qwen3", "--parallelism.pp=2"], ["shares its first and last weights"]),
    ],
)
def test_refusals_say_what_to_set(overrides: list[str], parts: list[str]) -> None:
    text = refusal(*overrides)
    assert all(part in text for part in parts), text


SETS = '--validation.sets=[{path = "held-out"}]'


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--validation.interval_steps=10"], ["validation.interval_steps 10", "[[validation.sets]]", "or set 0"]),
        (["--checkpoint.keep_best=1"], ["checkpoint.keep_best 1", "validation.interval_steps = 10", "or set 0"]),
        (["--checkpoint.keep_best=2", SETS], ["checkpoint.keep_best 2", "validation.interval_steps = 10"]),
        (["--checkpoint.keep_best=2", SETS, "--validation.interval_steps=12"], ["keep_best = 2", "set 20"]),
        (["--checkpoint.keep_best=2", SETS, "--validation.interval_steps=20"], None),
        ([SETS, "--validation.interval_steps=12"], None),
        ([SETS], None),
    ],
)
def test_the_best_can_only_be_kept_where_it_is_measured_and_saved(
    overrides: list[str], parts: list[str] | None
) -> None:
    """Accepted exactly if every measured step is written; a refusal names the value that is accepted."""
    assert accepted(*overrides) == (parts is None)
    assert all(part in refusal(*overrides) for part in parts or [])


def test_files_of_the_validation_sets_are_checked_too(tmp_path: Path) -> None:
    """A held-out corpus that is missing is noticed before a run begins, not at its first evaluation."""
    job = load(f'--validation.sets=[{{path = "{tmp_path}/held"}}]', "--validation.interval_steps=1")
    assert "validation.sets[0].path" in [problem.key for problem in check_files(job)]
    for name in ("held.bin", "held.idx"):
        (tmp_path / name).touch()
    assert "validation.sets[0].path" not in [problem.key for problem in check_files(job)]


def test_pipeline_microbatches_must_divide_the_share_of_a_rank() -> None:
    mesh = ["--parallelism.pp=2", "--parallelism.dp_shard=1", "--training.microbatch_size=1"]
    assert accepted(*mesh, "--parallelism.pp_microbatch_size=2")
    assert accepted(*mesh, "--parallelism.pp_microbatch_size=4"), "fewer microbatches than stages only idle"
    assert "1, 2, 4" in refusal(*mesh, "--parallelism.pp_microbatch_size=3")
    interleaved = [*mesh, "--parallelism.pp_schedule=Interleaved1F1B", "--model.layers=4"]
    assert accepted(*interleaved, "--parallelism.pp_microbatch_size=2")
    assert "Interleaved1F1B needs a multiple of parallelism.pp = 2" in refusal(
        *interleaved, "--parallelism.pp_microbatch_size=4"
    )


def test_layers_without_experts_refuse_expert_parallelism() -> None:
    assert "model.layers" in refusal("--model.layers=1", preset="debug_moe")


@given(st.text(alphabet="aZ9._-/ \n\x00é", min_size=0, max_size=5))
def test_run_names_are_safe_single_folders(name: str) -> None:
    safe = bool(name) and name[0] not in ".-" and set(name) <= set("aZ9._-")
    assert accepted(f"--run.name={name}") == safe


def test_files_are_checked_apart_and_name_the_command_that_makes_them(tmp_path: Path) -> None:
    job = load(f"--data.tokenizer={tmp_path}/t.json", f'--data.sets=[{{path = "{tmp_path}/c"}}]')
    assert [problem.key for problem in check_files(job)] == ["data.sets[0].path", "data.tokenizer"]
    assert all("everstep data prepare" in problem.message for problem in check_files(job))
    for name in ("c.bin", "c.idx"):
        (tmp_path / name).touch()
    (tmp_path / "t.json").write_text('{"model": {"vocab": {"a": 0}}}')
    assert check_files(job) == []
    (tmp_path / "c.idx").unlink()
    (problem,) = check_files(job)
    assert "c.idx" in problem.message
    assert "c.bin" not in problem.message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 2047}}, "added_tokens": [{"id": 2046}]}', None),
        ('{"model": {"vocab": {"a": 0, "b": 2048}}}', ["has 2049 tokens", "room for 2048", "at least 2049"]),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 2048, "content": "x"}]}', ["has 2049 tokens"]),
        ('{"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}', None),
        ("", ["no tokenizers JSON"]),
        ('{"model": 3}', ["no tokenizers JSON", "$.model"]),
    ],
)
def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path: Path, text: str, parts: list[str] | None) -> None:
    """An id beyond the embedding would otherwise crash a step, on a GPU without a readable message."""
    (tmp_path / "t.json").write_text(text)
    for name in ("c.bin", "c.idx"):
        (tmp_path / name).touch()
    job = load(f"--data.tokenizer={tmp_path}/t.json", f'--data.sets=[{{path = "{tmp_path}/c"}}]')
    found = "\n".join(str(problem) for problem in check_files(job))
    assert bool(found) == (parts is not None)
    assert all(part in found for part in parts or []), found


def test_structs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        load().training.steps = 3  # type: ignore[misc]
    assert msgspec.structs.replace(load().training, steps=3).steps == 3
