"""A symbol that has gone is an error that names it and the version; a patch is undone exactly."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from megatron_disagmoe import megatron_seams
from megatron_disagmoe.megatron_seams import SeamGone
from megatron_disagmoe.seam_records import SEAMS, Seam


class Base:
    def inherited(self) -> str:
        return "base"

    @staticmethod
    def static() -> str:
        return "static"


class Derived(Base):
    pass


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for somebody else's module, importable as ``other``."""
    module = types.ModuleType("other")
    module.function = lambda taken: taken  # type: ignore[attr-defined]
    module.Base, module.Derived = Base, Derived  # type: ignore[attr-defined]
    module.__version__ = "7.8"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other", module)
    return module


def test_every_recorded_symbol_is_in_this_megatron() -> None:
    for symbol in SEAMS:
        megatron_seams.resolve(symbol)


@pytest.mark.parametrize("symbol", ["other:gone", "other:Base.gone", "other:Gone.method", "other.gone:function"])
def test_a_symbol_that_has_gone_is_named_with_the_version(module: types.ModuleType, symbol: str) -> None:
    for use in (megatron_seams.resolve, lambda name: megatron_seams.patch(name, None)):
        with pytest.raises(SeamGone, match=rf"other 7\.8 has no usable {symbol}"):
            use(symbol)


def test_the_message_says_who_needs_it_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    symbol = "megatron.core.datasets.utils:gone"
    record = Seam(symbol, reason="the reason", used_in="the.user", test="a test", until="never")
    monkeypatch.setitem(SEAMS, symbol, record)
    with pytest.raises(SeamGone, match=r"Megatron Core 0\.19\.\d has no usable .*utils:gone.*the\.user.*the reason"):
        megatron_seams.patch(symbol, None)


def test_a_parameter_that_has_gone_counts_as_the_symbol(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seam = Seam("other:function", reason="", used_in="", test="", until="", takes=("taken", "dropped"))
    monkeypatch.setitem(SEAMS, seam.symbol, seam)
    with pytest.raises(SeamGone, match=r"other:function: it no longer takes dropped \(it takes taken\)"):
        megatron_seams.resolve(seam.symbol)


def test_megatron_is_patched_only_with_a_record() -> None:
    with pytest.raises(AssertionError, match="has no record"):
        megatron_seams.patch("megatron.core.datasets.utils:normalize", None)


def test_patches_stack_and_are_restored_exactly(module: types.ModuleType) -> None:
    original = module.function
    megatron_seams.wrap("other:function", lambda inner: lambda x: ("first", inner(x)))
    megatron_seams.wrap("other:function", lambda inner: lambda x: ("second", inner(x)))
    assert module.function(3) == ("second", ("first", 3))
    megatron_seams.restore("other:function")
    assert module.function(3) == ("first", 3)
    assert megatron_seams.is_patched("other:function")
    megatron_seams.restore("other:function")
    assert module.function is original
    assert not megatron_seams.is_patched("other:function")


def test_an_inherited_method_is_inherited_again(module: types.ModuleType) -> None:
    with megatron_seams.patched("other:Derived.inherited", lambda self: "patched") as original:
        assert Derived().inherited() == "patched"
        assert Base().inherited() == "base"
        assert original is Base.inherited
    assert Derived().inherited() == "base"
    assert "inherited" not in vars(Derived)


def test_a_static_method_stays_one(module: types.ModuleType) -> None:
    raw = vars(Base)["static"]
    with megatron_seams.patched("other:Base.static", staticmethod(lambda: "patched")):
        assert Base().static() == "patched"
    assert vars(Base)["static"] is raw


@pytest.mark.parametrize("version", ["0.18.0", "0.20.0", "1.19.0"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("megatron.core.package_info.__shortversion__", version)
    with pytest.raises(ValueError, match=rf"Megatron Core {version} at .* is not supported.*0\.19\.x"):
        megatron_seams.check_version()


@pytest.mark.parametrize("version", ["0.19.0", "0.19.1", "0.19.2"])
def test_these_versions_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("megatron.core.package_info.__shortversion__", version)
    assert megatron_seams.check_version().version == version


def test_two_megatrons_mixed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "megatron" / "core" / "package_info.py"
    monkeypatch.setattr("megatron.core.package_info.__file__", str(info))
    with pytest.raises(ValueError, match="two Megatrons are mixed.*put one complete checkout first"):
        megatron_seams.imported_megatron()


def test_the_documentation_holds_the_table() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "seams.md"
    assert megatron_seams.table() in document.read_text(), (
        "run: python -m megatron_disagmoe.megatron_seams, and put its output into docs/seams.md"
    )
