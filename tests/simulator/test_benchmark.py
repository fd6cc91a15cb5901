"""``disagmoe bench simulator`` on a size that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_disagmoe.benchmarks import simulator
from megatron_disagmoe.cli.bench import app


@pytest.mark.parametrize("least, code", [(1, 0), (10**12, 1)])
def test_rows_and_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int, code: int) -> None:
    monkeypatch.setattr(simulator, "SIZES", ((2, 4, 8),))
    monkeypatch.setattr(simulator, "LEAST_PER_SECOND", least)
    done = CliRunner().invoke(app, ["simulator", "--out", str(tmp_path / "new"), "--json"])
    assert done.exit_code == code
    result = json.loads(done.stdout)
    without, with_lanes = result["rows"]
    # 9 stages, 8 edges and 4 lanes, forward and back
    assert without["compute_actions"] == with_lanes["compute_actions"] == 2 * 9 * 8
    assert (without["transfers"], with_lanes["transfers"]) == (2 * 8 * 8, 2 * (8 + 4) * 8)
    for row in result["rows"]:
        actions = row["compute_actions"] + row["transfers"]
        assert row["actions_per_second"] == pytest.approx(actions / row["simulate_s"])
        assert row["actions_per_second_with_reading"] == pytest.approx(actions / (row["simulate_s"] + row["read_s"]))
        assert row["holds"] is (code == 0)
    assert json.loads(Path(result["out"]).read_text(encoding="utf-8")) == {"rows": result["rows"]}


def test_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "SIZES", ((2, 4, 8),))
    assert "Actions per second" in CliRunner().invoke(app, ["simulator"]).stdout
