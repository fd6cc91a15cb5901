"""What traces cost: how the figures of ``disagmoe bench tracing`` are made from its steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest

from megatron_disagmoe.benchmarks import tracing
from megatron_disagmoe.benchmarks.tracing_job import ENVIRONMENT, WARM_UP_STEPS, modes
from megatron_disagmoe.local_job import Job, Result


def step(traced: bool, wall: float) -> dict[str, object]:
    return {"traced": traced, "wall": wall, "processor": 2 * wall}


def test_half_of_the_steps_are_traced_neighbour_by_neighbour() -> None:
    first = list(islice(modes(), 8))
    assert first == [True, False, False, True] * 2
    assert WARM_UP_STEPS % 4 == 0  # so that pairs stay pairs


def test_ratios_are_of_neighbours() -> None:
    steps = [step(True, 1.1), step(False, 1.0), step(False, 2.0), step(True, 2.1), step(True, 9.0)]
    assert tracing.pair_ratios(steps, "wall") == pytest.approx([1.1, 1.05])


def test_interval_holds_the_median() -> None:
    assert tracing.interval([1.0] * 9) == (1.0, 1.0)
    low, high = tracing.interval([1.0, 1.1, 1.2, 1.3, 1.4])
    assert (low, high) == tracing.interval([1.0, 1.1, 1.2, 1.3, 1.4])
    assert 1.0 <= low < 1.2 < high <= 1.4


@pytest.mark.parametrize("slower, holds", [(1.01, True), (1.03, False)])
def test_rows(slower: float, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is asked for what it should be, and its steps become rows, one a rank."""

    def run(jobs: Sequence[Job], directory: Path) -> list[Result]:
        (job,) = jobs
        assert job.world_size == 4
        assert job.flags[job.flags.index("--train-iters") + 1] == str(8 + WARM_UP_STEPS)
        assert job.flags[job.flags.index("--af-trace-dir") + 1] == str(tmp_path / "traces")
        folder = Path(job.environment[ENVIRONMENT])
        folder.mkdir()
        steps = [step(traced, slower if traced else 1.0) for traced in islice(modes(), 8)]
        for rank, group in enumerate(("A0", "A1", "F0", "F1")):
            (folder / f"rank{rank}.json").write_text(json.dumps({"group": group, "steps": steps}))
        return [Result("tracing", [0] * 4, [""] * 4, 1.0, False, [])]

    monkeypatch.setattr(tracing, "run", run)
    rows = tracing.measure(tmp_path, steps=8)
    assert [(row["group"], row["holds"]) for row in rows] == [(group, holds) for group in ("A0", "A1", "F0", "F1")]
    assert rows[0]["wall_overhead"] == pytest.approx(slower - 1)
    assert (rows[0]["processor_ms_plain"], rows[0]["steps"]) == (2000, 8)


def test_one_step_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 steps: one with traces and one without"):
        tracing.measure(tmp_path, steps=1)
