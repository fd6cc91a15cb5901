"""Searches cut short, for tests that are about safety and not about speed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_disagmoe.builders import beam, paced, packed


@pytest.fixture(scope="module")
def little_effort() -> Iterator[None]:
    """Every family of orders under a cap is tried, each with a tenth of its effort."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (beam, paced, packed):
            for name in {"_EFFORT", "_WIDEST", "_FILLING", "_CENTRED"} & set(vars(module)):
                patch.setattr(module, name, getattr(module, name) // 10)
        yield
