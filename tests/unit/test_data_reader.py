"""A step's batch: a pure function of seed and step, the same for every layout, and read ahead without surprises."""

import gc
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import DataConfig, DataSet, JobConfig, ModelConfig, RunConfig, TrainingConfig
from trainer.data import Prefetcher, StepReader, document_positions
from trainer.indexed import CorpusWriter, bin_path, idx_path
from trainer.ledger import SampleLedger, check_exactly_once, committed_samples
from trainer.prepare import PrepareSettings, prepare

SEQ_LEN = 8
VOCAB = 1 << 20


def write_set(prefix: Path, documents: int, base: int = 0) -> Path:
    """A set whose token ids are all different, so that a token tells where it comes from."""
    writer = CorpusWriter(prefix, VOCAB)
    token = base
    for i in range(documents):
        length = 1 + (7 * i) % 23
        writer.add(np.arange(token, token + length))
        token += length
    writer.finish()
    return prefix


def job(
    prefixes: Sequence[Path], weights: Sequence[float] = (), seed: int = 0, batch: int = 8, tokenizer: str = ""
) -> JobConfig:
    sets = tuple(DataSet(path=str(prefix), weight=weights[i] if weights else 1.0) for i, prefix in enumerate(prefixes))
    return JobConfig(
        run=RunConfig(name="test", seed=seed),
        model=ModelConfig(family="llama3", flavor="debugmodel", vocab_size=VOCAB),
        data=DataConfig(sets=sets, tokenizer=tokenizer),
        training=TrainingConfig(steps=10, seq_len=SEQ_LEN, global_batch_size=batch),
    )


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "one", 60)


@pytest.mark.parametrize("dp_degree", [1, 2, 4, 8])
def test_layouts_read_the_same_tokens(prefix: Path, dp_degree: int) -> None:
    """Ranks side by side hold the single rank's batch, row for row, over several epochs."""
    config = job([prefix])
    alone = StepReader(config, 0, 1)
    ranks = [StepReader(config, dp_rank, dp_degree) for dp_rank in range(dp_degree)]
    for step in (1, 2, 5, 40, 41):
        parts = [rank.read(step) for rank in ranks]
        assert np.array_equal(np.concatenate([part.tokens for part in parts]), alone.read(step).tokens)
        assert [part.first for part in parts] == [(step - 1) * 8 + i * 8 // dp_degree for i in range(dp_degree)]


def test_an_epoch_holds_every_token_once(prefix: Path) -> None:
    """Through the real files: labels of one epoch never repeat, and all but a tail shorter than a sample are there."""
    reader = StepReader(job([prefix], batch=1), 0, 1)
    total = sum(1 + (7 * i) % 23 for i in range(60))
    windows = (total - 1) // SEQ_LEN
    for epoch in range(2):
        labels = np.concatenate([reader.read(epoch * windows + i + 1).tokens[0, 1:] for i in range(windows)])
        assert len(np.unique(labels)) == len(labels) == windows * SEQ_LEN
        assert total - len(labels) <= SEQ_LEN


def test_steps_can_be_read_in_any_order(prefix: Path) -> None:
    """A fresh reader at step 30 reads what one that came from step 1 reads: there is no state to restore."""
    config = job([prefix], seed=5)
    walked = StepReader(config, 0, 1)
    batches = {step: walked.read(step) for step in range(1, 31)}
    for step in (30, 3, 17):
        fresh = StepReader(config, 0, 1).read(step)
        assert np.array_equal(fresh.tokens, batches[step].tokens)
        assert fresh.digest == batches[step].digest
        assert np.array_equal(walked.read(step).tokens, batches[step].tokens)
    assert len({batch.digest for batch in batches.values()}) == 30


def test_seed_changes_the_order(prefix: Path) -> None:
    """Two seeds, two orders."""
    first, second = (StepReader(job([prefix], seed=seed), 0, 1).read(1) for seed in (0, 1))
    assert first.digest != second.digest


def test_blend_draws_by_weight(prefix: Path, tmp_path: Path) -> None:
    """A 3:1 blend gives three rows of the first set for one of the second in every four."""
    other = write_set(tmp_path / "other", 40, base=500_000)
    reader = StepReader(job([prefix, other], weights=[3, 1], batch=4), 0, 1)
    for step in range(1, 20):
        rows = reader.read(step).tokens
        assert (rows[:, 0] >= 500_000).sum() == 1
        assert ((rows >= 500_000).all(axis=1) | (rows < 500_000).all(axis=1)).all()


def test_ledger_of_a_changing_layout_is_exactly_once(prefix: Path, tmp_path: Path) -> None:
    """Four ranks for three steps, then two ranks that repeat the third: every sample counts once."""
    config = job([prefix])
    for generation, dp_degree, steps in ((0, 4, range(1, 4)), (1, 2, range(3, 7))):
        for dp_rank in range(dp_degree):
            reader, ledger = StepReader(config, dp_rank, dp_degree), SampleLedger(tmp_path, dp_rank, generation)
            for step in steps:
                batch = reader.read(step)
                ledger.append(step, batch.first, batch.count, batch.digest)
    check_exactly_once(committed_samples(tmp_path), steps=6, global_batch=8)


@pytest.mark.parametrize("dp_degree", [1, 4])
def test_what_is_left_out_is_never_read_and_all_else_is(prefix: Path, tmp_path: Path, dp_degree: int) -> None:
    """On any layout, later steps move up; the ledger has what was passed over, what was skipped, and nothing twice."""
    config, left_out = job([prefix]), ((2, 1), (4, 2))
    plain = StepReader(config, 0, 1)
    for dp_rank in range(dp_degree):
        reader = StepReader(config, dp_rank, dp_degree, left_out=left_out)
        ledger = SampleLedger(tmp_path, dp_rank, 0)
        for step in range(1, 5):
            batch = reader.read(step)
            ledger.append(step, batch.first, batch.count, batch.digest, batch.passed)
            if step == 2:
                ledger.append(step, batch.first, batch.count, batch.digest, batch.passed, skipped=True)
            rows = plain.read((1, 3, 6, 7)[step - 1]).tokens[dp_rank * batch.count :][: batch.count]
            assert np.array_equal(batch.tokens, rows)
            assert batch.batch == (1, 3, 6, 7)[step - 1]
    samples = committed_samples(tmp_path)
    check_exactly_once(samples, 4, 8, left_out)
    with pytest.raises(ValueError, match="step 2"):
        check_exactly_once(samples, 4, 8)
    assert [samples[step][0].passed for step in range(1, 5)] == [(), ((8, 8),), ((24, 16),), ()]
    assert [all(line.skipped for line in samples[step]) for step in range(1, 5)] == [False, True, False, False]


def test_prepared_text_reaches_the_batch(tmp_path: Path) -> None:
    """From a text file to a batch, with the checks against the recorded facts."""
    (tmp_path / "a.txt").write_text("some words to learn from\n" * 200)
    corpus = prepare([tmp_path / "a.txt"], tmp_path / "out", PrepareSettings(vocab_size=280))
    config = job([corpus.prefix], tokenizer=str(corpus.tokenizer))
    batch = StepReader(config, 0, 2).read(1)
    assert batch.tokens.shape == (4, SEQ_LEN + 1)
    assert batch.tokens.dtype == np.int64
    with pytest.raises(ValueError, match=r"set model\.vocab_size to at least"):
        StepReader(config, 0, 1, vocab_size=100)
    with pytest.raises(ValueError, match="does not exist"):
        StepReader(job([corpus.prefix], tokenizer="nowhere.json"), 0, 1)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="was not made with"):
        StepReader(job([corpus.prefix], tokenizer=str(tmp_path / "other.json")), 0, 1)
    with bin_path(corpus.prefix).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="is not whole"):
        StepReader(config, 0, 1)


def test_unusable_sets_are_named(prefix: Path, tmp_path: Path) -> None:
    """Missing, too short, cut off, damaged, another vocabulary, an uneven batch: each in words with a fix."""
    with pytest.raises(ValueError, match=r"no prepared corpus at .*everstep data prepare"):
        StepReader(job([tmp_path / "none"]), 0, 1)
    with pytest.raises(ValueError, match=r"fewer than one sample .*lower training.seq_len"):
        StepReader(job([write_set(tmp_path / "short", 1)]), 0, 1)
    with pytest.raises(ValueError, match="does not divide by the 3"):
        StepReader(job([prefix]), 0, 3)
    with pytest.raises(ValueError, match=r"has token \d+ but the model's vocabulary ends before 5"):
        StepReader(job([prefix]), 0, 1, vocab_size=5).read(1)
    cut = write_set(tmp_path / "cut", 20)
    bin_path(cut).write_bytes(bin_path(cut).read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut off or replaced"):
        StepReader(job([cut]), 0, 1)
    index = idx_path(write_set(tmp_path / "index", 20))
    whole = index.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"nonsense" + whole[8:]):
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"index\.idx is damaged"):
            StepReader(job([tmp_path / "index"]), 0, 1)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetcher_gives_the_readers_batches(prefix: Path) -> None:
    """Same batches, in order, up to the last step; the thread is gone afterwards."""
    config = job([prefix])
    expected = StepReader(config, 1, 2)
    with Prefetcher(StepReader(config, 1, 2), 3, 12, depth=3) as prefetcher:
        for step in range(3, 13):
            assert prefetcher.get(step).digest == expected.read(step).digest
        with pytest.raises(AssertionError, match="step 13"):
            prefetcher.get(13)
    assert not prefetch_threads()


def test_prefetcher_reads_ahead_but_not_without_bound(prefix: Path) -> None:
    """depth steps are ready before they are asked for, and no more are begun."""
    reader = Recording(job([prefix]), 0, 1)
    with Prefetcher(reader, 1, 100, depth=4) as prefetcher:
        reader.wait_for(4)
        assert reader.steps == [1, 2, 3, 4]
        prefetcher.get(1)
        reader.wait_for(5)
        assert reader.steps == [1, 2, 3, 4, 5]


def test_prefetcher_hands_on_the_readers_error(prefix: Path) -> None:
    """The caller gets the error at the step it belongs to, and again if it insists."""
    reader = StepReader(job([prefix]), 0, 1, vocab_size=200)
    bad = next(step for step in range(1, 50) if fails(reader, step))
    with Prefetcher(reader, 1, 100, depth=3) as prefetcher:
        for step in range(1, bad):
            prefetcher.get(step)
        for _ in range(2):
            with pytest.raises(ValueError, match="vocabulary ends before 200"):
                prefetcher.get(bad)
    assert not prefetch_threads()


def fails(reader: StepReader, step: int) -> bool:
    try:
        reader.read(step)
    except ValueError:
        return True
    return False


def test_prefetcher_closes_promptly_and_lets_go(prefix: Path) -> None:
    """Closing with much still to be read waits for one read only, twice is once, and nothing keeps the reader alive."""
    reader = Recording(job([prefix]), 0, 1, delay_s=0.05)
    prefetcher = Prefetcher(reader, 1, 10_000, depth=200)
    reader.wait_for(1)
    started_s = time.monotonic()
    prefetcher.close()
    prefetcher.close()
    assert time.monotonic() - started_s < 2
    assert not prefetch_threads()
    assert len(reader.steps) < 100
    alive = weakref.ref(reader)
    del reader, prefetcher
    gc.collect()
    assert alive() is None


class Recording(StepReader):
    """A real reader that notes what it was asked for and can be slow."""

    def __init__(self, config: JobConfig, dp_rank: int, dp_degree: int, delay_s: float = 0.0) -> None:
        super().__init__(config, dp_rank, dp_degree)
        self.steps: list[int] = []
        self._delay_s = delay_s
        self._read = threading.Condition()

    def read(self, step: int):  # type: ignore[no-untyped-def]
        time.sleep(self._delay_s)
        batch = super().read(step)
        with self._read:
            self.steps.append(step)
            self._read.notify_all()
        return batch

    def wait_for(self, count: int) -> None:
        with self._read:
            assert self._read.wait_for(lambda: len(self.steps) >= count, timeout=30)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=12), min_size=1, max_size=3).filter(
        lambda rows: len({len(row) for row in rows}) == 1
    )
)
def test_positions_restart_behind_every_end_of_document(rows: list[list[int]]) -> None:
    """Token 0 ends a document; a sequence begins at 0 also where it begins inside of one."""
    found = document_positions(np.array(rows, dtype=np.int64), 0)
    for row, positions in zip(rows, found, strict=True):
        expected = [0]
        for token in row[:-2]:
            expected.append(0 if token == 0 else expected[-1] + 1)
        assert positions.tolist() == expected
