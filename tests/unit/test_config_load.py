"""Promise: a wrong configuration is refused with the file, the key, the value and the fix; a right one loads fast."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import ConfigError, load_job, parse_job, preset_paths, resolve_toml

GOOD = """
[run]
name = "a"

[model]
family = "llama3"
flavor = "debugmodel"

[data]
tokenizer = "t.json"

[[data.sets]]
path = "corpus"

[training]
steps = 10
seq_len = 64
global_batch_size = 4
"""


def lines_of(text: str, *overrides: str) -> list[str]:
    """The lines of the error that a text and overrides give."""
    with pytest.raises(ConfigError) as caught:
        parse_job(text, "job.toml", overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("[training]", "[trainig]", ["job.toml: trainig:", "did you mean [training]?"]),
        ("steps = 10", "stepz = 10", ["job.toml: training.stepz = 10:", "did you mean training.steps?"]),
        ("steps = 10", "steps = 10\nlr = 0.1", ["job.toml: training.lr = 0.1:", "did you mean optimizer.lr?"]),
        ('"llama3"', '"lama3"', ['job.toml: model.family = "lama3":', 'did you mean "llama3"?', "deepseek_v3"]),
        ('"debugmodel"', '"8b"', ['job.toml: model.flavor = "8b":', 'did you mean "8B"?', "405B"]),
        ("steps = 10", 'steps = "ten"', ['job.toml: training.steps = "ten":', "a whole number, 1 or more", "is text"]),
        ("steps = 10", "steps = true", ["training.steps = true:", "a whole number", "is a boolean"]),
        ("steps = 10", "steps = 1.5", ["training.steps = 1.5:", "a whole number"]),
        ("steps = 10", "steps = 0", ["training.steps = 0:", "1 or more, but is 0"]),
        ("[run]", "[ema]\ndecay = 1.5\n[run]", ["ema.decay = 1.5:", "0 or more and below 1, but is 1.5"]),
        ('path = "corpus"', "path = 3", ["data.sets[0].path = 3:", "text in quotes"]),
        ('path = "corpus"', 'path = "c"\nweigth = 2', ["data.sets[0].weigth = 2:", 'did you mean "weight"?']),
        ('path = "corpus"', "weight = 2", ["data.sets[0].path:", "missing", "below [[data.sets]]"]),
        ('[run]\nname = "a"', 'run = "a"', ['job.toml: run = "a":', "[run] on a line of its own"]),
        ('[run]\nname = "a"', "[run]", ["job.toml: run.name:", "missing; add name = ...", "below [run]"]),
        ('name = "a"', 'name = "a"\nseed = -1', ["run.seed = -1:", "0 or more"]),
        ('[run]\nname = "a"', "steps = 3\n[run]\nname = 'a'", ["job.toml: steps = 3:", "training.steps"]),
    ],
)
def test_one_mistake_gives_one_line_with_key_value_and_fix(old: str, new: str, parts: list[str]) -> None:
    assert old in GOOD
    lines = lines_of(GOOD.replace(old, new))
    for part in parts:
        assert part in lines[0], lines


def test_all_mistakes_are_reported_at_once() -> None:
    text = GOOD.replace("steps = 10", "stepz = 10\nseq_length = 5").replace('name = "a"', 'name = "a"\nsed = 1')
    keys = [line.split(": ")[1].split(" = ")[0] for line in lines_of(text)]
    assert keys == ["run.sed", "training.stepz", "training.seq_length", "training.steps"]


def test_missing_section_names_each_key_it_needs() -> None:
    lines = lines_of(GOOD.partition("[training]")[0])
    assert [line.partition(": missing")[0] for line in lines] == [
        "job.toml: training.steps",
        "job.toml: training.seq_len",
        "job.toml: training.global_batch_size",
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[run]\nname = demo\n", ["line 2", "name = demo", "quotes"]),
        ("[run]\nname = 'a'\nname = 'b'\n", ["line 3", "Cannot overwrite"]),
        ("[run\nname = 1", ["line 1", "'[run'"]),
        ("[run]\nname =", ["line 2"]),
    ],
)
def test_syntax_errors_carry_file_line_and_text(text: str, parts: list[str]) -> None:
    (line,) = lines_of(text)
    assert line.startswith("job.toml: ")
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_numbers_must_be_finite(value: str) -> None:
    (line,) = lines_of(GOOD + f"[optimizer]\nlr = {value}\n")
    assert f"optimizer.lr = {value}" in line


@pytest.mark.parametrize("text", ["[run]\nseed = " + "9" * 5000, "[run]\nseed = " + "[" * 5000])
def test_toml_without_end_is_refused(text: str) -> None:
    (line,) = lines_of(text)
    assert line.startswith("job.toml: ")


def test_whole_numbers_fit_in_64_bits() -> None:
    (line,) = lines_of(GOOD, f"--run.seed={2**63}")
    assert f"--run.seed {2**63}: does not fit in 64 bits" in line


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("\ufeff" + GOOD, encoding="utf-8")
    assert load_job(path).run.name == "a"


def test_files_that_cannot_be_read_name_the_file_and_the_nearest_preset(tmp_path: Path) -> None:
    for name, part in [("llama3_8bb", 'did you mean "llama3_8b"?'), (str(tmp_path), "is a folder")]:
        with pytest.raises(ConfigError, match=part.replace("?", r"\?")) as caught:
            load_job(name)
        assert name in str(caught.value)
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'[run]\nname = "\xe4"\n')
    with pytest.raises(ConfigError, match="UTF-8"):
        load_job(latin)


@pytest.mark.parametrize("name", preset_paths())
def test_presets_resolve_validate_and_round_trip(name: str) -> None:
    job = load_job(name)
    assert parse_job(resolve_toml(job), "resolved.toml") == job


def test_round_trip_keeps_awkward_text_and_blends() -> None:
    data_sets = '[{path = "a b\\"\\\\ä\\u007f\\t", weight = 0.1}, {path = "c", weight = 1e-7}]'
    job = parse_job(GOOD, "job.toml", ["--data.sets", data_sets, "--telemetry.wandb_project", "two\nlines"])
    assert job.data.sets[0].path == 'a b"\\ä\x7f\t'
    assert parse_job(resolve_toml(job), "resolved.toml") == job


def test_resolved_file_loads_from_disk(tmp_path: Path) -> None:
    job = parse_job(GOOD, "job.toml")
    path = tmp_path / "config.toml"
    path.write_text(resolve_toml(job), encoding="utf-8")
    assert load_job(path) == job


def test_configuration_needs_no_torch_and_takes_milliseconds() -> None:
    """Ten presets in half a second of CPU: loose, for slow machines; 0.03 s is usual."""
    code = (
        "import sys, time; from configs.load import load_job, preset_paths, resolve_toml; t = time.process_time()\n"
        "for name in preset_paths(): resolve_toml(load_job(name))\n"
        "assert time.process_time() - t < 0.5, time.process_time() - t\n"
        "heavy = {'torch', 'torchtitan', 'megatron', 'numpy', 'rich', 'tyro'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
