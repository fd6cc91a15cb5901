"""Real English text that every Python brings: the language reference behind ``help()`` (``pydoc_data.topics``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Every VALIDATE_EVERY-th topic, in alphabetical order, is kept for validation.
VALIDATE_EVERY = 8


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents to validate on; they share no paragraph."""

    train: list[str]
    valid: list[str]


def topics() -> Mapping[str, str]:
    """Topic -> text.

    Raises:
        ValueError: this Python was built without its documentation.
    """
    try:
        from pydoc_data.topics import topics as texts
    except ImportError as error:
        raise ValueError(
            "this Python lacks pydoc_data.topics, the text that the quickstart trains on: use a complete one "
            "(python.org, Debian's libpython3-stdlib, pyenv)"
        ) from error
    return texts


def split(texts: Mapping[str, str]) -> Split:
    """Divide ``texts`` into training and validation documents.

    Topics quote each other at length ("compound" holds all of "if"), so paragraphs that stand in a validation
    document are dropped from the training documents: a loss on text already seen would say nothing.
    """
    names = sorted(texts)
    held_out = names[::VALIDATE_EVERY]
    seen = {paragraph for name in held_out for paragraph in _paragraphs(texts[name])}
    train = [
        "\n\n".join(paragraph for paragraph in _paragraphs(texts[name]) if paragraph not in seen)
        for name in names
        if name not in set(held_out)
    ]
    return Split(train=[text for text in train if text], valid=[texts[name] for name in held_out])


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
