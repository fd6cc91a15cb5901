"""Write the corpus as Megatron reads it: an indexed dataset per split, and the tokenizer's vocabulary.

    python -m megatron_disagmoe.quickstart.dataset FOLDER

A process of its own, so that the driver, which lives as long as training does, never imports Megatron.

The tokenizer is Megatron's ``TikTokenizer`` with a vocabulary of the 256 bytes and no merges, which makes it a
byte-level one. (Megatron 0.19 has a ``ByteLevelTokenizer``, but ``--tokenizer-type`` does not offer it.)
"""

from __future__ import annotations

import base64
import json
import platform
import sys
from pathlib import Path
from typing import Any

from megatron_disagmoe.quickstart import corpus

NUM_BYTES = 256
#: Megatron's TikTokenizer wants these seven to exist: unk, s, /s, mask, pad, cls, sep.
NUM_SPECIAL_TOKENS = 7
VOCAB_SIZE = NUM_BYTES + NUM_SPECIAL_TOKENS
DESCRIPTION = "corpus.json"
_FORMAT = 1


def tokenizer_path(folder: Path) -> Path:
    """The tokenizer's vocabulary file."""
    return folder / "bytes" / "vocab.json"


def prefix(folder: Path, split: str) -> Path:
    """What Megatron's data flags want: the path of a split without ``.bin`` and ``.idx``."""
    return folder / split


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` holds a complete data set of this version, made by this Python's text."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return (described.get("format"), described.get("python")) == (_FORMAT, platform.python_version())


def describe(folder: Path) -> str:
    """One line for people about the data set in ``folder``."""
    described = json.loads((folder / DESCRIPTION).read_text())
    train, valid = described["train"], described["valid"]
    return (
        f"{described['text']} of Python {described['python']}, {train['tokens']:,} bytes in {train['documents']} "
        f"documents to train on, {valid['tokens']:,} in {valid['documents']} to validate on"
    )


def megatron_flags(folder: Path) -> list[str]:
    """The flags that make Megatron read what ``prepare`` wrote."""
    return [
        *("--tokenizer-type", "TikTokenizer", "--tokenizer-model", str(tokenizer_path(folder))),
        *("--tiktoken-pattern", "v2", "--tiktoken-num-special-tokens", str(NUM_SPECIAL_TOKENS)),
        *("--vocab-size", str(VOCAB_SIZE), "--make-vocab-size-divisible-by", "8"),
        *("--train-data-path", str(prefix(folder, "train")), "--valid-data-path", str(prefix(folder, "valid"))),
        *("--data-cache-path", str(folder / "cache")),
    ]


def prepare(folder: Path) -> dict[str, Any]:
    """Write both splits and the vocabulary into ``folder``; returns (and writes last) a description of them."""
    divided = corpus.split(corpus.topics())
    _write_vocabulary(tokenizer_path(folder))
    tokenizer = _tokenizer(tokenizer_path(folder))
    description: dict[str, Any] = {
        "format": _FORMAT,
        "python": platform.python_version(),
        "text": "pydoc_data.topics",
        "vocab_size": VOCAB_SIZE,
    }
    for name, documents in (("train", divided.train), ("valid", divided.valid)):
        tokens = _write_split(prefix(folder, name), documents, tokenizer)
        description[name] = {"documents": len(documents), "tokens": tokens}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    return description


def _write_vocabulary(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": chr(byte)}
        for byte in range(NUM_BYTES)
    ]
    path.write_text(json.dumps(entries) + "\n")


def _tokenizer(path: Path) -> Any:
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(path),
        metadata_path={"library": "tiktoken"},
        pattern="v2",
        num_special_tokens=NUM_SPECIAL_TOKENS,
        vocab_size=VOCAB_SIZE,
    )


def _write_split(path: Path, documents: list[str], tokenizer: Any) -> int:
    """Write one indexed dataset; returns its number of tokens."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

    builder = IndexedDatasetBuilder(get_bin_path(str(path)), dtype=DType.optimal_dtype(VOCAB_SIZE))
    total = 0
    for text in documents:
        ids = [*tokenizer.tokenize(text), tokenizer.eod]
        builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
        total += len(ids)
    builder.finalize(get_idx_path(str(path)))
    return total


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
