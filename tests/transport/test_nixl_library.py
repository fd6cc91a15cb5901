"""How NIXL's agents are opened: with a progress thread that sleeps, or not at all."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from megatron_disagmoe.transport.nixl_library import open_agent

bindings = importlib.import_module("nixl._bindings")


def test_the_progress_thread_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python API asks for no delay; what reaches the bindings is ours."""
    given: dict[str, Any] = {}

    class Recorded(bindings.nixlAgentConfig):  # type: ignore[name-defined]  # the bindings have no types
        def __setattr__(self, name: str, value: Any) -> None:
            given[name] = value
            super().__setattr__(name, value)

    monkeypatch.setattr(bindings, "nixlAgentConfig", Recorded)
    open_agent("sleeps")
    assert given["useProgThread"] is True
    assert given["pthrDelay"] == 20_000
    assert bindings.nixlAgentConfig is Recorded  # put back


def test_bindings_without_a_delay_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "nixlAgentConfig", object)
    with pytest.raises(RuntimeError, match="pthrDelay; use the pinned one"):
        open_agent("none")


def test_an_api_that_does_not_ask_the_bindings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    api = importlib.import_module("nixl._api")
    monkeypatch.setattr(api, "nixl_agent", lambda name, config: object())
    with pytest.raises(RuntimeError, match="does not take its settings from nixlAgentConfig"):
        open_agent("elsewhere")
