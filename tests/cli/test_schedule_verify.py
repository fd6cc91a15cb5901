"""``disagmoe schedule verify``: exit codes, JSON and what people see."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.cli import app
from megatron_disagmoe.schedules.actions import Group, Placement, Schedule, Side
from megatron_disagmoe.schedules.lowering import lowered
from megatron_disagmoe.schedules.text import save


def schedule() -> Schedule:
    placement = Placement.round_robin(num_layers=4, num_attention_groups=2, num_ffn_groups=1)
    return lowered(sequential(placement, num_micro_batches=3))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.txt"
    save(schedule(), path)
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """F0 does its last backward twice."""
    path, group, original = tmp_path / "bad.txt", Group(Side.F, 0), schedule()
    last = [action for action in original.actions[group] if action.edge is None][-1]
    save(dataclasses.replace(original, actions={**original.actions, group: (*original.actions[group], last)}), path)
    return path


def test_a_safe_schedule(good: Path) -> None:
    result = CliRunner().invoke(app, ["schedule", "verify", str(good), "--json"])
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["ok"] is True
    assert answer["errors"] == []
    assert answer["peak_live"] == {"A0": 3, "A1": 2, "F0": 4}
    people = CliRunner().invoke(app, ["schedule", "verify", str(good)])
    assert people.stdout.startswith("safe; 3 groups, ")
    assert "at most 4 live activations (on F0)" in people.stdout


def test_faults_exit_1_and_name_rank_action_and_kind(bad: Path) -> None:
    result = CliRunner().invoke(app, ["schedule", "verify", str(bad), "--json"])
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["ok"] is False
    (error,) = answer["errors"]
    assert (error["rank"], error["action"], error["kind"]) == ("F0", "B0.2", "repeated-work")
    assert error["grid"].count("[B0.2]") == 2
    assert answer["error_counts"] == {"repeated-work": 1}
    people = CliRunner().invoke(app, ["schedule", "verify", str(bad)])
    assert people.exit_code == 1
    assert "F0: repeated-work: B0.2 is there twice" in people.stdout
    assert "^^^^^^" in people.stdout


def test_caps(good: Path) -> None:
    assert CliRunner().invoke(app, ["schedule", "verify", str(good), "--max-live", "4"]).exit_code == 0
    result = CliRunner().invoke(app, ["schedule", "verify", str(good), "--max-live", "3", "--json"])
    assert result.exit_code == 1
    assert [error["kind"] for error in json.loads(result.stdout)["errors"]] == ["live-over-cap"]
    posted = CliRunner().invoke(app, ["schedule", "verify", str(good), "--max-posted", "1", "--json"])
    assert {error["kind"] for error in json.loads(posted.stdout)["errors"]} == {"too-many-posted"}


@pytest.mark.parametrize("content", [None, "F0.0\n", "disagmoe-schedule 1\nA0: F0.x\n"])
def test_files_that_cannot_be_read_exit_2(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "schedule.txt"
    if content is not None:
        path.write_text(content)
    result = CliRunner().invoke(app, ["schedule", "verify", str(path), "--json"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "schedule.txt" in result.stderr
