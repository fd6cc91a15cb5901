"""Loaders of ranks that draw no batch start no processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_disagmoe import cpu

cpu.install_if_needed()

from megatron_disagmoe import parallel_state  # noqa: E402
from megatron_disagmoe.training import loaders  # noqa: E402


@pytest.mark.parametrize("is_attention, seen", [(True, 2), (False, 0)])
def test_only_attention_ranks_keep_their_workers(
    monkeypatch: pytest.MonkeyPatch, is_attention: bool, seen: int
) -> None:
    args = SimpleNamespace(num_workers=2)
    monkeypatch.setattr(loaders, "get_args", lambda: args)
    monkeypatch.setattr(parallel_state, "state", lambda: SimpleNamespace(is_attention=is_attention))
    build = loaders.without_workers_on_ffn_ranks(lambda dataset, consumed: (dataset, consumed, args.num_workers))
    assert build("dataset", 7) == ("dataset", 7, seen)
    assert args.num_workers == 2


def test_the_setting_comes_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    args = SimpleNamespace(num_workers=2)
    monkeypatch.setattr(loaders, "get_args", lambda: args)
    monkeypatch.setattr(parallel_state, "state", lambda: SimpleNamespace(is_attention=False))

    def fail() -> None:
        raise OSError("no such data")

    with pytest.raises(OSError, match="no such data"):
        loaders.without_workers_on_ffn_ranks(fail)()
    assert args.num_workers == 2
