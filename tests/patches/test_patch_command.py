"""``disagmoe patch`` and ``scripts/apply_patches.sh``: exit codes, JSON, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_disagmoe.cli.patch import app
from tests.patches.conftest import PACKAGE_INFO, PATCHED_FILE

ROOT = Path(__file__).parents[2]


def disagmoe_patch(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_json_of_every_command(checkout: Path) -> None:
    states = []
    for command in ("status", "check", "apply", "apply", "check", "revert", "status"):
        result = disagmoe_patch(command, checkout, "--json")
        assert result.exit_code == 0
        report = json.loads(result.stdout)
        assert report["version"] == "0.19.2"
        assert report["ok"]
        assert [file["path"] for file in report["files"]] == [PATCHED_FILE]
        states.append((report["state"], report["changed"]))
    assert states == [
        ("unpatched", []),
        ("unpatched", []),
        ("patched", [PATCHED_FILE]),
        ("patched", []),
        ("patched", []),
        ("unpatched", [PATCHED_FILE]),
        ("unpatched", []),
    ]


def test_conflict(checkout: Path) -> None:
    (checkout / PATCHED_FILE).write_text("import torch\n")
    codes = {command: disagmoe_patch(command, checkout).exit_code for command in ("status", "check", "apply", "revert")}
    assert codes == {"status": 0, "check": 1, "apply": 2, "revert": 2}
    report = json.loads(disagmoe_patch("check", checkout, "--json").stdout)
    assert (report["state"], report["ok"]) == ("conflict", False)
    assert "git restore" in report["errors"][0]


def test_dirty_tree(repository: Path) -> None:
    (repository / "megatron/core/utils.py").write_text("\n")
    codes = {command: disagmoe_patch(command, repository).exit_code for command in ("status", "check", "apply")}
    assert codes == {"status": 0, "check": 1, "apply": 2}
    assert "the tree is dirty" in disagmoe_patch("status", repository).stdout


def test_refusal_goes_to_standard_error_alone(checkout: Path) -> None:
    (checkout / PACKAGE_INFO).write_text("MAJOR = 0\nMINOR = 20\nPATCH = 0\nPRE_RELEASE = ''\n")
    result = disagmoe_patch("apply", checkout, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("disagmoe: nothing was changed: there are no patches for Megatron Core 0.20.0")


@pytest.mark.parametrize("command", ["status", "check", "apply", "revert"])
def test_no_checkout_is_bad_input(tmp_path: Path, command: str) -> None:
    result = disagmoe_patch(command, tmp_path)
    assert result.exit_code == 2
    assert "git clone --branch core_v0.19.0" in result.stderr


def test_people_see_version_state_files_and_what_stands_in_the_way(repository: Path) -> None:
    shown = disagmoe_patch("apply", repository).stdout.splitlines()
    (repository / "megatron/core/utils.py").write_text("\n")
    shown.append(disagmoe_patch("status", repository).stdout.splitlines()[-1])
    assert shown == [
        "Megatron Core 0.19.2: patched",
        f"  {PATCHED_FILE}: patched (written), core_v0.19/0001-activate-before-core.patch",
        "  not ours, left alone: uncommitted changes in megatron/core/utils.py",
    ]


def test_needs_neither_torch_nor_megatron(checkout: Path) -> None:
    program = (
        "import sys; from megatron_disagmoe.cli.patch import app\n"
        f"app(['status', {str(checkout)!r}], standalone_mode=False)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


class TestScript:
    @pytest.fixture
    def environment(self, tmp_path: Path) -> dict[str, str]:
        """``disagmoe`` on PATH as an installation has it, and no virtual environment of ours."""
        command = tmp_path / "bin" / "disagmoe"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megatron_disagmoe "$@"\n')
        command.chmod(0o755)
        return {
            **os.environ,
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DISAGMOE_VENV": str(tmp_path / "none"),
        }

    def run(self, environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / "scripts" / "apply_patches.sh", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def test_there_and_back(self, checkout: Path, environment: dict[str, str]) -> None:
        before = (checkout / PATCHED_FILE).read_bytes()
        assert self.run(environment, checkout).stdout.startswith("Megatron Core 0.19.2: patched\n")
        checked = self.run(environment, "--check", checkout, "--json")
        assert json.loads(checked.stdout)["state"] == "patched"
        assert self.run(environment, "--revert", checkout).returncode == 0
        assert (checkout / PATCHED_FILE).read_bytes() == before

    def test_exit_code_is_passed_on(self, environment: dict[str, str], tmp_path: Path) -> None:
        assert self.run(environment, tmp_path).returncode == 2
        assert self.run(environment).returncode == 2

    def test_nothing_installed(self, environment: dict[str, str], checkout: Path) -> None:
        result = self.run({**environment, "PATH": "/usr/bin:/bin"}, checkout)
        assert result.returncode == 1
        assert "pip install" in result.stderr
