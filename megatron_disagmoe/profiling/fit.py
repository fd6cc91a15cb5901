"""From trials to a calibrated cluster: what measured times are over predicted ones.

Forward times of either side and backward over forward get a factor each, the median over the trials. Transfers get a
factor and a latency, the line through their times: what a message takes whatever its size is no bandwidth, and taking
it for one makes large transfers too slow. What a step takes beyond its schedule with the measured stage times,
simulated, is the step's overhead.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median

from megatron_disagmoe.planner.cluster_spec import Calibration, Cluster
from megatron_disagmoe.planner.evaluate import evaluate
from megatron_disagmoe.planner.evaluation import Evaluation
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.rerank import ranked_as_planned
from megatron_disagmoe.planner.verify import problem_of
from megatron_disagmoe.profiling.trials import Trial
from megatron_disagmoe.simulator.simulate import simulate

#: Transfers whose times differ by less than this factor say nothing about a line.
_APART = 1.3


def calibrated(cluster: Cluster, model: ModelSpec, trials: Sequence[Trial]) -> Cluster:
    """``cluster`` as ``trials`` measured it; any calibration it has is replaced."""
    plain = without_calibration(cluster)
    pairs = [(trial, _evaluation(trial, model, plain)) for trial in trials]
    attention = median(trial.costs.attention / e.costs.attention for trial, e in pairs)
    ffn = median(trial.costs.ffn / e.costs.ffn for trial, e in pairs)
    backward = median(trial.costs.backward_ratio / e.costs.backward_ratio for trial, e in pairs)
    known = plain.network.local_latency_us * 1e-6
    factor, latency = _line(
        [
            (max(e.costs.edge(edge) - known, 1e-9), trial.costs.edge(edge))
            for trial, e in pairs
            for edge in (0, 1)
        ],
        known=known,
    )
    gpu = {"calibration": Calibration(attention=attention, ffn=ffn, backward=backward)}
    pools = tuple(pool.model_copy(update={"gpu": pool.gpu.model_copy(update=gpu)}) for pool in plain.pools)
    return plain.model_copy(
        update={
            "pools": pools,
            "network": plain.network.model_copy(
                update={"calibration": factor, "local_latency_us": latency * 1e6}
            ),
            "step_overhead_s": max(0.0, median(_overhead(trial, e) for trial, e in pairs)),
        }
    )


def _line(points: Sequence[tuple[float, float]], *, known: float) -> tuple[float, float]:
    """Factor and latency of measured transfer times: (seconds that bandwidth gives, measured seconds).

    The median slope of all pairs that differ enough (Theil and Sen's line, which a few wrong points do not turn). Where
    sizes hardly differ, or the line says that a message of no size takes no time, the latency stays ``known``.
    """
    slopes = [
        (y - other_y) / (x - other_x)
        for (x, y), (other_x, other_y) in combinations(points, 2)
        if max(x, other_x) >= _APART * min(x, other_x)
    ]
    if slopes and median(slopes) > 0:
        slope = median(slopes)
        latency = median(y - slope * x for x, y in points)
        if latency >= 0:
            return slope, latency
    return median(max(y - known, 1e-9) / x for x, y in points), known


def without_calibration(cluster: Cluster) -> Cluster:
    """``cluster`` as peaks, curves and bandwidths say."""
    gpu = {"calibration": Calibration()}
    pools = tuple(pool.model_copy(update={"gpu": pool.gpu.model_copy(update=gpu)}) for pool in cluster.pools)
    network = cluster.network.model_copy(update={"calibration": 1.0})
    return cluster.model_copy(update={"pools": pools, "network": network, "step_overhead_s": 0.0})


def _evaluation(trial: Trial, model: ModelSpec, cluster: Cluster) -> Evaluation:
    pools = tuple(pool.name for pool in cluster.pools)
    return evaluate(problem_of(trial.plan, model, cluster), trial.plan.allocation(pools=pools))


def _overhead(trial: Trial, evaluation: Evaluation) -> float:
    """What of a measured step is neither its simulated schedule nor gradient reduction and optimizer as predicted."""
    schedule = trial.plan.schedule
    ranked = ranked_as_planned(evaluation, group_size=schedule.group_size, max_live=schedule.max_live)
    pipeline = simulate(ranked.schedule, trial.costs).makespan
    return trial.step_seconds - pipeline - evaluation.synchronise_seconds
