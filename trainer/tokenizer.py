"""Byte-level BPE: the one place that imports Hugging Face `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOD = "<|endoftext|>"
_KNOWN_EODS = (EOD, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")
MIN_VOCAB_SIZE = 257
_PIECE_CHARS = 1 << 20


class TextTokenizer:
    """Turns documents into token ids and back.

    Attributes:
        vocab_size: ids are below this.
        eod_id: the token that ends a document.
    """

    def __init__(self, tokenizer: Tokenizer, eod_token: str = "") -> None:
        """Wrap; eod_token "" looks for one of the usual names.

        Raises:
            ValueError: the tokenizer has no such end-of-document token.
        """
        self._tokenizer = tokenizer
        # Text that spells a special token is text: a document must not be able to end itself.
        tokenizer.encode_special_tokens = True
        self.eod_token, self.eod_id = _find_eod(tokenizer, eod_token)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, documents: Sequence[str]) -> Iterator[npt.NDArray[np.int64]]:
        """Ids of each document with the EOD at its end, [tokens + 1].

        Long documents are encoded in pieces cut after a line's end, which bounds memory and loses nothing.
        """
        pieces = [_pieces(text) for text in documents]
        encoded = iter(
            self._tokenizer.encode_batch_fast([piece for parts in pieces for piece in parts], add_special_tokens=False)
        )
        for parts in pieces:
            ids = [next(encoded).ids for _ in parts]
            yield np.array([token for part in ids for token in part] + [self.eod_id], dtype=np.int64)

    def decode(self, tokens: npt.NDArray[np.int64]) -> str:
        """Text of ids, special tokens spelled out."""
        text: str = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return text

    def save(self, path: Path) -> None:
        """Write the JSON file that `load_tokenizer` reads."""
        self._tokenizer.save(str(path))


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Learn a byte-level BPE (GPT-2's word splitting) with at most vocab_size ids.

    Raises:
        ValueError: vocab_size does not even hold the 256 bytes and the EOD.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {vocab_size} cannot hold all bytes; give vocab_size >= {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return TextTokenizer(tokenizer, EOD)


def load_tokenizer(path: Path, eod_token: str = "") -> TextTokenizer:
    """Read a tokenizers JSON file.

    Raises:
        ValueError: no such file, not a tokenizer, or no end-of-document token in it.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}; give the path of a tokenizers JSON file (tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        # The library raises bare Exception for every fault of the file.
        raise ValueError(f"{path} is not a tokenizers JSON file: {error}") from error
    return TextTokenizer(tokenizer, eod_token)


def _find_eod(tokenizer: Tokenizer, eod_token: str) -> tuple[str, int]:
    for name in (eod_token,) if eod_token else _KNOWN_EODS:
        eod_id = tokenizer.token_to_id(name)
        if eod_id is not None:
            return name, eod_id
    looked_for = eod_token or ", ".join(_KNOWN_EODS)
    raise ValueError(f"the tokenizer has no end-of-document token ({looked_for}); name one that it has (eod_token)")


def _pieces(text: str) -> list[str]:
    parts = []
    start = 0
    while len(text) - start > _PIECE_CHARS:
        cut = text.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]
