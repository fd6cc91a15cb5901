"""Workload drift: whether a plan still pays when sequence lengths, or measured times, are no longer what they were.

A mix says which share of the steps has which sequence length, all with the plan's number of tokens. The sizes of a plan
(groups, ranks, replicas, cuts) can only change through a checkpoint; schedule, recomputation and dispatch change
with a restart and are chosen anew at every length, for the plan as it is and for every plan compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_disagmoe.planner.allocation import Allocation, Job
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.evaluate import allocation_of
from megatron_disagmoe.planner.model_spec import ModelSpec
from megatron_disagmoe.planner.plan_file import PlanFile
from megatron_disagmoe.planner.plan_making import plan_of
from megatron_disagmoe.planner.planning import LevelSearch, Progress, Request, best_analytic, part
from megatron_disagmoe.planner.planning import plan as make_plan
from megatron_disagmoe.planner.search import search
from megatron_disagmoe.planner.space import Space, fixed_sizes
from megatron_disagmoe.planner.states import state_level

#: Candidates of each length that are compared over the whole mix.
_KEEP = 12


@dataclass(frozen=True)
class Share:
    """``share`` of the steps have sequences of ``length`` tokens."""

    length: int
    share: float


def parse_mix(text: str) -> tuple[Share, ...]:
    """``4096:0.7,32768:0.3``; shares are made to add up to 1.

    Raises:
        ValueError: not of that form.
    """
    found = []
    for item in text.split(","):
        length, _, share = item.partition(":")
        try:
            found.append(Share(int(length), float(share or 1)))
        except ValueError:
            raise ValueError(f"--mix {text}: give LENGTH:SHARE with commas between, e.g. 4096:0.7,32768:0.3") from None
    for each in found:
        if not 1 <= each.length <= 1_000_000_000 or not 0 < each.share < math.inf:
            raise ValueError(f"--mix {text}: {each.length}:{each.share:g} is no positive length and share")
    total = sum(each.share for each in found)
    return tuple(Share(each.length, each.share / total) for each in found)


@dataclass(frozen=True)
class Mixed:
    """Sizes with their analytic step time at each length, and on average over the mix."""

    allocation: Allocation
    seconds: tuple[float, ...]
    mean: float


@dataclass(frozen=True)
class Drift:
    """``reshard_seconds``: writing, reading and restarting. ``current`` has infinite times where it does not fit.

    ``space``: what ``best`` was chosen from.
    """

    current: Mixed
    best: Mixed
    mix: tuple[Share, ...]
    checkpoint_gb: float
    reshard_seconds: float
    space: Space

    @property
    def saved_per_step(self) -> float:
        """Seconds."""
        return self.current.mean - self.best.mean

    @property
    def break_even_steps(self) -> float:
        """After how many steps re-allocating has paid; infinite where it never does, 0 where there is no choice."""
        if math.isinf(self.current.mean):
            return 0.0
        return self.reshard_seconds / self.saved_per_step if self.saved_per_step > 0 else math.inf

    def pays(self, remaining_steps: int) -> bool:
        """Whether to re-allocate for this many more steps."""
        return self.break_even_steps < remaining_steps


def drift(
    plan: PlanFile,
    model: ModelSpec,
    cluster: Cluster,
    mix: Sequence[Share],
    *,
    space: Space | None = None,
    restart_seconds: float = 120.0,
    progress: Progress | None = None,
) -> Drift:
    """Compare ``plan`` with the best for ``mix`` on ``cluster`` (which may be measured anew).

    Raises:
        ValueError: nothing fits every length of the mix, or the plan is for another cluster.
    """
    state = state_level(cluster.pools[0].gpu.dtype, plan.levers.bytes_per_parameter)
    free = replace(space or Space(), bytes_per_parameter=(state.total,))
    current = plan.allocation(pools=tuple(pool.name for pool in cluster.pools))
    requests = [Request(model, cluster, _job(plan, each.length), free, keep=_KEEP) for each in mix]
    candidates = [current, *_candidates(requests, progress)]
    mixed: list[Mixed] = []
    different = list(dict.fromkeys(map(_sizes_only, candidates)))
    for allocation in different:
        mixed.append(_over_mix(allocation, requests, mix))
        if progress:
            progress("comparing over the mix", len(mixed) / len(different), len(mixed))
    best = min(mixed, key=lambda each: each.mean)
    if math.isinf(best.mean):
        lengths = ", ".join(str(each.length) for each in mix)
        raise ValueError(f"--mix: no single allocation fits all of {lengths} tokens on {cluster.name}")
    saved = model.num_parameters * (state.weight + state.optimizer)  # gradients are not saved
    return Drift(
        current=mixed[0],
        best=best,
        mix=tuple(mix),
        checkpoint_gb=saved / 1e9,
        reshard_seconds=2 * saved / (cluster.storage_gb_per_s * 1e9) + restart_seconds,
        space=free,
    )


def _job(plan: PlanFile, length: int) -> Job:
    """As many tokens a step as the plan has, in whole micro-batches of all its attention ranks."""
    batch, sizes = plan.batch, plan.sizes
    sequences = batch.global_batch_size * batch.sequence_length / length
    unit = batch.micro_batch_size * sizes.attention_ranks * sizes.replicas
    return Job(length, max(1, round(sequences / unit)) * unit, batch.micro_batch_size, batch.imbalance)


def _candidates(requests: Sequence[Request], progress: Progress | None) -> Iterator[Allocation]:
    """The best of every length."""
    for request in requests:
        state = request.levels()[0]
        report = part(progress, f"searching at {request.job.sequence_length} tokens")
        for problem in request.problems(state):
            found = search(problem, keep=request.keep, progress=report)
            for at in range(len(found.seconds)):
                yield allocation_of(problem, found.candidates, at)


def _sizes_only(a: Allocation) -> Allocation:
    """What only a checkpoint can change."""
    return Allocation(**a.sizes, attention_pool=a.attention_pool, ffn_pool=a.ffn_pool)


def _over_mix(allocation: Allocation, requests: Sequence[Request], mix: Sequence[Share]) -> Mixed:
    seconds = tuple(_seconds(replace(r, space=fixed_sizes(r.space, allocation))) for r in requests)
    mean = sum(each.share * time for each, time in zip(mix, seconds, strict=True))
    return Mixed(allocation, seconds, mean)


def _seconds(request: Request) -> float:
    try:
        found: LevelSearch | None = best_analytic(request)
    except ValueError:  # these sizes do not divide this batch or this length
        return math.inf
    return found.seconds if found else math.inf


def new_plan(
    found: Drift, plan: PlanFile, model: ModelSpec, cluster: Cluster, *, progress: Progress | None = None
) -> PlanFile:
    """The best allocation of a mix as a plan, its schedule made for the most frequent length.

    Raises:
        ValueError: no schedule of it fits.
    """
    most = max(found.mix, key=lambda each: each.share)
    space = fixed_sizes(found.space, found.best.allocation)
    ranked = make_plan(Request(model, cluster, _job(plan, most.length), space), progress=progress).ranked
    if not ranked:
        raise ValueError(f"--mix: no schedule of the new allocation fits {most.length} tokens")
    return plan_of(ranked[0], reasons=[f"made for a mix of lengths, scheduled for {most.length} tokens"])
