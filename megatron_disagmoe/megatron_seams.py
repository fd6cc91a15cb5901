"""The one door to Megatron's private symbols.

Megatron promises nothing about the names this package replaces or calls inside it. So each of them is a record
in ``SEAMS`` (what, why, where used, which test would notice, when it can go), is looked up by name when it is
used, and its disappearance is an error that names it and the version at hand, not an ``AttributeError`` later on.

``python -m megatron_disagmoe.megatron_seams`` prints the table that ``docs/seams.md`` holds.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_disagmoe.seam_records import SEAMS, Seam

SUPPORTED = (0, 19)
"""Major and minor version of Megatron Core that the replacements below were written against."""

_MISSING = object()


class SeamGone(RuntimeError):
    """A symbol that a replacement needs is not in the Megatron (or torch) that is imported, or has changed."""


@dataclass(frozen=True)
class Installation:
    """The Megatron that this process imports.

    ``version`` is ``megatron.core``'s own, without the git suffix (tag core_v0.19.0 calls itself 0.19.1);
    ``root`` the directory that holds ``megatron/``.
    """

    version: str
    root: Path


def imported_megatron() -> Installation:
    """Which Megatron is imported, importing it if need be.

    Raises ``ValueError`` where ``megatron.core`` is not installed, or where ``megatron.training`` comes from
    another place than ``megatron.core`` (``megatron`` is a namespace package: ``sys.path`` can mix two).
    """
    try:
        package_info = importlib.import_module("megatron.core.package_info")
        training = importlib.util.find_spec("megatron.training")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("megatron"):
            raise
        raise ValueError(
            "Megatron is not installed: pip install 'megatron-core[training]==0.19.2', "
            "or put a checkout at tag core_v0.19.0 on PYTHONPATH"
        ) from error
    root = _root(package_info.__file__, levels=3)
    if training is None or training.origin is None:
        raise ValueError(
            f"{root} has megatron.core but no megatron.training: pip install 'megatron-core[training]==0.19.2'"
        )
    training_root = _root(training.origin, levels=3)
    if training_root != root:
        raise ValueError(
            f"two Megatrons are mixed: megatron.core comes from {root}, megatron.training from {training_root}; "
            "put one complete checkout first on PYTHONPATH, or none"
        )
    return Installation(version=package_info.__shortversion__, root=root)


def check_version() -> Installation:
    """``imported_megatron()``, refused with ``ValueError`` unless its version is 0.19.x."""
    found = imported_megatron()
    major_minor = tuple(int(part) for part in found.version.split(".")[:2])
    if major_minor != SUPPORTED:
        raise ValueError(
            f"Megatron Core {found.version} at {found.root} is not supported: this version of megatron_disagmoe "
            f"replaces parts of {SUPPORTED[0]}.{SUPPORTED[1]}.x only (PyPI 0.19.2, checkout core_v0.19.0)"
        )
    return found


def resolve(symbol: str) -> Any:
    """The object behind ``"package.module:name"`` or ``"package.module:Class.name"``; ``SeamGone`` if it is gone."""
    owner, name = _owner_and_name(symbol)
    value = getattr(owner, name, _MISSING)
    if value is _MISSING:
        raise _gone(symbol, "it is not there")
    seam = SEAMS.get(symbol)
    if seam is not None and seam.takes:
        _check_parameters(seam, value)
    return value


def patch(symbol: str, replacement: Any) -> Any:
    """Put ``replacement`` in the place of a registered ``symbol`` and return what was there.

    Code that imported the object by name before keeps the old one: name the importing module's copy instead.
    Patches of one symbol stack up, and are restored last first.
    """
    assert symbol in SEAMS or not symbol.startswith("megatron"), f"{symbol} has no record in seam_records"
    original = resolve(symbol)
    owner, name = _owner_and_name(symbol)
    raw = inspect.getattr_static(owner, name) if name in vars(owner) else _MISSING
    _applied.setdefault(symbol, []).append((owner, name, raw))
    setattr(owner, name, replacement)
    return original


def wrap(symbol: str, make: Callable[[Any], Any]) -> None:
    """``patch`` with a replacement that ``make`` builds from the original."""
    patch(symbol, make(resolve(symbol)))


def is_patched(symbol: str) -> bool:
    """Whether ``patch`` holds this symbol now."""
    return bool(_applied.get(symbol))


def restore(symbol: str) -> None:
    """Undo the last ``patch`` of it, exactly: an attribute that was inherited is inherited again."""
    owner, name, raw = _applied[symbol].pop()
    if raw is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, raw)


@contextlib.contextmanager
def patched(symbol: str, replacement: Any) -> Iterator[Any]:
    """``patch`` for the length of a ``with`` block; gives the original."""
    original = patch(symbol, replacement)
    try:
        yield original
    finally:
        restore(symbol)


def table() -> str:
    """The registry as a Markdown table, in order of area and symbol."""
    head = "| symbol | why | used in | test | can go when |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| `{seam.symbol}` | {seam.reason} | `{seam.used_in}` | `{seam.test}` | {seam.until} |\n"
        for seam in sorted(SEAMS.values(), key=lambda seam: (seam.used_in, seam.symbol))
    )


_applied: dict[str, list[tuple[Any, str, Any]]] = {}


def _owner_and_name(symbol: str) -> tuple[Any, str]:
    module_name, _, path = symbol.partition(":")
    assert path, f"write a symbol as 'package.module:name', not {symbol!r}"
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise _gone(symbol, f"there is no module {error.name}") from error
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, _MISSING)
        if owner is _MISSING:
            raise _gone(symbol, f"{parent} is not there")
    return owner, name


def _check_parameters(seam: Seam, value: Any) -> None:
    parameters = inspect.signature(value).parameters
    missing = [name for name in seam.takes if name not in parameters]
    if missing:
        raise _gone(seam.symbol, f"it no longer takes {', '.join(missing)} (it takes {', '.join(parameters)})")


def _gone(symbol: str, what: str) -> SeamGone:
    top = symbol.split(".")[0].split(":")[0]
    if top == "megatron":
        package_info = sys.modules.get("megatron.core.package_info")
        version = f"Megatron Core {getattr(package_info, '__shortversion__', 'of unknown version')}"
    else:
        version = f"{top} {getattr(sys.modules.get(top), '__version__', 'of unknown version')}"
    seam = SEAMS.get(symbol)
    need = f" {seam.used_in} needs it: {seam.reason}." if seam else ""
    return SeamGone(
        f"{version} has no usable {symbol}: {what}.{need} "
        f"Supported are torch 2.13 and Megatron Core {SUPPORTED[0]}.{SUPPORTED[1]}.x"
    )


def _root(file: str | None, *, levels: int) -> Path:
    assert file is not None
    return Path(file).resolve().parents[levels - 1]


if __name__ == "__main__":
    print(table(), end="")
