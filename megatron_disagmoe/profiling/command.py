"""``disagmoe plan --profile``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_disagmoe.cli.output import emit, err_console
from megatron_disagmoe.cli.plan_options import executable_space
from megatron_disagmoe.planner.files import dump_yaml
from megatron_disagmoe.planner.plan_file import PlanFile, save_plan
from megatron_disagmoe.planner.planning import Request
from megatron_disagmoe.profiling.fit import calibrated
from megatron_disagmoe.profiling.local_search import Profiled, profile
from megatron_disagmoe.profiling.trials import Trial, run_trials


def check_machine(request: Request) -> None:
    """Trials are processes of this machine.

    Raises:
        ValueError: the cluster is something else.
    """
    cluster = request.cluster
    if cluster.num_nodes != 1 or any(pool.gpu.dtype != "fp32" for pool in cluster.pools):
        raise ValueError(
            f"--profile runs trials as processes of this machine on its CPU: --cluster must describe one node with "
            f"dtype fp32 (such as laptop), and {cluster.name} does not"
        )


def plan_by_trials(
    request: Request, *, out: Path | None, cluster_out: Path | None, trials: int, radius: int, as_json: bool
) -> None:
    """Plan, try, fit, and tell.

    Raises:
        ValueError: the cluster is not this machine, or nothing fits.
        RuntimeError: a trial failed.
    """
    check_machine(request)
    request = Request(
        request.model, request.cluster, request.job, executable_space(request.space), request.keep
    )
    cores = os.cpu_count() or 1
    if cores < request.cluster.num_gpus:
        err_console.print(
            f"{cores} cores for up to {request.cluster.num_gpus} processes: trials of more than {cores} share them, "
            f"which predictions know nothing of",
            highlight=False,
        )
    with tempfile.TemporaryDirectory(prefix="disagmoe-profile-") as scratch:
        count = iter(range(1_000_000))

        def measure(planned: PlanFile) -> Trial:
            number = next(count)
            err_console.print(f"trial {number + 1} of at most {trials}: {_sizes(planned)}", highlight=False)
            return run_trials([planned], request.model, Path(scratch) / str(number))[0]

        found = profile(
            request,
            measure,
            lambda cluster, done: calibrated(cluster, request.model, done),
            trials=trials,
            radius=radius,
        )
    if out is not None:
        save_plan(found.best.plan, out)
    if cluster_out is not None:
        cluster_out.write_text(dump_yaml(found.cluster), encoding="utf-8")
    emit(_as_json(found, out), as_json=as_json, render=lambda console: _render(console, found))


def _sizes(planned: PlanFile) -> str:
    s = planned.sizes
    sizes = f"A {s.attention_groups} x {s.attention_ranks}, F {s.ffn_groups} x {s.ffn_ranks}, R {s.replicas}"
    return f"{sizes}, {planned.schedule.kind}, {planned.levers.dispatch}"


def _as_json(found: Profiled, out: Path | None) -> dict[str, Any]:
    best = found.best.plan
    gpu = found.cluster.pools[0].gpu
    return {
        "feasible": True,
        "attention_groups": best.sizes.attention_groups,
        "ffn_groups": best.sizes.ffn_groups,
        "attention_ranks": best.sizes.attention_ranks,
        "ffn_ranks": best.sizes.ffn_ranks,
        "replicas": best.sizes.replicas,
        "attention_nics": best.machines.attention_nics,
        "ffn_nics": best.machines.ffn_nics,
        "step_time_s": found.best.seconds,
        "memory_gb": {"attention": best.memory_gb.attention.total, "ffn": best.memory_gb.ffn.total},
        "trials": [
            {"sizes": each.plan.sizes.model_dump(), "predicted_s": each.predicted_seconds, "measured_s": each.seconds}
            for each in found.tried
        ],
        "calibration": gpu.calibration.model_dump()
        | {"transfer": found.cluster.network.calibration, "step_overhead_s": found.cluster.step_overhead_s},
        "plan": best.model_dump(mode="json"),
        "out": str(out) if out else None,
    }


def _render(console: Console, found: Profiled) -> None:
    table = Table("trial", "predicted", "measured", title="trials; each after a fit to those before it", box=None)
    for each in found.tried:
        mark = " (best)" if each is found.best else ""
        table.add_row(f"{_sizes(each.plan)}{mark}", f"{each.predicted_seconds:.4g} s", f"{each.seconds:.4g} s")
    console.print(table)
    factors = found.cluster.pools[0].gpu.calibration
    console.print(
        f"measured over predicted: attention {factors.attention:.2f}, FFN {factors.ffn:.2f}, backward "
        f"{factors.backward:.2f}, transfers {found.cluster.network.calibration:.2f}; a step takes "
        f"{found.cluster.step_overhead_s:.3g} s beside its pipeline",
        highlight=False,
    )
