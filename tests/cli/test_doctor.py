"""``disagmoe doctor``: its rows, its exit code, and that a missing thing is said with its remedy."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from megatron_disagmoe.cli import doctor

REQUIRED = {"python", "torch", "gloo", "megatron"}


def run(*words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    result = CliRunner().invoke(doctor.app, [*words, "--json"])
    return result.exit_code, {row["name"]: row for row in json.loads(result.output)["checks"]}


def test_this_machine_can_train() -> None:
    code, rows = run()
    assert code == 0
    assert {name for name, row in rows.items() if row["required"]} == REQUIRED
    assert all(rows[name]["ok"] for name in REQUIRED)
    assert rows["megatron"]["detail"].startswith("0.19.2 at ")
    assert set(rows) == REQUIRED | {"cuda", "transformer-engine", "nixl", "cores", "memory", "namespaces"}


def test_a_missing_requirement_ends_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def megatron() -> Iterator[doctor.Check]:
        yield doctor.Check("megatron", False, "Megatron-LM 0.18.0: only 0.19 is known", required=True)

    monkeypatch.setattr(doctor, "CHECKS", (megatron,))
    code, rows = run()
    assert code == 1
    assert not rows["megatron"]["ok"]
    printed = CliRunner().invoke(doctor.app, []).output
    assert "missing" in printed
    assert "only 0.19 is known" in printed


def test_megatron_of_another_version_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_disagmoe import megatron_seams

    def another() -> None:
        raise ValueError("Megatron-LM 0.18.0 is not known: install megatron-core 0.19.2")

    monkeypatch.setattr(megatron_seams, "check_version", another)
    code, rows = run()
    assert code == 1
    assert rows["megatron"] == {
        "name": "megatron",
        "ok": False,
        "detail": "Megatron-LM 0.18.0 is not known: install megatron-core 0.19.2",
        "required": True,
    }


def test_an_optional_package_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_version)
    monkeypatch.setattr(doctor, "CHECKS", (doctor._optional_packages,))
    code, rows = run()
    assert code == 0  # training on a CPU works without them
    assert "pip install -e '.[nixl]'" in rows["nixl"]["detail"]
    assert "pip install -e '.[gpu]'" in rows["transformer-engine"]["detail"]


@pytest.mark.parametrize("limit, ok", [("max", True), (str(4 * doctor.GIB), False)])
def test_memory_is_the_containers(limit: str, ok: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    class Memory:
        total = available = 16 * doctor.GIB

    (tmp_path / "memory.max").write_text(limit + "\n")
    monkeypatch.setattr(doctor, "_CGROUP_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    (row,) = doctor._memory()
    assert row.ok is ok
    assert f"of {4 if not ok else 16}.0" in row.detail
