"""Preparing a corpus: nothing of the text is lost, work is done once, and what was cut off is done again."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.indexed import IndexedCorpus
from trainer.prepare import PreparedCorpus, PrepareProgress, PrepareSettings, Stage, prepare
from trainer.prepared import read_info
from trainer.tokenizer import EOD, load_tokenizer, train_tokenizer

SETTINGS = PrepareSettings(vocab_size=400)
TEXTS = [f"def function_{i}(value):\n    return value * {i}  # naïve 東京 {EOD}\r\n" * (i + 1) for i in range(20)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def prepared(source: Path, tmp_path: Path) -> PreparedCorpus:
    return prepare([source], tmp_path / "out", SETTINGS)


def texts_of(corpus: PreparedCorpus) -> list[str]:
    """What the token files say, decoded."""
    tokenizer = load_tokenizer(corpus.tokenizer)
    tokens = IndexedCorpus(corpus.prefix)
    documents = [tokens.read(i) for i in range(len(tokens.lengths))]
    assert all(document[-1] == tokenizer.eod_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_tokens_decode_to_the_very_text(prepared: PreparedCorpus) -> None:
    """Each document comes back character for character, its end marked once."""
    assert texts_of(prepared) == TEXTS


def test_text_that_spells_the_eod_is_text(prepared: PreparedCorpus) -> None:
    """A document cannot end itself: the EOD's id is only ever its last token."""
    corpus = IndexedCorpus(prepared.prefix)
    for i in range(len(corpus.lengths)):
        assert (corpus.read(i) == prepared.info.eod_id).sum() == 1


def test_facts_are_true(prepared: PreparedCorpus) -> None:
    """corpus.json says what is in the files."""
    info, corpus = prepared.info, IndexedCorpus(prepared.prefix)
    assert read_info(prepared.prefix) == info
    assert (info.documents, info.tokens) == (len(TEXTS), corpus.tokens)
    assert info.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert info.vocab_size <= 400
    assert max(corpus.read(i).max() for i in range(info.documents)) < info.vocab_size
    assert sorted(contents(prepared.prefix.parent)) == ["corpus.bin", "corpus.idx", "corpus.json", "tokenizer.json"]


def test_second_call_does_nothing(source: Path, prepared: PreparedCorpus) -> None:
    """Same input and settings: no file is touched, and the caller is told."""
    times = {path.name: path.stat().st_mtime_ns for path in prepared.prefix.parent.iterdir() if path.name[0] != "."}
    again = prepare([source], prepared.prefix.parent, SETTINGS, on_progress=lambda progress: pytest.fail("worked"))
    assert again.reused
    assert not prepared.reused
    assert again.info == prepared.info
    for name, mtime_ns in times.items():
        assert (prepared.prefix.parent / name).stat().st_mtime_ns == mtime_ns


def test_same_input_gives_the_same_bytes(source: Path, prepared: PreparedCorpus, tmp_path: Path) -> None:
    """A corpus made elsewhere from the same text is the same file for file."""
    other = prepare([source], tmp_path / "other", SETTINGS)
    assert contents(tmp_path / "other") == contents(prepared.prefix.parent)
    assert other.info == prepared.info


@pytest.mark.parametrize("change", ["text", "vocab_size", "tokenizer"])
def test_changed_input_is_prepared_again(source: Path, prepared: PreparedCorpus, tmp_path: Path, change: str) -> None:
    """An edit, another vocabulary or another tokenizer makes new files."""
    settings, tokenizer = SETTINGS, None
    if change == "text":
        source.write_text(source.read_text().replace("value", "other"))
    elif change == "vocab_size":
        settings = PrepareSettings(vocab_size=300)
    else:
        tokenizer = tmp_path / "given.json"
        train_tokenizer(["something else entirely"] * 9, 270).save(tokenizer)
    again = prepare([source], prepared.prefix.parent, settings, tokenizer=tokenizer)
    assert not again.reused
    assert again.info != prepared.info
    assert texts_of(again) == [text.replace("value", "other") if change == "text" else text for text in TEXTS]


def cut_last_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no bin": lambda out: (out / "corpus.bin").unlink(),
    "no idx": lambda out: (out / "corpus.idx").unlink(),
    "no facts": lambda out: (out / "corpus.json").unlink(),
    "no tokenizer": lambda out: (out / "tokenizer.json").unlink(),
    "cut bin": lambda out: cut_last_byte(out / "corpus.bin"),
    "cut idx": lambda out: cut_last_byte(out / "corpus.idx"),
    "cut facts": lambda out: os.truncate(out / "corpus.json", 50),
    "other tokenizer": lambda out: cut_last_byte(out / "tokenizer.json"),
    "left over": lambda out: (out / ".prepare" / "corpus.bin").mkdir(parents=True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_torn_output_is_done_again(source: Path, prepared: PreparedCorpus, damage: str) -> None:
    """Whatever is missing or cut off, the next call puts the very same files in place."""
    out = prepared.prefix.parent
    whole = contents(out)
    DAMAGES[damage](out)
    if damage == "left over":
        (out / "corpus.json").unlink()
    again = prepare([source], out, SETTINGS)
    assert not again.reused
    assert contents(out) == whole
    assert not (out / ".prepare").exists()


def test_an_interrupted_call_leaves_the_old_corpus(source: Path, prepared: PreparedCorpus) -> None:
    """Ctrl-C in the middle of encoding: nothing half-made is in place."""
    whole = contents(prepared.prefix.parent)

    def interrupt(progress: PrepareProgress) -> None:
        if progress.stage is Stage.ENCODE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], prepared.prefix.parent, PrepareSettings(vocab_size=300), on_progress=interrupt)
    assert contents(prepared.prefix.parent) == whole
    assert not (prepared.prefix.parent / ".prepare").exists()


def test_facts_never_describe_a_mixture(source: Path, prepared: PreparedCorpus) -> None:
    """Failing half-way through putting new files over old ones leaves no facts, so nothing takes them for whole."""
    out = prepared.prefix.parent
    (out / "corpus.idx").unlink()
    (out / "corpus.idx" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"corpus\.idx"):
        prepare([source], out, PrepareSettings(vocab_size=300))
    assert read_info(prepared.prefix) is None


def test_two_calls_at_once_do_the_work_once(source: Path, tmp_path: Path) -> None:
    """The second waits for the first and then finds its work done."""
    results: list[PreparedCorpus] = []
    inside = threading.Event()

    def slow(progress: PrepareProgress) -> None:
        inside.set()
        time.sleep(0.02)

    def first() -> None:
        results.append(prepare([source], tmp_path / "out", SETTINGS, on_progress=slow))

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    second = prepare([source], tmp_path / "out", SETTINGS)
    thread.join()
    assert second.reused
    assert not results[0].reused


def test_progress_reaches_the_whole(source: Path, tmp_path: Path) -> None:
    """The tokenizer's stage comes first, numbers only grow, and the last ones are the totals."""
    seen: list[PrepareProgress] = []
    corpus = prepare([source], tmp_path / "out", SETTINGS, on_progress=seen.append)
    assert [progress.stage for progress in seen] == sorted((p.stage for p in seen), reverse=True)
    last = seen[-1]
    assert (last.documents, last.text_bytes, last.tokens) == (
        corpus.info.documents,
        corpus.info.text_bytes,
        corpus.info.tokens,
    )


def test_tokenizer_learns_from_every_source(tmp_path: Path) -> None:
    """The cap is shared out: words of the second source get tokens although the first alone would fill it."""
    (tmp_path / "a.txt").write_text("alpha " * 5000)
    (tmp_path / "b.txt").write_text("omega " * 5000)
    settings = PrepareSettings(vocab_size=300, tokenizer_max_bytes=10_000)
    seen: list[PrepareProgress] = []
    corpus = prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", settings, on_progress=seen.append)
    lengths = IndexedCorpus(corpus.prefix).lengths
    assert (lengths < 5100).all()
    assert [p.text_bytes for p in seen if p.stage is Stage.TOKENIZER] == [5000, 10_000]


def test_long_documents_survive_being_cut_in_pieces(tmp_path: Path) -> None:
    """A document beyond the piece size, with and without line ends, stays one document and the same text."""
    texts = ["word and\n" * 150_000, "x" * 1_200_000]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / name).write_text(text)
    settings = PrepareSettings(vocab_size=300, tokenizer_max_bytes=10_000)
    corpus = prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "out", settings)
    assert texts_of(corpus) == texts


def test_small_vocabulary_is_refused(source: Path, tmp_path: Path) -> None:
    """Byte-level means that every byte has an id."""
    with pytest.raises(ValueError, match="vocab_size >= 257"):
        prepare([source], tmp_path / "out", PrepareSettings(vocab_size=256))


def test_unusable_tokenizers_are_named(source: Path, tmp_path: Path) -> None:
    """Missing, not a tokenizer, or without the end-of-document token asked for."""
    given = tmp_path / "given.json"
    with pytest.raises(ValueError, match=r"no tokenizer at .*given.json"):
        prepare([source], tmp_path / "out", tokenizer=given)
    given.write_text("{}")
    with pytest.raises(ValueError, match=r"given.json is not a tokenizers JSON"):
        prepare([source], tmp_path / "out", tokenizer=given)
    train_tokenizer(["text"], 300).save(given)
    with pytest.raises(ValueError, match=r"no end-of-document token \(<stop>\)"):
        prepare([source], tmp_path / "out", PrepareSettings(eod_token="<stop>"), tokenizer=given)
