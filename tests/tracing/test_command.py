from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_disagmoe.cli.trace import app
from megatron_disagmoe.schedules import text
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.tracing.predicted import save_costs
from tests.tracing.traces import record, schedule

runner = CliRunner()


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    """The folder of a run of three steps with its schedule and the costs it was planned with."""
    folder = tmp_path / "traces"
    record(folder, [5, 1, 1])
    text.save(schedule(), folder / "schedule.txt")
    save_costs(StageCosts(attention=10e-6, ffn=10e-6, transfer=5e-6, tail=10e-6), folder)
    return folder


def test_json(traced: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    done = runner.invoke(app, [str(traced), "--out", str(out), "--html", str(page), "--json"])
    assert done.exit_code == 0
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert (result["out"], result["html"], result["steps"], result["unmatched"]) == (str(out), str(page), [1, 2], 0)
    assert result["step_time_s"] == pytest.approx(100e-6)
    assert result["compute_busy"] == pytest.approx([0.5, 0.2])
    assert result["transfer_busy"] == pytest.approx([0.1, 0.1])
    assert result["exposed_communication_s"] == pytest.approx([10e-6, 10e-6])
    assert [rank["stage_wait_s"] for rank in result["ranks"]] == pytest.approx([30e-6, 16e-6])
    assert result["simulated_step_time_s"] == pytest.approx(90e-6)
    assert result["predicted_step_time_s"] == pytest.approx(40e-6)
    assert result["simulated_costs"]["tail"] == pytest.approx(30e-6)
    assert sum(record["ph"] == "s" for record in json.loads(out.read_text(encoding="utf-8"))["traceEvents"]) == 6
    html = page.read_text(encoding="utf-8")
    positions = [html.index(f'"heading":"{name}') for name in ("Measured: step", "Simulated", "Predicted")]
    assert positions == sorted(positions)
    assert (
        "step 100 µs, simulated 90 µs (×1.111), predicted 40 µs (×2.500)"
        in json.loads(html.partition('type="application/json">')[2].partition("</script>")[0])["charts"][0]["facts"]
    )


def test_for_people(traced: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, [str(traced), "--out", str(tmp_path / "out.json")])
    assert done.exit_code == 0
    row = next(line for line in done.stdout.splitlines() if "0 A0" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "0 A0",
        "50.0%",
        "10.0%",
        "10 µs",
        "10.0%",
        "30.0%",
        "10.0%",
    ]
    assert "simulated 90 µs (measured takes 1.111 of it)" in done.stdout


def test_without_a_schedule_nothing_is_simulated(tmp_path: Path) -> None:
    record(tmp_path, [1])
    page = tmp_path / "out.html"
    done = runner.invoke(app, [str(tmp_path), "--out", str(tmp_path / "o.json"), "--html", str(page), "--json"])
    assert done.exit_code == 0
    assert "simulated_step_time_s" not in json.loads(done.stdout)
    assert page.read_text(encoding="utf-8").count('"heading"') == 1


def test_another_runs_schedule_is_not_simulated(traced: Path, tmp_path: Path) -> None:
    file = traced / "schedule.txt"
    file.write_text(file.read_text(encoding="utf-8").replace("F0: F0.0", "F0: F0.0 B0.0"), encoding="utf-8")
    done = runner.invoke(app, [str(traced), "--out", str(tmp_path / "o.json"), "--json"])
    assert done.exit_code == 0
    assert "simulated_step_time_s" not in json.loads(done.stdout)
    assert "is not the one that step 1 ran" in " ".join(done.stderr.split())


def test_a_missing_rank_is_told(traced: Path, tmp_path: Path) -> None:
    (traced / "rank-00001.json").unlink()
    (traced / "schedule.txt").unlink()
    done = runner.invoke(app, [str(traced), "--out", str(tmp_path / "o.json"), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["unmatched"] == 6
    assert "6 sends or receives have no other end" in " ".join(done.stderr.split())


@pytest.mark.parametrize("wrong", ["empty", "broken", "out"])
def test_bad_input_exits_2(traced: Path, tmp_path: Path, wrong: str) -> None:
    folder, out = traced, tmp_path / "o.json"
    if wrong == "empty":
        folder = tmp_path / "nothing here"
    elif wrong == "broken":
        (traced / "rank-00001.json").write_text("{", encoding="utf-8")
    else:
        out = tmp_path / "no" / "such" / "folder.json"
    done = runner.invoke(app, [str(folder), "--out", str(out), "--json"])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("disagmoe: ")
