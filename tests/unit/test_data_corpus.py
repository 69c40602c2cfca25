"""Text in any of its wrappings becomes the same documents in the same order; what cannot be read is named."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from trainer.corpus import find_files, python_library, read_documents, source_digest

TEXT = "def f():\n\treturn 'naïve — 東京'\r\n" * 50
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def documents(*sources: Path, text_field: str = "text") -> list[str]:
    return list(read_documents(find_files(sources), text_field))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    """Line ends and all: nothing is normalised."""
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT.encode()))
    assert documents(path) == [TEXT]


@pytest.mark.parametrize("suffix", sorted(COMPRESS.keys() - {""}))
def test_concatenated_archives_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    """Parallel compressors write several streams into one file."""
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](f"part {i} {TEXT}".encode()) for i in range(200)))
    assert documents(path) == ["".join(f"part {i} {TEXT}" for i in range(200))]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_each_line_of_jsonl_is_a_document(tmp_path: Path, suffix: str) -> None:
    """The field is chosen by name; other fields of any type, blank lines and nulls do not disturb."""
    rows = [{"body": f"row {i} é", "id": i, "tags": [1, {"a": None}]} for i in range(300)]
    lines = [json.dumps(row) for row in rows] + ["", '{"body": null}', '{"body": "  "}']
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix]("\n".join(lines).encode()))
    assert documents(path, text_field="body") == [row["body"] for row in rows]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_each_row_of_parquet_is_a_document(tmp_path: Path, suffix: str) -> None:
    """Over several row groups, nulls left out."""
    texts = [f"row {i}" if i % 7 else None for i in range(3000)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": range(3000), "text": texts}), path, row_group_size=100)
    if suffix:
        path = path.rename(tmp_path / "plain")
        packed = tmp_path / "a.parquet.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        path = packed
    assert documents(path) == [text for text in texts if text]


def test_directories_are_read_in_sorted_order(tmp_path: Path) -> None:
    """Hidden, empty, binary and special files are passed over; the order is that of the names, not of the disk."""
    for name in ("b/2.md", "b/1.py", "a.txt", "c.rst", "b.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert documents(tmp_path) == ["a.txt", "b.txt", "c.rst", "b/1.py", "b/2.md"]


def test_sources_keep_the_order_they_are_named_in(tmp_path: Path) -> None:
    """The order on the command line is the order of the documents."""
    for name in ("z.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path / "z.txt", tmp_path / "a.txt") == ["z.txt", "a.txt"]


def test_undecodable_bytes_are_replaced(tmp_path: Path) -> None:
    """One bad byte costs one character, not the file."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\xffcd")
    assert documents(tmp_path) == ["ab\ufffdcd"]


def jsonl(path: Path) -> None:
    path.write_text('{"text": "a"}\n{"text": 3}\n')


def cut(suffix: str) -> bytes:
    return COMPRESS[suffix](os.urandom(9000).hex().encode())[:-99]


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("a.txt", lambda path: None, "no such file"),
    "empty": ("a.txt", lambda path: path.touch(), "holds no text"),
    "binary": ("a.txt", lambda path: path.write_bytes(b"a\0b"), "holds no text"),
    "blank": ("a.txt", lambda path: path.write_text(" \n"), "no documents in a.txt"),
    "empty directory": ("a", lambda path: path.mkdir(), "holds no text"),
    "cut gz": ("a.txt.gz", lambda path: path.write_bytes(cut(".gz")), "damaged .gz"),
    "cut bz2": ("a.txt.bz2", lambda path: path.write_bytes(cut(".bz2")), "damaged .bz2"),
    "cut xz": ("a.txt.xz", lambda path: path.write_bytes(cut(".xz")), "damaged .xz"),
    "cut zst": ("a.txt.zst", lambda path: path.write_bytes(cut(".zst")), "damaged .zst"),
    "not gzip": ("a.txt.gz", lambda path: path.write_bytes(b"plain text"), "damaged .gz"),
    "not xz": ("a.txt.xz", lambda path: path.write_bytes(b"plain text"), "damaged .xz"),
    "not bz2": ("a.txt.bz2", lambda path: path.write_bytes(b"plain text"), "Invalid data stream"),
    "not zstd": ("a.txt.zst", lambda path: path.write_bytes(b"plain text"), "damaged .zst"),
    "bad line": ("a.jsonl", jsonl, "a.jsonl:2 is not a JSON object with a string 'text'"),
    "no field": ("a.jsonl", lambda path: path.write_text('{"body": "a"}'), r"a.jsonl:1 has no field 'text' .*body"),
    "not parquet": ("a.parquet", lambda path: path.write_bytes(b"nothing like it"), "damaged parquet"),
    "no column": ("a.parquet", lambda path: parquet.write_table(pyarrow.table({"n": [1]}), path), "no column 'text'"),
    "numbers": ("a.parquet", lambda path: parquet.write_table(pyarrow.table({"text": [1]}), path), "holds no text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_named(tmp_path: Path, fault: str) -> None:
    """Every fault is a ValueError that names the file."""
    name, make, message = FAULTS[fault]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        documents(tmp_path / name)
    assert name in str(caught.value)


def test_python_library_is_mixed_and_capped() -> None:
    """The default corpus: under its cap, from all over the library, help topics as prose, in a repeatable order."""
    files = python_library(max_bytes=1_000_000, seed=3)
    assert files == python_library(max_bytes=1_000_000, seed=3)
    assert files != python_library(max_bytes=1_000_000, seed=4)
    assert 900_000 < sum(file.size_bytes for file in files) <= 1_000_000
    assert len({file.name[0] for file in files}) > 10
    assert not any("site-packages" in file.name or "/test" in f"/{file.name}".rpartition("/")[0] for file in files)


def test_help_topics_are_documentation() -> None:
    """Topics are read as text, not as the source that holds them."""
    topics = [file for file in python_library() if file.name == "pydoc_data/topics.py"]
    texts = list(read_documents(topics))
    assert len(texts) > 50
    assert any("lambda" in text.lower() for text in texts)
    assert not any(text.startswith("topics") for text in texts)


def test_digest_sees_content_and_names_but_not_places(tmp_path: Path) -> None:
    """A copy elsewhere is the same input; an edit of the same size or another name is not."""

    def make(folder: str, name: str, text: str) -> str:
        (tmp_path / folder / "corpus").mkdir(parents=True)
        (tmp_path / folder / "corpus" / name).write_text(text)
        return source_digest(find_files([tmp_path / folder / "corpus"]))

    original = make("1", "a.txt", "one")
    assert make("2", "a.txt", "one") == original
    assert make("3", "a.txt", "two") != original
    assert make("4", "b.txt", "one") != original
