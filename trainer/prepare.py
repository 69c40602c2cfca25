"""Text to training data: learn or take a tokenizer, encode, and put `corpus.bin`, `.idx`, `.json` in place.

Everything is made in a folder of its own and renamed into place, the facts last; a corpus without matching facts is
made again. A second call with the same input and settings finds its work done.
"""

from __future__ import annotations

import enum
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import msgspec
import xxhash

from trainer.corpus import LIBRARY_MAX_BYTES, TextFile, find_files, python_library, read_documents, source_digest
from trainer.indexed import CorpusWriter, bin_path, idx_path
from trainer.prepared import CorpusInfo, file_digest, info_path, is_whole, read_info
from trainer.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

_LAYOUT_VERSION = 1
_BATCH_CHARS = 1 << 20


class PrepareSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that shapes the tokens beside the text.

    vocab_size: ids to learn at most; ignored with a given tokenizer. eod_token "" finds one of the usual names.
    tokenizer_max_bytes: text to learn the tokenizer from, spread evenly over the sources. library_max_bytes and
    seed: cap and order of the default corpus.
    """

    vocab_size: int = 4096
    text_field: str = "text"
    eod_token: str = ""
    tokenizer_max_bytes: int = 32 * 1024 * 1024
    library_max_bytes: int = LIBRARY_MAX_BYTES
    seed: int = 0


class Stage(enum.StrEnum):
    """What `prepare` is doing."""

    TOKENIZER = "tokenizer"
    ENCODE = "encode"


@dataclass(frozen=True)
class PrepareProgress:
    """How far: documents, bytes of text and tokens done in this stage; source_bytes is the sources' size on disk."""

    stage: Stage
    documents: int
    text_bytes: int
    tokens: int
    source_bytes: int


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus on disk. prefix goes into `[[data.sets]]` path; reused: it was there already, nothing was written."""

    prefix: Path
    tokenizer: Path
    info: CorpusInfo
    reused: bool


def prepare(
    sources: Sequence[Path],
    output_dir: Path,
    settings: PrepareSettings | None = None,
    tokenizer: Path | None = None,
    on_progress: Callable[[PrepareProgress], None] | None = None,
) -> PreparedCorpus:
    """Turn text into `<output_dir>/corpus.{bin,idx,json}` and `<output_dir>/tokenizer.json`.

    Args:
        sources: files and directories, read in this order; none means the installed Python's own library.
        tokenizer: a tokenizers JSON file to use instead of learning one.

    Raises:
        ValueError: a source or the tokenizer cannot be used; the message names it and the fix.
    """
    settings = settings or PrepareSettings()
    files = find_files(sources) if sources else python_library(settings.library_max_bytes, settings.seed)
    digest = _input_digest(files, settings, tokenizer)
    output_dir.mkdir(parents=True, exist_ok=True)
    with _exclusive(output_dir):
        found = _reusable(output_dir, digest)
        if found is not None:
            return found
        job = _Preparation(files, settings, on_progress or (lambda progress: None))
        return job.run(output_dir, tokenizer, digest)


def _input_digest(files: Sequence[TextFile], settings: PrepareSettings, tokenizer: Path | None) -> str:
    if tokenizer is not None and not tokenizer.is_file():
        raise ValueError(f"no tokenizer at {tokenizer}; give the path of a tokenizers JSON file (tokenizer.json)")
    digest = xxhash.xxh3_128(source_digest(files).encode())
    digest.update(msgspec.json.encode(settings))
    digest.update(f"{_LAYOUT_VERSION} {file_digest(tokenizer) if tokenizer else 'learned'}".encode())
    return digest.hexdigest()


@contextmanager
def _exclusive(output_dir: Path) -> Iterator[None]:
    """One preparation of a folder at a time; the second waits and then finds the work done."""
    with (output_dir / ".prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _reusable(output_dir: Path, digest: str) -> PreparedCorpus | None:
    prefix, tokenizer = output_dir / "corpus", output_dir / "tokenizer.json"
    info = read_info(prefix)
    if info is None or info.source_digest != digest or not is_whole(prefix, info):
        return None
    if not tokenizer.is_file() or file_digest(tokenizer) != info.tokenizer_digest:
        return None
    return PreparedCorpus(prefix, tokenizer, info, reused=True)


class _Preparation:
    """One run of `prepare` that has work to do."""

    def __init__(
        self, files: Sequence[TextFile], settings: PrepareSettings, on_progress: Callable[[PrepareProgress], None]
    ) -> None:
        self._files = files
        self._settings = settings
        self._on_progress = on_progress
        self._source_bytes = sum(file.size_bytes for file in files)

    def run(self, output_dir: Path, given: Path | None, digest: str) -> PreparedCorpus:
        work_dir = output_dir / ".prepare"
        # The lock is ours, so what lies there is from a run that died.
        shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir()
        try:
            tokenizer_path = work_dir / "tokenizer.json"
            tokenizer = self._tokenizer(given)
            if given is None:
                tokenizer.save(tokenizer_path)
            else:
                shutil.copyfile(given, tokenizer_path)
            info = self._encode(tokenizer, work_dir / "corpus", file_digest(tokenizer_path), digest)
            _move_into_place(work_dir, output_dir, info)
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)
        return PreparedCorpus(output_dir / "corpus", output_dir / "tokenizer.json", info, reused=False)

    def _tokenizer(self, given: Path | None) -> TextTokenizer:
        if given is not None:
            return load_tokenizer(given, self._settings.eod_token)
        return train_tokenizer(self._tokenizer_documents(), self._settings.vocab_size)

    def _tokenizer_documents(self) -> Iterator[str]:
        by_source = [list(files) for _, files in groupby(self._files, key=lambda file: file.source)]
        share_bytes = self._settings.tokenizer_max_bytes // len(by_source)
        documents = text_bytes = 0
        for files in by_source:
            left_bytes = share_bytes
            for text in read_documents(files, self._settings.text_field):
                encoded = text.encode()[:left_bytes]
                left_bytes -= len(encoded)
                documents, text_bytes = documents + 1, text_bytes + len(encoded)
                self._report(Stage.TOKENIZER, documents, text_bytes, 0)
                yield encoded.decode("utf-8", "ignore")
                if left_bytes <= 0:
                    break

    def _encode(self, tokenizer: TextTokenizer, prefix: Path, tokenizer_digest: str, digest: str) -> CorpusInfo:
        writer = CorpusWriter(prefix, tokenizer.vocab_size)
        text_bytes = 0
        for batch in _batches(read_documents(self._files, self._settings.text_field)):
            for tokens in tokenizer.encode(batch):
                writer.add(tokens)
            text_bytes += sum(len(text.encode()) for text in batch)
            self._report(Stage.ENCODE, writer.documents, text_bytes, writer.tokens)
        writer.finish()
        return CorpusInfo(
            source_digest=digest,
            tokenizer_digest=tokenizer_digest,
            documents=writer.documents,
            tokens=writer.tokens,
            text_bytes=text_bytes,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            bin_bytes=bin_path(prefix).stat().st_size,
            idx_bytes=idx_path(prefix).stat().st_size,
        )

    def _report(self, stage: Stage, documents: int, text_bytes: int, tokens: int) -> None:
        self._on_progress(PrepareProgress(stage, documents, text_bytes, tokens, self._source_bytes))


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in documents:
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _move_into_place(work_dir: Path, output_dir: Path, info: CorpusInfo) -> None:
    """Replace an older corpus: its facts go first and the new ones come last, so facts never describe a mixture."""
    info_path(work_dir / "corpus").write_bytes(msgspec.json.format(msgspec.json.encode(info)) + b"\n")
    info_path(output_dir / "corpus").unlink(missing_ok=True)
    for name in ("tokenizer.json", "corpus.bin", "corpus.idx", "corpus.json"):
        with (work_dir / name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(work_dir / name, output_dir / name)
    folder = os.open(output_dir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
