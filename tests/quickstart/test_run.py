"""The quickstart from beginning to end, a few steps long, as ``scripts/quickstart.sh --compare`` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


def quickstart(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_disagmoe.quickstart", "--out", str(folder / "out"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)
def test_both_jobs_and_what_they_leave(tmp_path: Path) -> None:
    ended = quickstart("--compare", "--steps", str(STEPS), folder=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    latest = tmp_path / "out" / "latest"
    summary = json.loads((latest / "summary.json").read_text())
    ours, theirs = summary["jobs"]["af-pipe"], summary["jobs"]["vanilla"]
    assert (ours["processes"], theirs["processes"]) == (4, 1)
    assert 4 < ours["first_loss"] < 7  # ln 263 = 5.6: nothing learnt yet
    assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-5)
    assert summary["largest_relative_difference"]["value"] < 1e-5
    assert (latest / "loss.png").read_bytes().startswith(b"\x89PNG")
    for job in (ours, theirs):
        assert (Path(job["checkpoint"]) / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
        assert f"{job['validation_loss']:.4f}" in ended.stdout
        assert job["checkpoint"] in ended.stdout
    assert "Data: pydoc_data.topics of Python" in ended.stdout
    assert "Largest relative difference of the training losses" in ended.stdout
    assert f"Loss curve: {latest.resolve()}/loss.png" in ended.stdout


def test_a_job_that_fails_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "out").write_text("in the way")
    ended = quickstart(folder=tmp_path)
    assert ended.returncode != 0
    assert "out" in ended.stderr
