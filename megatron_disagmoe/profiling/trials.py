"""Run a plan for a few steps on this machine and measure it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_disagmoe.local_job import Job, Result, run
from megatron_disagmoe.planner.model_export import megatron_model_flags
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.plan_file import PlanFile, save_plan
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.tracing.merge import load_traces, match_transfers
from megatron_disagmoe.tracing.predicted import fit_costs
from megatron_disagmoe.tracing.report import NANO, find_steps

#: Steps of a trial, and those at its start that are not counted: connections and buffers are made in them.
STEPS, WARM_UP = 8, 3
#: Most seconds of a trial.
TIMEOUT = 300.0

_TRAINING = (
    "--lr 1e-4 --lr-decay-style constant --clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer --log-interval 1 "
    "--eval-interval 1000000 --eval-iters 0 --seed 1234 --moe-token-dispatcher-type alltoall"
)


@dataclass(frozen=True)
class Trial:
    """What a plan took. ``costs``: of its stages and transfers, in seconds; ``step_seconds``: of a step, the median."""

    plan: PlanFile
    costs: StageCosts
    step_seconds: float
    losses: tuple[float, ...]


def training_flags(plan: PlanFile, model: ModelSpec, plan_path: Path, *, steps: int) -> list[str]:
    """The flags that train ``model`` by the plan at ``plan_path`` on made-up data."""
    return [
        *("--af-pipe", "--af-plan", str(plan_path)),
        *plan.megatron_flags,
        *megatron_model_flags(model, sequence_length=plan.batch.sequence_length),
        *("--train-iters", str(steps)),
        *_TRAINING.split(),
    ]


def run_trials(plans: list[PlanFile], model: ModelSpec, folder: Path, *, steps: int = STEPS) -> list[Trial]:
    """Run each plan; all ranks are processes of this machine.

    Raises:
        RuntimeError: a trial failed, with the ends of its outputs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for number, plan in enumerate(plans):
        path, traces = folder / f"trial-{number}.yaml", folder / f"traces-{number}"
        save_plan(plan, path)
        flags = [*training_flags(plan, model, path, steps=steps), "--af-trace-dir", str(traces)]
        jobs.append(Job(f"trial-{number}", plan.sizes.gpus, flags, timeout_seconds=TIMEOUT))
    results = run(jobs, folder / "jobs")
    return [
        _measured(plan, result.checked(), folder / f"traces-{number}")
        for number, (plan, result) in enumerate(zip(plans, results, strict=True))
    ]


def _measured(plan: PlanFile, result: Result, traces: Path) -> Trial:
    from megatron_disagmoe.training_log import TrainingLog

    ranks = load_traces(traces)
    steps = find_steps(ranks, skip=WARM_UP)
    transfers, _ = match_transfers(ranks)
    log = TrainingLog.read(result.output.splitlines())
    return Trial(
        plan=plan,
        costs=fit_costs(ranks, transfers, steps),
        step_seconds=median((step.end - step.start) / NANO for step in steps),
        losses=tuple(step.fields["lm loss"] for step in log.steps),
    )
