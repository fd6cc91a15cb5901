"""``disagmoe bench planner``: step times as the planner predicts them, beside what processes take.

``emulated``: real executor and transport, stages that sleep and ports that are emulated (``schedule_ranks``). The
machine is one that the planner does not know: its times are other than those that peaks and bandwidths give, by factors
that trials of a few allocations must find out. Then others are predicted, scheduled by the prediction, and run.

``real``: a model trained by Megatron with one attention and one FFN process on two hosts whose link is limited. Stage
times are fitted to a trial of each dispatch mode at one limit; steps at other limits are predicted. The trials' link is
limited too, as what moves bytes there takes time of the cores that compute. Links are taken in turn, step by step, so
that a core's changes of pace are in all of them alike.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_disagmoe.benchmarks.ports import arbiter
from megatron_disagmoe.benchmarks.ranks import ThisMachine, run_ranks
from megatron_disagmoe.planner.allocation import Allocation, Job, NodeLayout
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.cluster_spec import Calibration, Cluster
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.model_import import load_model, model_from_megatron
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.plan_making import plan_of
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.rerank import Ranked, ranked_as_planned
from megatron_disagmoe.planner.space import Space
from megatron_disagmoe.planner.states import state_levels
from megatron_disagmoe.profiling.fit import calibrated
from megatron_disagmoe.profiling.trials import Trial
from megatron_disagmoe.schedules.text import save
from megatron_disagmoe.schedules.verifier import ensure_safe
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.tracing.merge import load_traces, match_transfers
from megatron_disagmoe.tracing.predicted import fit_costs
from megatron_disagmoe.tracing.report import find_steps

#: Predicted over measured may be off by this much (relative).
EMULATED_BAR, REAL_BAR = 0.10, 0.15
#: The allocation that is measured best must be among this many predicted best, or this close to the predicted best.
TOP, CLOSE = 2, 0.05

#: Gbit/s of the link that the real part's trials use; none that is predicted.
TRIAL_LINK = 2.0

_SEQUENCE, _BATCH, _GPUS = 128, 32, 16

#: Attention groups, FFN groups, attention ranks, FFN ranks. One process stands for all ranks of a group.
_FITTED = ((1, 1, 2, 2), (2, 2, 4, 2), (1, 2, 4, 4))
_PREDICTED = (
    (1, 1, 4, 4),
    (1, 1, 8, 8),
    (1, 1, 4, 8),
    (1, 1, 8, 4),
    (1, 2, 8, 4),
    (1, 2, 8, 2),
    (2, 1, 4, 8),
    (2, 1, 2, 8),
    (2, 2, 4, 4),
    (2, 2, 2, 4),
    (2, 2, 4, 1),
    (2, 2, 2, 2),
    (1, 3, 4, 4),
    (1, 3, 8, 2),
    (3, 1, 4, 4),
)


@dataclass(frozen=True)
class Prepared:
    """An allocation with its predicted schedule and step, and what its stages take in truth."""

    name: str
    ranked: Ranked
    truth: StageCosts


def emulated_model() -> ModelSpec:
    """Four MoE layers whose stages take about ten milliseconds."""
    small = load_model("quickstart").model_dump(mode="json")
    small |= {"name": "emulated", "hidden_size": 192, "dense_layers": (), "num_layers": 4}
    small["attention"] |= {"head_dim": 32}
    small["moe"] |= {"ffn_hidden_size": 384}
    return ModelSpec.model_validate(small)


def emulated_cluster(*, truth: bool) -> Cluster:
    """Sixteen processes; the ``truth`` is slower and faster than what the planner is told."""
    laptop = load_cluster("laptop")
    pool = laptop.pools[0].model_copy(update={"gpus_per_node": _GPUS, "nvlink_gb_per_s": 0.05})
    cluster = laptop.model_copy(update={"name": "emulated", "pools": (pool,)})
    if not truth:
        return cluster
    gpu = pool.gpu.model_copy(update={"calibration": Calibration(attention=0.8, ffn=1.3, backward=1.15)})
    slower = {"network": cluster.network.model_copy(update={"calibration": 1.6})}
    return cluster.model_copy(update={"pools": (pool.model_copy(update={"gpu": gpu}),), **slower})


def _ranked(cluster: Cluster, sizes: tuple[int, int, int, int]) -> Ranked:
    allocation = Allocation(
        attention_groups=sizes[0],
        ffn_groups=sizes[1],
        attention_ranks=sizes[2],
        ffn_ranks=sizes[3],
        nodes=NodeLayout.SPREAD,
    )
    problem = Problem(
        emulated_model(), cluster, Job(_SEQUENCE, _BATCH), Space(distributed_optimizer=False), state_levels("fp32")[0]
    )
    return ranked_as_planned(evaluate(problem, allocation), group_size=None, max_live=None)


def _prepared(cluster: Cluster, sizes: tuple[int, int, int, int]) -> Prepared:
    ranked, truth = _ranked(cluster, sizes), _ranked(emulated_cluster(truth=True), sizes)
    costs = {field.name: getattr(truth.evaluation.costs, field.name) for field in dataclasses.fields(StageCosts)}
    return Prepared("x".join(map(str, sizes)), ranked, StageCosts(**costs))


def run_emulated(
    prepared: Sequence[Prepared], folder: Path, *, repeats: int, traces: Path | None = None
) -> dict[str, list[float]]:
    """Seconds of every repeat of each, by name.

    Raises:
        RuntimeError: where a rank fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for each in prepared:
        path = folder / f"{each.name}.txt"
        schedule = ensure_safe(each.ranked.schedule).schedule
        save(schedule, path)
        cases.append({"name": each.name, "schedule": str(path), "costs": dataclasses.asdict(each.truth)})
    settings = {
        "unit_seconds": 1.0,
        "repeats": repeats,
        "ports": str(folder / "ports.socket"),
        "results": str(folder / "results.json"),
        "traces": None if traces is None else str(traces),
        "cases": cases,
    }
    groups = max(len(each.ranked.schedule.placement.groups) for each in prepared)
    limit = 60 + sum((repeats + 1) * each.ranked.pipeline_seconds * 3 + 5 for each in prepared)
    with arbiter(folder / "ports.socket"):
        run_ranks(
            [ThisMachine()] * groups,
            "megatron_disagmoe.benchmarks.schedule_ranks",
            settings,
            folder / "ranks",
            timeout_seconds=limit,
        )
    (folder / "ports.socket").unlink()
    results: dict[str, list[float]] = json.loads((folder / "results.json").read_text())
    return results


def fit_emulated(folder: Path, *, repeats: int) -> Cluster:
    """The cluster that the planner knows, fitted to trials of a few allocations."""
    known = emulated_cluster(truth=False)
    prepared = [_prepared(known, sizes) for sizes in _FITTED]
    measured = run_emulated(prepared, folder, repeats=repeats, traces=folder / "traces")
    trials = []
    for each in prepared:
        ranks = load_traces(folder / "traces" / each.name)
        steps = find_steps(ranks, skip=0)
        costs = fit_costs(ranks, match_transfers(ranks)[0], steps)
        trials.append(Trial(plan_of(each.ranked), costs, statistics.median(measured[each.name]), ()))
    return calibrated(known, emulated_model(), trials)


def measure_emulated(
    folder: Path, *, repeats: int, progress: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """Fit, predict, run; a row for each allocation.

    Raises:
        RuntimeError: where a rank fails.
    """
    progress(f"fitting to {len(_FITTED)} allocations")
    cluster = fit_emulated(folder / "fit", repeats=repeats)
    progress(f"running {len(_PREDICTED)} allocations")
    prepared = [_prepared(cluster, sizes) for sizes in _PREDICTED]
    measured = run_emulated(prepared, folder / "predicted", repeats=repeats)
    rows = [
        _row("emulated", each.name, each.ranked.pipeline_seconds, measured[each.name], EMULATED_BAR)
        for each in prepared
    ]
    return [*rows, _choice(rows)]


def _row(kind: str, name: str, predicted: float, seconds: Sequence[float], bar: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    error = predicted / median - 1
    return {
        "kind": kind,
        "allocation": name,
        "predicted_s": predicted,
        "measured_s": median,
        "measured_min_s": min(seconds),
        "measured_max_s": max(seconds),
        "repeats": len(seconds),
        "relative_error": error,
        "tolerance": bar,
        "holds": abs(error) <= bar,
    }


def _choice(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether the planner would have chosen well: its first choice against the best measured."""
    predicted = sorted(rows, key=lambda row: row["predicted_s"])
    best = min(rows, key=lambda row: row["measured_s"])
    place = predicted.index(best) + 1
    lost = predicted[0]["measured_s"] / best["measured_s"] - 1
    return {
        "kind": "choice",
        "allocation": predicted[0]["allocation"],
        "measured_best": best["allocation"],
        "measured_best_predicted_place": place,
        "relative_error": lost,
        "tolerance": CLOSE,
        "holds": place <= TOP or lost <= CLOSE,
    }


def measure_real(
    folder: Path,
    *,
    repeats: int,
    links: Sequence[float],
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """One attention and one FFN process of a real training run, over links of limited bandwidth.

    Raises:
        HostsUnavailable: without root or network namespaces.
        ValueError: a limit is the trials' own.
        RuntimeError: where a rank fails.
    """
    from megatron_disagmoe.benchmarks.hosts import Hosts, HostsUnavailable, why_unavailable
    from megatron_disagmoe.benchmarks.shaped.cases import MODELS, Variant
    from megatron_disagmoe.benchmarks.shaped.fleet import Fleet
    from megatron_disagmoe.benchmarks.shaped.measure import WARM_UP_STEPS
    from megatron_disagmoe.benchmarks.shaped.predict import Predictor

    if TRIAL_LINK in links:
        raise ValueError(f"--links {TRIAL_LINK:g}: trials run at that limit, predict others")
    reason = why_unavailable()
    if reason is not None:
        raise HostsUnavailable(reason)
    model = MODELS["balanced"]
    variants = [Variant("af-pipe", mode, "torch", "interleaved-1f1b") for mode in ("per-rank", "per-expert")]
    seconds: dict[tuple[Variant, float], list[float]] = {}
    numbers: list[int] = []
    with Hosts(2) as network, Fleet(network, model, variants, folder, timeout_seconds=300.0) as fleet:
        progress("warming up")
        for variant in variants * WARM_UP_STEPS:
            fleet.step(variant)
        taken = WARM_UP_STEPS
        for turn in range(repeats):
            for link in (TRIAL_LINK, *links):
                network.limit(link)
                for variant in variants:
                    seconds.setdefault((variant, link), []).append(fleet.step(variant).seconds)
                numbers += [taken] if link == TRIAL_LINK else []
                taken += 1
            progress(f"turn {turn + 1} of {repeats}")
    spec = model_from_megatron([*model.flags(), "--padded-vocab-size", "384"], name=model.name)
    measured = {
        variant: Predictor(fleet.traces(variant), variant, model, 2).costs(numbers) for variant in variants
    }
    rows = []
    for link in links:
        cluster = _two_hosts(link)
        trials = [
            Trial(
                plan_of(_one_and_one(cluster, spec, model.seq_length, model.micro_batches, variant.dispatch)),
                costs,
                statistics.median(seconds[variant, TRIAL_LINK]),
                (),
            )
            for variant, costs in measured.items()
        ]
        known = calibrated(cluster, spec, trials)
        # A link is what its limit says, not what the trials' link did.
        known = known.model_copy(update={"network": cluster.network})
        for variant in variants:
            ranked = _one_and_one(known, spec, model.seq_length, model.micro_batches, variant.dispatch)
            name = f"1 A, 1 F, {variant.dispatch}, {link:g} Gbit/s"
            rows.append(_row("real", name, ranked.step_seconds, seconds[variant, link], REAL_BAR))
    return rows


def _two_hosts(gbit_per_s: float) -> Cluster:
    """Two nodes of one process; of a jumbo frame's 9014 bytes 8948 are payload."""
    laptop = load_cluster("laptop")
    pool = laptop.pools[0].model_copy(
        update={"num_nodes": 2, "gpus_per_node": 1, "nics_gbit_per_s": (gbit_per_s,), "nvlink_gb_per_s": 1.0}
    )
    network = laptop.network.model_copy(update={"efficiency": 8948 / 9014, "latency_us": 200.0})
    return laptop.model_copy(update={"name": "two hosts", "pools": (pool,), "network": network})


def _one_and_one(cluster: Cluster, model: ModelSpec, sequence: int, micro_batches: int, dispatch: Any) -> Ranked:
    allocation = Allocation(
        attention_groups=1,
        ffn_groups=1,
        attention_ranks=1,
        ffn_ranks=1,
        nodes=NodeLayout.SEPARATE,
        dispatch=dispatch,
        schedule="interleaved-1f1b",
        group_size=4,
    )
    job = Job(sequence, 2 * micro_batches, 2)
    problem = Problem(model, cluster, job, Space(distributed_optimizer=False), state_levels("fp32")[0])
    return ranked_as_planned(evaluate(problem, allocation), group_size=4, max_live=None)
