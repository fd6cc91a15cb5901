"""``disagmoe checkpoint diff``: exit codes, JSON, what people see; and that it needs no Megatron."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_disagmoe.cli import app
from tests.checkpoint.samples import MOMENT, NORM, WEIGHT, tensors, write


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Equal weights, another moment."""
    values = tensors()
    values[MOMENT][0, 0, 0] = 3.0
    return str(write(tmp_path / "a", tensors(), pieces=2)), str(write(tmp_path / "b", values))


def test_equal_weights(pair: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["checkpoint", "diff", *pair, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["equal"] is True
    assert (found["missing"], found["unexpected"], found["max_abs_difference"]) == ([], [], 0.0)
    assert found["num_compared"] == 2


def test_another_optimizer(pair: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["checkpoint", "diff", *pair, "--optimizer", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["different"] == {MOMENT: 3.0}


def test_people_see_every_kind_of_difference(tmp_path: Path) -> None:
    values = tensors()
    values[WEIGHT][0, 0, 0] += 0.25
    values["new"] = values.pop(NORM)
    a, b = write(tmp_path / "a", tensors()), write(tmp_path / "b", values)
    result = CliRunner().invoke(app, ["checkpoint", "diff", str(a), str(b)])
    assert result.exit_code == 1
    assert f"only in A: 1\n  {NORM}\nonly in B: 1\n  new\n" in result.stdout
    assert f"{WEIGHT}: 2.500e-01" in result.stdout
    assert "DIFFERENT, by at most 2.500e-01" in result.stdout


def test_bad_input(pair: tuple[str, str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["checkpoint", "diff", pair[0], str(tmp_path / "nowhere"), "--json"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "nowhere is not a folder" in result.stderr


def test_neither_megatron_nor_a_process_group_is_needed(pair: tuple[str, str]) -> None:
    code = (
        "import sys; from megatron_disagmoe.cli import app; import torch.distributed as dist\n"
        f"try: app(['checkpoint', 'diff', *{pair!r}])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not [name for name in sys.modules if name.startswith('megatron.')]\n"
        "assert not dist.is_initialized()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
