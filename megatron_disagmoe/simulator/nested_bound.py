"""A lower bound that holds for few micro-batches too, where a step is long because its path is."""

from __future__ import annotations

from megatron_disagmoe.simulator.bounds import Paths, Workload


def nested_bound(workload: Workload) -> float:
    """The largest, over all groups and their stages s, of how long stage s and the group's later ones keep a step busy.

    The forwards of those stages begin when the first can reach s, no earlier; each is followed by its backward, so the
    last thing done of all that is a backward, of stage s or later, and the way down from s comes after it. In between
    the group does all of it, one at a time. With s the group's first stage this is the fill bound of its compute; with
    a later one it counts less work and a longer way. Weight gradients of a split backward are left out: they may wait.
    """
    paths, n = Paths(workload), workload.num_micro_batches
    best = paths.whole
    work: dict[int, float] = {}
    way_down: dict[int, float] = {}
    for stage in range(paths.last, -1, -1):
        group, split = paths.groups[stage], workload.split[stage]
        mine = n * paths.forward[stage]
        if not workload.forward_only:
            mine += n * paths.inputs[stage] + (n - split) * paths.weights[stage]
        work[group] = work.get(group, 0.0) + mine
        after = paths.after_forward[stage] if workload.forward_only else _way_down(paths, stage)
        way_down[group] = min(way_down.get(group, after), after)
        best = max(best, paths.forward_start[stage] + work[group] + way_down[group])
    return best


def _way_down(paths: Paths, stage: int) -> float:
    """Least time from the end of a backward to the end of the step, without weight gradients of its own."""
    if stage == 0:
        return 0.0
    return paths.edge[stage - 1] + paths.backward[stage - 1] + paths.after_backward[stage - 1]
