"""The whole study: points run, a table, pictures, and the bars that the project holds itself to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture

from megatron_disagmoe.reproduction.beyond.picture import crossings, draw
from megatron_disagmoe.reproduction.beyond.points import Point, studies
from megatron_disagmoe.reproduction.beyond.run import Outcome, markdown, run_all

#: Qwen3 at 4K on 16 nodes: bytes a parameter, and the least gain over Megatron-1F1B there.
BARS = ((18, 1.6), (14, 1.85))
#: Of the best feasible allocation's lower bound, at least.
BOUND_BAR = 0.97
#: Outcomes as they come, in the folder of a run.
_CASES = "cases.json"


def bar_points() -> list[Point]:
    """Where the bars are measured: baselines tuned as in the paper (PP and v), then with cuts as free as ours."""
    return [
        Point("bar", f"{level} bytes, baseline {'free' if free else 'as in the paper'}",
              bytes_per_parameter=level, free_cuts=free)
        for free in (False, True)
        for level, _ in BARS
    ]  # fmt: skip


def bars(*, processes: int = 1) -> list[dict[str, Any]]:
    """Rows: the gain and the share of the lower bound at each level, and whether they hold."""
    rows: list[dict[str, Any]] = []
    least = dict(BARS)
    for outcome in run_all(bar_points(), processes=processes):
        point = outcome.point
        numbers = [("over Megatron-1F1B", outcome.over_megatron, least[point.bytes_per_parameter])]
        if not point.free_cuts:
            numbers.append(("lower bound over step time", outcome.of_bound, BOUND_BAR))
        for quantity, ours, bar in numbers:
            row = {"quantity": f"Qwen3, 4K, {point.x}: {quantity}", "bar": bar, "ours": ours, "holds": ours >= bar}
            rows.append(row | {"point": outcome.as_json()})
    return rows


def run(
    names: tuple[str, ...],
    out: Path | None,
    *,
    processes: int,
    progress: Callable[[str], None] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """The studies of these names, all where there are none; files into ``out``, what is known after every case.

    Args:
        resume: cases that ``out`` has from a run before are not run again.

    Raises:
        ValueError: there is no study of that name, or nowhere to resume from.
    """
    every = studies()
    unknown = [name for name in names if name not in every]
    if unknown:
        raise ValueError(f"there is no study {unknown[0]!r}; choose among {'; '.join(every)}")
    if resume and out is None:
        raise ValueError("--resume needs --out: the folder of the run before")
    points = [point for name in names or tuple(every) for point in every[name]]
    known = _load(out / _CASES) if resume and out is not None else []
    before = tuple(known)

    def keep(outcome: Outcome) -> None:
        known.append(outcome)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps([each.state() for each in known], allow_nan=False)
            (out / _CASES).write_text(text + "\n", encoding="utf-8")

    outcomes = run_all(points, processes=processes, progress=progress, done=keep, before=before)
    by_study: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_study.setdefault(outcome.point.study, []).append(outcome)
    result: dict[str, Any] = {
        "rows": [outcome.as_json() for outcome in outcomes],
        "crossings": {name: [one.as_json() for one in crossings(each)] for name, each in by_study.items()},
        "files": [],
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "beyond.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (out / "beyond.md").write_text(markdown(outcomes), encoding="utf-8")
        picture = Picture(layout="constrained")
        draw(by_study, picture)
        paths = [out / f"beyond.{kind}" for kind in ("png", "svg")]
        for path in paths:
            picture.savefig(path, dpi=130)
        result["files"] = [str(path) for path in (out / "beyond.json", out / "beyond.md", *paths)]
    return {**result, "table": markdown(outcomes)}


def _load(path: Path) -> list[Outcome]:
    """Cases of a run before; none where there is no such file.

    Raises:
        ValueError: an older version wrote it.
    """
    if not path.exists():
        return []
    try:
        return [Outcome.from_state(each) for each in json.loads(path.read_text(encoding="utf-8"))]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what this version writes ({error}): leave --resume out") from error
