"""Imports point one way: no two modules need each other, not even inside functions or for types."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_disagmoe"


def modules(package: Path) -> dict[str, Path]:
    """Every module of ``package`` by its dotted name."""
    found = {}
    for path in package.rglob("*.py"):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Those of ``known`` that the module at ``path`` imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def circle(package: Path) -> list[str]:
    """Modules that import one another in a circle, none where there is no circle."""
    known = modules(package)
    graph = {name: set(imported(path, known)) - {name} for name, path in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_one_another() -> None:
    assert len(modules(PACKAGE)) > 300
    assert circle(PACKAGE) == []


@pytest.mark.parametrize("late", ["from pack.one import x", "def f():\n    from pack import one"])
def test_a_circle_is_found(tmp_path: Path, late: str) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("import pack.two\nx = 1\n")
    (package / "two.py").write_text(late + "\n")
    assert set(circle(package)) == {"pack.one", "pack.two"}
