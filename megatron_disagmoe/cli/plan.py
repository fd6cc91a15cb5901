"""``disagmoe plan``: the fastest allocation of a model on a cluster that fits, as a file that ``--af-plan`` runs."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from megatron_disagmoe.cli.output import EXIT_DOES_NOT_HOLD, JsonOption, bad_input_exits_2, emit, err_console
from megatron_disagmoe.cli.plan_options import executable_space, space_of
from megatron_disagmoe.cli.plan_report import (
    drift_json,
    render_drift,
    render_infeasible,
    render_plan,
    rows_of_alternatives,
)
from megatron_disagmoe.planner.allocation import Job
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.drift import drift as compare
from megatron_disagmoe.planner.drift import new_plan, parse_mix
from megatron_disagmoe.planner.explain import binding, explained, uses
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.paper_roofline import Split, split_of
from megatron_disagmoe.planner.picture import check_picture, draw_roofline
from megatron_disagmoe.planner.plan_file import PlanFile, load_plan, save_plan
from megatron_disagmoe.planner.plan_making import plan_of
from megatron_disagmoe.planner.planning import Outcome, Request, default_batch
from megatron_disagmoe.planner.planning import plan as make_plan
from megatron_disagmoe.planner.sensitivity import Diagnosis, Variation, diagnose
from megatron_disagmoe.planner.sensitivity import sensitivity as vary
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.verify import verify_plan

#: Above this many GPUs a sensitivity table takes minutes; it is made when asked for.
_MANY_GPUS = 1024


app = typer.Typer(add_completion=False, rich_markup_mode=None, invoke_without_command=True)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Shipped name, YAML, config.json, or Megatron flags.", show_default=False)
]
ClusterOption = Annotated[str | None, typer.Option("--cluster", help="Shipped name or YAML.", show_default=False)]


@app.callback()
def plan(
    ctx: typer.Context,
    model: ModelOption = None,
    cluster: ClusterOption = None,
    seq_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence.", show_default=False)] = None,
    global_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a step.", show_default="8 x 4096 tokens a GPU")
    ] = None,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a micro-batch on a rank.")] = 1,
    imbalance: Annotated[float, typer.Option(help="Rows of the busiest FFN rank over the mean.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Write the plan here.", show_default=False)] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the roofline here (.png, .svg).", show_default=False)
    ] = None,
    executable: Annotated[bool, typer.Option("--executable", help="Only what this version can run.")] = False,
    whole_nodes: Annotated[bool, typer.Option("--whole-nodes", help="No node half used.")] = False,
    equal_depth: Annotated[bool, typer.Option("--equal-depth", help="As many FFN as attention groups.")] = False,
    no_distributed_optimizer: Annotated[bool, typer.Option("--no-distributed-optimizer")] = False,
    bytes_per_parameter: Annotated[
        str | None, typer.Option(help="18,16,14,12,8 or some of them.", show_default="all")
    ] = None,
    max_gpus: Annotated[int | None, typer.Option(min=2, help="Use at most this many.", show_default="all")] = None,
    fix: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE[,VALUE]: allow only these, e.g. ffn_ranks=16,32. May be repeated."),
    ] = None,
    keep: Annotated[int, typer.Option(min=1, max=1000, help="Candidates ranked again by simulation.")] = 8,
    sensitivity: Annotated[
        bool | None, typer.Option("--sensitivity/--no-sensitivity", help="Vary machine and constraints.")
    ] = None,
    why: Annotated[
        bool, typer.Option("--reasons/--no-reasons", help="Plan again without each lever that is on, to say why it is.")
    ] = True,
    profile: Annotated[bool, typer.Option("--profile", help="Fit the efficiencies by trials on this machine.")] = False,
    trials: Annotated[int, typer.Option(min=1, max=64, help="With --profile: K, most trials.")] = 6,
    radius: Annotated[int, typer.Option(min=0, max=8, help="With --profile: r, steps away from the seed.")] = 1,
    cluster_out: Annotated[
        Path | None, typer.Option(help="With --profile: write the fitted cluster here.", show_default=False)
    ] = None,
    as_json: bool = JsonOption,
) -> None:
    """Find GPUs, NICs, depth, node placement, schedule and memory levers for a model on a cluster."""
    if ctx.invoked_subcommand is not None:
        return
    with bad_input_exits_2():
        for flag, value in (("--model", model), ("--cluster", cluster), ("--seq-length", seq_length)):
            if value is None:
                raise ValueError(f"{flag} is missing")
        if picture is not None:
            check_picture(picture)
        assert model is not None, "checked above"
        assert cluster is not None, "checked above"
        assert seq_length is not None, "checked above"
        machines = load_cluster(cluster)
        batch = global_batch_size or default_batch(
            machines, sequence_length=seq_length, micro_batch_size=micro_batch_size
        )
        space = space_of(
            fixed=fix or [],
            bytes_per_parameter=bytes_per_parameter,
            asymmetric=not equal_depth,
            whole_nodes=whole_nodes,
            distributed_optimizer=not no_distributed_optimizer,
            max_gpus=max_gpus,
        )
        job = Job(seq_length, batch, micro_batch_size, imbalance)
        request = Request(load_model(model), machines, job, executable_space(space) if executable else space, keep)
        if profile:
            from megatron_disagmoe.profiling.command import plan_by_trials

            try:
                plan_by_trials(request, out=out, cluster_out=cluster_out, trials=trials, radius=radius, as_json=as_json)
            except RuntimeError as error:  # a trial failed
                err_console.print(f"--profile: {error}", markup=False, highlight=False, soft_wrap=True)
                raise typer.Exit(EXIT_DOES_NOT_HOLD) from None
            return
        with _progress() as report:
            outcome = make_plan(request, progress=report)
            if not outcome.ranked:
                diagnosis = diagnose(request)
            else:
                outcome, said = explained(outcome, progress=report) if why else (outcome, [])
                planned = plan_of(outcome.ranked[0], reasons=said)
                many = machines.num_gpus > _MANY_GPUS
                asked = sensitivity if sensitivity is not None else not (as_json or many)
                varied = vary(request, progress=report) if asked else []
        if not outcome.ranked:
            _no_plan(request, diagnosis, outcome, as_json=as_json)
        if out is not None:
            save_plan(planned, out)
        if picture is not None:
            draw_roofline(outcome.ranked[0], picture)
    paper = split_of(request.model, machines, sequence=seq_length)
    result = _as_json(outcome, planned, varied, paper) | {"out": str(out) if out else None}
    emit(result, as_json=as_json, render=lambda console: render_plan(console, outcome, planned, varied, paper))
    if out is not None and not as_json:
        err_console.print(f"plan written to {out}", highlight=False)


def _as_json(outcome: Outcome, planned: PlanFile, varied: list[Variation], paper: Split | None) -> dict[str, Any]:
    best, sizes = outcome.ranked[0], planned.sizes
    return {
        "feasible": True,
        "attention_groups": sizes.attention_groups,
        "ffn_groups": sizes.ffn_groups,
        "attention_ranks": sizes.attention_ranks,
        "ffn_ranks": sizes.ffn_ranks,
        "replicas": sizes.replicas,
        "attention_nics": planned.machines.attention_nics,
        "ffn_nics": planned.machines.ffn_nics,
        "step_time_s": planned.expected.step_time_s,
        "memory_gb": {
            "attention": planned.memory_gb.attention.total,
            "ffn": planned.memory_gb.ffn.total,
        },
        "solve_time_s": outcome.solve_seconds,
        "rerank_time_s": outcome.rerank_seconds,
        "candidates_scored": outcome.num_scored,
        "plan": planned.model_dump(mode="json"),
        "binding": binding(best),
        "uses": [dataclasses.asdict(use) for use in uses(best)],
        "paper": None if paper is None else dataclasses.asdict(paper),
        "alternatives": rows_of_alternatives(outcome),
        "sensitivity": [dataclasses.asdict(each) for each in varied],
    }


def _no_plan(request: Request, diagnosis: Diagnosis, outcome: Outcome, *, as_json: bool) -> None:
    result = {
        "feasible": False,
        "why": list(diagnosis.why),
        "remedies": [dataclasses.asdict(each) for each in diagnosis.remedies],
        "solve_time_s": outcome.solve_seconds,
    }
    emit(result, as_json=as_json, render=lambda console: render_infeasible(console, request, diagnosis))
    raise typer.Exit(EXIT_DOES_NOT_HOLD)


@contextmanager
def _progress() -> Iterator[Any]:
    """A line on standard error for searches that take long; nothing for others."""
    begin = time.monotonic()
    with err_console.status("planning") as status:

        def report(what: str, share: float, count: int) -> None:
            if time.monotonic() - begin > 1:
                status.update(f"{what}: {share:.0%} ({count:,})")

        yield report


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.", show_default=False)],
    model: ModelOption = None,
    cluster: ClusterOption = None,
    as_json: bool = JsonOption,
) -> None:
    """Check a plan for a model and a cluster: sizes, nodes, memory with its real schedule, and what it promises."""
    with bad_input_exits_2():
        planned = load_plan(file)
        errors = verify_plan(planned, load_model(model or planned.model), load_cluster(cluster or planned.cluster))

    def render(console: Console) -> None:
        for error in errors:
            console.print(error, markup=False, highlight=False, soft_wrap=True)
        if not errors:
            console.print("the plan holds", highlight=False)
            for line in planned.missing:
                console.print(f"this version cannot run it yet: {line}", markup=False, highlight=False, soft_wrap=True)

    result = {"ok": not errors, "errors": errors, "runs_here": planned.runs_here, "missing": list(planned.missing)}
    emit(result, as_json=as_json, render=render)
    if errors:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@app.command()
def rehearse(
    file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.", show_default=False)],
    model: ModelOption = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps to train.")] = 3,
    as_json: bool = JsonOption,
) -> None:
    """Train a plan made small, for a few steps, as processes of this machine."""
    with bad_input_exits_2(), tempfile.TemporaryDirectory(prefix="disagmoe-rehearse-") as scratch:
        from megatron_disagmoe.profiling.rehearse import rehearse as try_small

        planned = load_plan(file)
        found = try_small([(planned, load_model(model or planned.model))], Path(scratch), steps=steps)[0]
    sizes = found.small.plan.sizes
    result = {
        "trained": found.trained,
        "losses": list(found.losses),
        "error": found.error,
        "sizes": sizes.model_dump(),
        "schedule": found.small.plan.schedule.kind,
        "flags": found.small.plan.flags,
        "left_out": list(found.small.left_out),
    }

    def render(console: Console) -> None:
        groups = f"A {sizes.attention_groups} x {sizes.attention_ranks}, F {sizes.ffn_groups} x {sizes.ffn_ranks}"
        console.print(f"{groups}, {found.small.plan.schedule.kind}: losses {list(found.losses)}", highlight=False)
        for each in found.small.left_out:
            console.print(f"left out: {each}", markup=False, highlight=False, soft_wrap=True)
        if found.error:
            console.print(found.error, markup=False, highlight=False, soft_wrap=True)

    emit(result, as_json=as_json, render=render)
    if not found.trained:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@app.command()
def drift(
    file: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan in use.", show_default=False)],
    mix: Annotated[str, typer.Option(help="LENGTH:SHARE of the steps, e.g. 4096:0.7,32768:0.3.", show_default=False)],
    model: ModelOption = None,
    cluster: ClusterOption = None,
    remaining_steps: Annotated[int, typer.Option(min=1, help="Steps still to train.")] = 10_000,
    restart_seconds: Annotated[float, typer.Option(min=0, help="Ending, starting, first steps.")] = 120.0,
    executable: Annotated[bool, typer.Option("--executable", help="Only what this version can run.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the new plan here.", show_default=False)] = None,
    as_json: bool = JsonOption,
) -> None:
    """Say whether re-allocating for a new mix of lengths, or newly measured times, pays for its reshard."""
    with bad_input_exits_2():
        planned = load_plan(file)
        shares = parse_mix(mix)
        spec, machines = load_model(model or planned.model), load_cluster(cluster or planned.cluster)
        space = executable_space(Space()) if executable else Space()
        with _progress() as report:
            found = compare(
                planned, spec, machines, shares, space=space, restart_seconds=restart_seconds, progress=report
            )
            if out is not None:
                save_plan(new_plan(found, planned, spec, machines, progress=report), out)
    emit(
        drift_json(found, remaining_steps) | {"out": str(out) if out else None},
        as_json=as_json,
        render=lambda console: render_drift(console, found, remaining_steps),
    )
