"""``disagmoe bench schedule``: step times of the real executor and transport beside the simulator's and the bound.

One process a group, on this machine. Stages sleep, and transfers take their time on emulated ports
(``benchmarks.ports``); everything between is what training runs: the schedule, its receives posted ahead, gloo, the
executor. So what is compared is the model of the simulator with what processes do.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_disagmoe import builders
from megatron_disagmoe.benchmarks.ports import arbiter
from megatron_disagmoe.benchmarks.ranks import ThisMachine, run_ranks
from megatron_disagmoe.schedules.actions import Placement
from megatron_disagmoe.schedules.orders import Orders
from megatron_disagmoe.schedules.text import save
from megatron_disagmoe.schedules.verifier import ensure_safe
from megatron_disagmoe.simulator.bounds import Workload, lower_bounds
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.simulator.simulate import simulate_orders

#: Measured over simulated, at most.
BAR = 1.05
_BALANCED = StageCosts(attention=1.0, ffn=1.0, transfer=0.5)


@dataclass(frozen=True)
class Case:
    """One schedule. Costs are in stage times."""

    name: str
    kind: str
    attention_groups: int
    ffn_groups: int
    layers: int
    micro_batches: int
    costs: StageCosts = field(default_factory=lambda: _BALANCED)
    max_live: int | None = None
    order_messages: bool = False
    redispatch: bool = False

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.attention_groups + self.ffn_groups


_SLOW_NETWORK = StageCosts(attention=1.0, ffn=1.0, transfer=1.5)
_UNBALANCED = StageCosts(attention=1.0, ffn=0.6, transfer=0.8)
_TAIL = StageCosts(attention=1.0, ffn=1.0, transfer=0.5, tail=0.3)
# FFN stages run their forward again, and get their input for that once more
_AGAIN = StageCosts(attention=1.0, ffn=0.7, transfer=0.8, lane=0.4, recompute_ffn=1.0)

CASES = (
    Case("p1-sequential", "sequential", 1, 1, 4, 4),
    Case("p1", "interleaved-1f1b", 1, 1, 4, 8),
    Case("p1-split", "split-backward", 1, 1, 4, 8),
    Case("p1-unbalanced", "interleaved-1f1b", 1, 1, 4, 8, _UNBALANCED),
    Case("p1-network-bound", "interleaved-1f1b", 1, 1, 4, 8, _SLOW_NETWORK),
    Case("p1-capped", "interleaved-1f1b", 1, 1, 4, 8, max_live=12),
    Case("p2", "interleaved-1f1b", 2, 2, 8, 8),
    Case("p2-split", "split-backward", 2, 2, 8, 8),
    Case("p2-unbalanced", "interleaved-1f1b", 2, 2, 8, 8, _UNBALANCED),
    Case("p2-tail", "interleaved-1f1b", 2, 2, 8, 8, _TAIL),
    Case("p2-ports-in-order", "interleaved-1f1b", 2, 2, 8, 12, _SLOW_NETWORK, order_messages=True),
    Case("p2-again-in-order", "split-backward", 2, 2, 8, 12, _AGAIN, order_messages=True, redispatch=True),
    Case("p1-p2", "interleaved-1f1b", 1, 2, 4, 8, StageCosts(attention=1.0, ffn=2.0, transfer=0.5)),
    Case("p2-p1", "interleaved-1f1b", 2, 1, 4, 8, StageCosts(attention=2.0, ffn=1.0, transfer=0.5)),
    Case("p2-p1-split", "split-backward", 2, 1, 4, 8, StageCosts(attention=2.0, ffn=1.0, transfer=0.5)),
)


def named(names: str | None) -> tuple[Case, ...]:
    """The cases of these names, with commas between; all where None.

    Raises:
        ValueError: for a name that there is not.
    """
    if names is None:
        return CASES
    known = {case.name: case for case in CASES}
    wanted = [name.strip() for name in names.split(",")]
    wrong = [name for name in wanted if name not in known]
    if wrong:
        raise ValueError(f"there is no case {wrong[0]!r}; choose among {', '.join(known)}")
    return tuple(known[name] for name in wanted)


def measure(
    cases: Sequence[Case], folder: Path, *, unit_seconds: float, repeats: int, traces: Path | None = None
) -> list[dict[str, Any]]:
    """Run every case ``repeats`` times; one row each.

    Args:
        folder: for schedules and logs.
        unit_seconds: one stage time.
        traces: write each case's traces into a folder of its name there.

    Raises:
        RuntimeError: where a rank fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "unit_seconds": unit_seconds,
        "repeats": repeats,
        "ports": str(folder / "ports.socket"),
        "results": str(folder / "results.json"),
        "traces": None if traces is None else str(traces),
        "cases": [],
    }
    rows = []
    for case in cases:
        row, path = _predict(case, folder, unit_seconds=unit_seconds)
        rows.append(row)
        settings["cases"].append({"name": case.name, "schedule": str(path), "costs": dataclasses.asdict(case.costs)})
    places = [ThisMachine()] * max(case.world_size for case in cases)
    limit = 60 + sum((repeats + 1) * row["simulated_s"] * 2 + 5 for row in rows)
    with arbiter(folder / "ports.socket"):
        run_ranks(
            places, "megatron_disagmoe.benchmarks.schedule_ranks", settings, folder / "ranks", timeout_seconds=limit
        )
    (folder / "ports.socket").unlink()
    results = json.loads((folder / "results.json").read_text())
    return [_complete(row, results[row["case"]]) for row in rows]


def _predict(case: Case, folder: Path, *, unit_seconds: float) -> tuple[dict[str, Any], Path]:
    """What is known before the run, and the file of the schedule."""
    placement = Placement.round_robin(
        num_layers=case.layers, num_attention_groups=case.attention_groups, num_ffn_groups=case.ffn_groups
    )
    schedule = ensure_safe(
        builders.build(
            case.kind,
            placement,
            num_micro_batches=case.micro_batches,
            costs=case.costs,
            max_live=case.max_live,
            order_messages=case.order_messages,
            redispatch=case.redispatch,
        )
    ).schedule
    path = folder / f"{case.name}.txt"
    save(schedule, path)
    orders = Orders.of(schedule)
    bounds = lower_bounds(Workload.of(orders, case.costs))
    makespan = simulate_orders(orders, case.costs).makespan
    row = {
        "case": case.name,
        "schedule": case.kind,
        "attention_groups": case.attention_groups,
        "ffn_groups": case.ffn_groups,
        "layers": case.layers,
        "micro_batches": case.micro_batches,
        "max_live": case.max_live,
        "redispatch": case.redispatch,
        "ports_in_order": schedule.ports_in_order,
        "stage_ms": unit_seconds * 1e3,
        "actions": sum(map(len, schedule.actions.values())),
        "simulated_s": makespan * unit_seconds,
        "fill_bound_s": bounds.fill * unit_seconds,
        "busy_bound_s": bounds.busy * unit_seconds,
    }
    return row, path


def _complete(row: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
    measured = statistics.median(seconds)
    ratio = measured / row["simulated_s"]
    return {
        **row,
        "repeats": len(seconds),
        "measured_s": measured,
        "measured_min_s": min(seconds),
        "measured_max_s": max(seconds),
        "measured_over_simulated": ratio,
        "measured_over_fill_bound": measured / row["fill_bound_s"],
        "holds": ratio <= BAR,
    }
