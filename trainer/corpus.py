"""From sources (files, directories, the installed Python) to documents, always in the same order."""

from __future__ import annotations

import ast
import enum
import io
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from trainer.textfiles import bare_suffix, looks_binary, open_bytes

LIBRARY_MAX_BYTES = 12 * 1024 * 1024
_EDGE_BYTES = 64 * 1024
_LIBRARY_SKIPPED_DIRS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class Format(enum.StrEnum):
    """What a file holds: one document, one a line, one a row, or Python's help topics."""

    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    TOPICS = "topics"


@dataclass(frozen=True)
class TextFile:
    """One input file. source is what the user named, name the path below it (the same on every machine)."""

    source: str
    name: str
    path: Path
    format: Format
    size_bytes: int


def find_files(sources: Sequence[Path]) -> tuple[TextFile, ...]:
    """Files below the sources, in the given order of sources and sorted within each directory.

    In directories hidden, empty and binary files are passed over; a file that is named itself must be text.

    Raises:
        ValueError: a source is missing, unreadable, binary, or holds nothing to read.
    """
    return tuple(file for source in sources for file in _files_of(source))


def _files_of(source: Path) -> list[TextFile]:
    if not source.exists():
        raise ValueError(f"no such file or directory: {source}; check the path")
    if source.is_dir():
        files = [
            _text_file(source.name, path.relative_to(source).as_posix(), path)
            for path in _walk(source)
            if _usable(path)
        ]
    else:
        files = [_text_file(source.name, source.name, source)] if _usable(source) else []
    if not files:
        raise ValueError(f"{source} holds no text; give UTF-8 text, .jsonl or .parquet with something in it")
    return files


def _walk(directory: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise ValueError(f"cannot read {error.filename} ({error}); make it readable or leave it out") from error

    for folder, folders, names in os.walk(directory, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _usable(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False  # A dangling link.
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        return False
    return bare_suffix(path) == ".parquet" or not looks_binary(path)


def _text_file(source: str, name: str, path: Path) -> TextFile:
    formats = {".jsonl": Format.JSONL, ".parquet": Format.PARQUET}
    return TextFile(source, name, path, formats.get(bare_suffix(path), Format.TEXT), path.stat().st_size)


def python_library(max_bytes: int = LIBRARY_MAX_BYTES, seed: int = 0) -> tuple[TextFile, ...]:
    """The installed Python's own library sources and help topics: text that every machine has.

    Tests, installed packages and files that differ by machine are left out. The order is a shuffle by seed that
    depends on each file's name alone; in it every file is taken that does not lift the sum above max_bytes.

    Raises:
        ValueError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _LIBRARY_SKIPPED_DIRS)
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and path.stat().st_size:
                found.append(_library_file(root, path))
    if not found:
        raise ValueError(f"this Python has no library sources below {root}; name a file or directory of text instead")
    found.sort(key=lambda file: xxhash.xxh3_128_digest(f"{seed}/{file.name}".encode()))
    taken, total_bytes = [], 0
    for file in found:
        if total_bytes + file.size_bytes <= max_bytes:
            taken.append(file)
            total_bytes += file.size_bytes
    if not taken:
        raise ValueError(f"no library file is as small as max_bytes={max_bytes}; raise it")
    return tuple(taken)


def _library_file(root: Path, path: Path) -> TextFile:
    name = path.relative_to(root).as_posix()
    kind = Format.TOPICS if name == "pydoc_data/topics.py" else Format.TEXT
    return TextFile("python", name, path, kind, path.stat().st_size)


def source_digest(files: Sequence[TextFile]) -> str:
    """Identity of the input: names, sizes, and the first and last 64 KiB of every file; independent of the machine."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.source}\0{file.name}\0{file.size_bytes}\0".encode("utf-8", "surrogateescape"))
        try:
            with file.path.open("rb") as raw:
                digest.update(raw.read(_EDGE_BYTES))
                raw.seek(max(raw.tell(), file.size_bytes - _EDGE_BYTES))
                digest.update(raw.read(_EDGE_BYTES))
        except OSError as error:
            raise ValueError(f"cannot read {file.path} ({error}); make it readable or leave it out") from error
    return digest.hexdigest()


def read_documents(files: Sequence[TextFile], text_field: str = "text") -> Iterator[str]:
    """The documents of all files, in order; blank ones are passed over, undecodable bytes become U+FFFD.

    Args:
        text_field: key or column of the text in `.jsonl` and `.parquet`.

    Raises:
        ValueError: naming a file that is damaged, lacks the field or needs an extra; or no document at all.
    """
    documents = 0
    for file in files:
        for text in _read(file, text_field):
            if text.strip():
                documents += 1
                yield text
    if not documents:
        names = ", ".join(sorted({file.source for file in files})) or "nothing"
        raise ValueError(f"no documents in {names}: all of it is blank; name sources that hold text")


def _read(file: TextFile, text_field: str) -> Iterator[str]:
    match file.format:
        case Format.TEXT:
            with open_bytes(file.path) as raw:
                yield raw.read().decode("utf-8", "replace").removeprefix("\ufeff")
        case Format.JSONL:
            yield from _read_jsonl(file.path, text_field)
        case Format.PARQUET:
            yield from _read_parquet(file.path, text_field)
        case Format.TOPICS:
            yield from _read_topics(file.path)


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with open_bytes(path) as raw:
        for number, line in enumerate(raw, start=1):
            if not line.strip():
                continue
            try:
                row = msgspec.json.decode(line.decode("utf-8", "replace"), type=dict[str, msgspec.Raw])
                text = msgspec.json.decode(row[text_field], type=str | None)
            except KeyError as error:
                fields = ", ".join(sorted(row)) or "none"
                raise ValueError(f"{path}:{number} has no field {text_field!r} (it has: {fields})") from error
            except msgspec.DecodeError as error:
                raise ValueError(
                    f"{path}:{number} is not a JSON object with a string {text_field!r} ({error}); fix or drop the line"
                ) from error
            if text is not None:
                yield text


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install 'everstep[data]'") from error
    with open_bytes(path) as raw:
        seekable = raw if path.suffix.lower() == ".parquet" else io.BytesIO(raw.read())
        try:
            table = parquet.ParquetFile(seekable)
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise ValueError(f"{path} has no column {text_field!r} (it has: {', '.join(columns)})")
            if table.schema_arrow.field(text_field).type not in (pyarrow.string(), pyarrow.large_string()):
                raise ValueError(f"column {text_field!r} of {path} holds no text; name the column that does")
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is a damaged parquet file ({error}); fetch it again or leave it out") from error


def _read_topics(path: Path) -> Iterator[str]:
    """The texts of `topics = {name: text, ...}`, read without running the module."""
    module = ast.parse(path.read_bytes())
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            topics = ast.literal_eval(statement.value)
            yield from (topics[name] for name in sorted(topics))
