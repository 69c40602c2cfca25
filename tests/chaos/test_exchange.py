"""A run that begins from an imported checkpoint is the run that it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpointing.export_dcp import export_dcp
from checkpointing.export_hf import export_hf
from checkpointing.import_dcp import import_dcp
from checkpointing.import_hf import import_hf
from configs.load import load_job
from tests.chaos.conftest import MakeJob

pytestmark = [pytest.mark.chaos, pytest.mark.long]

SMALL = ("--cluster.spares", "0", "--cluster.nodes", "1", "--parallelism.tp", "1", "--training.steps", "6")
KEEP = ("--checkpoint.keep_last", "10")


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def test_a_run_goes_on_from_an_import(make_job: MakeJob, tmp_path: Path) -> None:
    """Promise: from a torch checkpoint of step 3, the same losses to the last bit and the same count of tokens.

    A Hugging Face folder has neither moments nor a step: the run begins at step 1, with the trained weights.
    """
    source = make_job("source", (*SMALL, *KEEP)).start()
    assert source.finish() == 0, source.said()
    export_dcp(source.run_dir, 3, tmp_path / "dcp", silent)
    export_hf(source.run_dir, 3, tmp_path / "hf", "float32", silent)
    config = load_job(source.run_dir / "config.toml")

    resumed = make_job("resumed", SMALL)
    assert import_dcp(tmp_path / "dcp", config, resumed.run_dir, silent) == 3
    resumed.start()
    assert resumed.finish() == 0, resumed.said()
    assert {step: loss for step, loss in source.losses().items() if step > 3} == resumed.losses()
    assert [record.tokens_seen for record in resumed.steps()] == [record.tokens_seen for record in source.steps()][3:]

    tuned = make_job("tuned", SMALL)
    assert import_hf(tmp_path / "hf", config, tuned.run_dir, silent) == 0
    tuned.start()
    assert tuned.finish() == 0, tuned.said()
    first_of_new, first_of_old = tuned.losses()[1], source.losses()[1]
    assert first_of_new is not None
    assert first_of_old is not None
    assert first_of_new < first_of_old
    assert len(tuned.losses()) == 6
