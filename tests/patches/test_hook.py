"""The lines that the patch adds, and the hook that they call: when do they act?"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_disagmoe import cpu, hook, patching, preparation
from tests.patches.conftest import PATCHED_FILE

TRAINING = ["--num-layers", "4", "--micro-batch-size", "2"]


class TestLines:
    """What the patch puts into ``megatron/core/__init__.py``, up to Megatron's own first import."""

    @pytest.fixture
    def lines(self, checkout: Path) -> str:
        patching.apply(checkout)
        lines, ours, _ = (checkout / PATCHED_FILE).read_text().partition("    activate()\n")
        return lines + ours

    def test_call_the_hook(self, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        monkeypatch.setattr(hook, "activate", lambda: calls.append(1))
        exec(lines, {})
        assert calls == [1]

    def test_are_silent_without_our_package(self, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "megatron_disagmoe.hook", None)
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TRAINING])
        exec(lines, {})

    def test_are_loud_without_our_package_where_it_is_asked_for(
        self, lines: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "megatron_disagmoe.hook", None)
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TRAINING, "--af-pipe"])
        with pytest.raises(ModuleNotFoundError, match="megatron_disagmoe"):
            exec(lines, {})

    def test_are_loud_with_a_package_too_old_for_them(self, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(hook, "activate")
        with pytest.raises(ImportError, match="activate"):
            exec(lines, {})


class TestHook:
    @pytest.fixture
    def prepared(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """What ``prepare`` was called with; it answers with one flag more. As if Megatron were half imported."""
        calls: list[list[str]] = []

        def prepare(flags: list[str]) -> list[str]:
            assert "megatron.core" not in sys.modules
            monkeypatch.setattr(preparation, "_begun", True)
            calls.append(flags)
            return [*flags, "--added"]

        monkeypatch.setattr(preparation, "prepare", prepare)
        monkeypatch.setattr(preparation, "_begun", False)
        monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
        monkeypatch.delitem(sys.modules, "megatron_disagmoe.cli", raising=False)
        return calls

    @pytest.mark.parametrize("has_gpu", [False, True])
    @pytest.mark.parametrize(
        "flags, on_cpu, on_gpu",
        [
            ([*TRAINING, "--af-pipe"], True, True),
            (["--af-attention-groups", "2"], True, True),  # without --af-pipe: to be told so
            (["--micro-batch-size=2"], True, False),
            (TRAINING, True, False),
            (["--input", "corpus.json"], False, False),  # tools/preprocess_data.py
            ([], False, False),
        ],
    )
    def test_acts_only_where_it_is_needed(
        self,
        prepared: list[list[str]],
        monkeypatch: pytest.MonkeyPatch,
        flags: list[str],
        on_cpu: bool,
        on_gpu: bool,
        has_gpu: bool,
    ) -> None:
        monkeypatch.setattr(cpu, "is_needed", lambda: not has_gpu)
        monkeypatch.setattr(sys, "argv", ["script.py", *flags])
        hook.activate()
        acts = on_gpu if has_gpu else on_cpu
        assert prepared == ([flags] if acts else [])
        assert sys.argv == ["script.py", *flags, *(["--added"] if acts else [])]

    def test_acts_once(self, prepared: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["script.py", "--af-pipe"])
        hook.activate()
        hook.activate()
        assert len(prepared) == 1

    def test_stands_down_for_the_launcher(self, prepared: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["script.py", "--af-pipe"])
        monkeypatch.setattr(preparation, "_begun", True)
        hook.activate()
        assert prepared == []

    def test_stands_down_for_our_command(self, prepared: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        # disagmoe check -- --af-pipe ... has such flags on its own command line.
        monkeypatch.setattr(sys, "argv", ["disagmoe", "check", "--", "--af-pipe"])
        monkeypatch.setitem(sys.modules, "megatron_disagmoe.cli", ModuleType("megatron_disagmoe.cli"))
        hook.activate()
        assert prepared == []

    def test_bad_input_ends_the_program(
        self, prepared: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def refuse(flags: list[str]) -> list[str]:
            raise ValueError("this cannot be")

        monkeypatch.setattr(preparation, "prepare", refuse)
        monkeypatch.setattr(sys, "argv", ["script.py", "--af-pipe"])
        monkeypatch.delenv("RANK", raising=False)
        with pytest.raises(SystemExit) as end:
            hook.activate()
        assert end.value.code == 2
        assert capsys.readouterr().err == "disagmoe: this cannot be\n"
