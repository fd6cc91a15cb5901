"""A corpus for comparisons: short documents of a made-up language, in Megatron's indexed format.

Written without Megatron (``megatron.core.datasets.indexed_dataset`` says what the bytes mean), so that whoever drives
a comparison need not import it.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

VOCABULARY = 256
"""Words; ``END`` comes after them."""
END = VOCABULARY
"""Ends every document; ``--eod-mask-loss`` leaves it out of the loss, so micro-batches differ in their tokens."""

_DOCUMENTS = 4000
_SHORTEST, _LONGEST = 5, 40
_UINT16 = 8
_INDEX_HEADER = b"MMIDIDX\x00\x00"


def flags(folder: Path) -> list[str]:
    """What makes Megatron read the corpus in ``folder``."""
    return [
        *("--data-path", str(prefix(folder)), "--data-cache-path", str(folder / "cache"), "--split", "90,5,5"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY + 1), "--eod-mask-loss"),
    ]


def prefix(folder: Path) -> Path:
    """Path of the corpus in ``folder``, without ``.bin`` and ``.idx``."""
    return folder / "corpus"


def write(folder: Path) -> None:
    """Write the corpus: words of a Zipf distribution, two of three followed by a word that depends on them alone."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lengths = random.integers(_SHORTEST, _LONGEST, size=_DOCUMENTS)
    total = int(lengths.sum())
    free = random.choice(VOCABULARY, size=total, p=_zipf())
    follows = random.random(total) < 2 / 3
    successor = random.permutation(VOCABULARY)
    words = free.copy()
    for position in range(1, total):
        if follows[position]:
            words[position] = successor[words[position - 1]]
    words[np.cumsum(lengths) - 1] = END
    prefix(folder).with_suffix(".bin").write_bytes(words.astype("<u2").tobytes())
    prefix(folder).with_suffix(".idx").write_bytes(_index(lengths))


def _zipf() -> np.ndarray:
    weights = 1.0 / np.arange(1, VOCABULARY + 1)
    return weights / weights.sum()


def _index(lengths: np.ndarray) -> bytes:
    pointers = 2 * (np.cumsum(lengths) - lengths)
    documents = np.arange(len(lengths) + 1)
    return b"".join(
        (
            _INDEX_HEADER,
            struct.pack("<QBQQ", 1, _UINT16, len(lengths), len(documents)),
            lengths.astype("<i4").tobytes(),
            pointers.astype("<i8").tobytes(),
            documents.astype("<i8").tobytes(),
        )
    )
