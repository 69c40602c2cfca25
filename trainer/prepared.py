"""What is known of a prepared corpus: `<prefix>.json` beside `<prefix>.bin` and `.idx`, written last."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import xxhash

from trainer.indexed import bin_path, idx_path


class CorpusInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of a prepared corpus.

    source_digest covers the sources (names, sizes, heads and tails) and every setting that shapes the tokens.
    vocab_size is the tokenizer's real one, which can be below the one asked for.
    """

    source_digest: str
    tokenizer_digest: str
    documents: int
    tokens: int
    text_bytes: int
    vocab_size: int
    eod_id: int
    bin_bytes: int
    idx_bytes: int


def info_path(prefix: Path) -> Path:
    """File of the facts."""
    return prefix.with_name(prefix.name + ".json")


def read_info(prefix: Path) -> CorpusInfo | None:
    """Facts of the corpus at this prefix; None where there are none or they are damaged."""
    try:
        return msgspec.json.decode(info_path(prefix).read_bytes(), type=CorpusInfo)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def is_whole(prefix: Path, info: CorpusInfo) -> bool:
    """Whether both data files are there in the size that was written."""
    try:
        return (os.stat(bin_path(prefix)).st_size, os.stat(idx_path(prefix)).st_size) == (
            info.bin_bytes,
            info.idx_bytes,
        )
    except FileNotFoundError:
        return False


def file_digest(path: Path) -> str:
    """xxh3 of a file's bytes, hexadecimal."""
    return xxhash.xxh3_64_hexdigest(path.read_bytes())
