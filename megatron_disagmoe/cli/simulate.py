"""``disagmoe simulate``: a step of one training system on a model and a cluster, on the event engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit, err_console

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def simulate(
    model: Annotated[str, typer.Option(help="Shipped name or YAML.", show_default=False)],
    cluster: Annotated[str, typer.Option(help="Shipped name or YAML.", show_default=False)],
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.", show_default=False)],
    system: Annotated[
        str,
        typer.Option(
            help="megatron-1f1b, megatron-overlap, tutel, comet, dualpipe, dualpipe-per-node, af-pipe.",
            show_default=False,
        ),
    ],
    plan: Annotated[Path | None, typer.Option(help="Of disagmoe plan, for af-pipe.", show_default=False)] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace here.", show_default=False)] = None,
    global_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a step.", show_default="4 a GPU")
    ] = None,
    bytes_per_parameter: Annotated[int, typer.Option(help="18, 16, 14, 12 or 8.")] = 18,
    expert_parallel: Annotated[int, typer.Option(min=1, help="EP of baselines.")] = 16,
    imbalance: Annotated[float, typer.Option(min=1.0, help="Rows of the busiest expert rank over the mean.")] = 1.0,
    calibrated: Annotated[
        bool, typer.Option("--calibrated/--as-shipped", help="GPUs with the two factors that figure 6a gave.")
    ] = True,
    as_json: bool = JsonOption,
) -> None:
    """Simulate a step at the system's best choice that fits memory; exit code 1 where nothing fits."""
    with bad_input_exits_2():
        from megatron_disagmoe.planner.cluster_import import load_cluster
        from megatron_disagmoe.planner.model_import import load_model
        from megatron_disagmoe.planner.plan_file import load_plan
        from megatron_disagmoe.planner.states import state_level
        from megatron_disagmoe.reproduction.constants import Constants
        from megatron_disagmoe.reproduction.hardware import calibrate, with_factors
        from megatron_disagmoe.reproduction.simulation import save_trace
        from megatron_disagmoe.reproduction.simulation import simulate as run
        from megatron_disagmoe.reproduction.systems.choose import Task

        constants = Constants(bytes_per_parameter=bytes_per_parameter, expert_parallel=expert_parallel)
        machines = load_cluster(cluster)
        state_level(machines.pools[0].gpu.dtype, bytes_per_parameter)
        experts = load_model(model)
        if machines.num_gpus % expert_parallel or experts.moe.num_experts % expert_parallel:
            raise ValueError(
                f"--expert-parallel {expert_parallel} must divide the cluster's {machines.num_gpus} GPUs and the "
                f"model's {experts.moe.num_experts} experts"
            )
        if calibrated:
            factors = calibrate(Constants())
            machines = with_factors(machines, attention=factors.attention, ffn=factors.ffn)
        batch = global_batch_size or constants.sequences_per_gpu * machines.num_gpus
        task = Task(experts, machines, seq_length, batch, constants, imbalance)
        found = run(system, task, plan=load_plan(plan) if plan is not None else None)
        if found is not None and trace is not None:
            save_trace(found.slices, trace)
    if found is None:
        err_console.print(
            f"{system}: nothing fits at {bytes_per_parameter} bytes a parameter and a batch of {batch}: "
            "try fewer bytes a parameter, or another batch",
            highlight=False,
        )
        emit({"feasible": False}, as_json=as_json, render=lambda console: None)
        raise typer.Exit(EXIT_DOES_NOT_HOLD)
    result = found.result
    content = {
        "feasible": True,
        "system": system,
        "step_time_s": result.step_seconds,
        "exposed_communication_s": result.exposed_seconds,
        "bubble_s": result.bubble_seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_gb": result.peak_bytes / 1e9,
        "choice": dict(result.choice),
        "trace": str(trace) if trace is not None else None,
    }

    def render(console: Console) -> None:
        console.print(f"step               {result.step_seconds:.4g} s", highlight=False)
        console.print(f"exposed            {result.exposed_seconds:.4g} s of communication", highlight=False)
        console.print(f"bubble             {result.bubble_seconds:.4g} s", highlight=False)
        console.print(f"throughput         {result.tokens_per_second:,.0f} tokens a second", highlight=False)
        console.print(f"memory             {result.peak_bytes / 1e9:.1f} GB on the fullest GPU", highlight=False)
        for name, value in result.choice.items():
            console.print(f"{name.replace('_', ' '):<18} {value}", highlight=False, markup=False)

    emit(content, as_json=as_json, render=render)
