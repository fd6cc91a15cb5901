"""What a step has to do, in no order, and the longest paths of a single micro-batch through it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_disagmoe.schedules.actions import Placement, Schedule
from megatron_disagmoe.schedules.orders import D, I, Orders, group_of_stage
from megatron_disagmoe.simulator.costs import StageCosts


@dataclass(frozen=True)
class Workload:
    """What is to be done, in no order.

    ``split``: for every stage (A(i) is 2i, F(i) is 2i + 1) how many micro-batches have their backward as I and W.
    ``again``: for every layer how many micro-batches are dispatched a second time.
    """

    placement: Placement
    costs: StageCosts
    num_micro_batches: int
    forward_only: bool
    split: tuple[int, ...]
    again: tuple[int, ...]

    @classmethod
    def uniform(
        cls,
        placement: Placement,
        costs: StageCosts,
        *,
        num_micro_batches: int,
        forward_only: bool = False,
        split_backward: bool = False,
        redispatch: bool = False,
    ) -> Workload:
        """All micro-batches alike."""
        layers = placement.num_layers
        return cls(
            placement=placement,
            costs=costs,
            num_micro_batches=num_micro_batches,
            forward_only=forward_only,
            split=(num_micro_batches * (split_backward and not forward_only),) * (2 * layers + 1),
            again=(num_micro_batches * (redispatch and not forward_only),) * layers,
        )

    @classmethod
    def of(cls, schedule: Schedule | Orders, costs: StageCosts) -> Workload:
        """What ``schedule`` does."""
        orders = Orders.of(schedule) if isinstance(schedule, Schedule) else schedule
        last = 2 * orders.placement.num_layers
        split = np.bincount(orders.stage[orders.kind == I], minlength=last + 1)
        again = np.bincount(orders.stage[orders.kind == D] >> 1, minlength=last // 2)
        return cls(
            placement=orders.placement,
            costs=costs,
            num_micro_batches=orders.num_micro_batches,
            forward_only=orders.forward_only,
            split=tuple(split.tolist()),
            again=tuple(again.tolist()),
        )

    def dropped(self, stage: int) -> int:
        """Micro-batches whose activation does not live from forward to backward, as they are dispatched again."""
        return self.again[stage // 2] if stage % 2 else 0


class Paths:
    """Longest paths of one micro-batch alone in the machine, to and from the actions of every stage.

    ``forward``, ``backward``: time of F, and of B or I. ``weights``: time of W, 0 where B contains it.
    ``forward_start``, ``backward_start``: earliest start. ``after_forward``, ``after_backward``: least time from an
    action's end to the end of the step. Where only some micro-batches have their backward split, or are dispatched
    again, the shorter holds; ``again`` is what the latter's backward takes on top.
    """

    def __init__(self, workload: Workload) -> None:
        costs, layers = workload.costs, workload.placement.num_layers
        self.workload = workload
        self.groups = group_of_stage(workload.placement).tolist()
        self.last = last = 2 * layers
        stages = range(last + 1)
        self.forward = [costs.forward(stage, num_layers=layers) for stage in stages]
        n, dropped = workload.num_micro_batches, [workload.dropped(stage) for stage in stages]
        more = [costs.dispatched_again(s, num_layers=layers) if dropped[s] else 0.0 for s in stages]
        self.inputs = [
            costs.input_gradient(s, num_layers=layers) + (more[s] if dropped[s] == n else 0.0) for s in stages
        ]
        self.again = [more[s] if dropped[s] < n else 0.0 for s in stages]
        self.weights = [costs.weight_gradient(stage, num_layers=layers) for stage in stages]
        self.backward = [
            i if split else i + w for i, w, split in zip(self.inputs, self.weights, workload.split, strict=True)
        ]
        self.edge = [costs.edge(edge) for edge in range(last)]
        self.lane = [  # by the stage it leaves in forward; 0 where it is no transfer
            costs.lane if stage % 2 == 0 and stage < last and self.groups[stage] != self.groups[stage + 2] else 0.0
            for stage in stages
        ]
        self._forward_start()
        self._after()

    def _forward_start(self) -> None:
        last = self.last
        self.forward_start = [0.0] * (last + 1)
        self.backward_start = [0.0] * (last + 1)
        for stage in range(1, last + 1):
            start = self.forward_start[stage - 1] + self.forward[stage - 1] + self.edge[stage - 1]
            if stage % 2 == 0:
                start = max(start, self.forward_start[stage - 2] + self.forward[stage - 2] + self.lane[stage - 2])
            self.forward_start[stage] = start
        self.backward_start[last] = self.forward_start[last] + self.forward[last]
        for stage in range(last - 1, -1, -1):
            start = self.backward_start[stage + 1] + self.backward[stage + 1] + self.edge[stage]
            if stage % 2 == 0:
                start = max(start, self.backward_start[stage + 2] + self.backward[stage + 2] + self.lane[stage])
            self.backward_start[stage] = start

    def _after(self) -> None:
        last, workload = self.last, self.workload
        self.after_forward = [0.0] * (last + 1)
        self.after_backward = [0.0] * (last + 1)
        for stage in range(last + 1):
            # W follows where every micro-batch has one
            after = self.weights[stage] if workload.split[stage] == workload.num_micro_batches else 0.0
            if stage > 0:
                after = max(after, self.edge[stage - 1] + self.backward[stage - 1] + self.after_backward[stage - 1])
            if stage > 0 and stage % 2 == 0:
                lane = self.lane[stage - 2] + self.backward[stage - 2] + self.after_backward[stage - 2]
                after = max(after, lane)
            self.after_backward[stage] = after
        if not workload.forward_only:
            self.after_forward[last] = self.backward[last] + self.after_backward[last]
        for stage in range(last - 1, -1, -1):
            after = self.edge[stage] + self.forward[stage + 1] + self.after_forward[stage + 1]
            if stage % 2 == 0:
                after = max(after, self.lane[stage] + self.forward[stage + 2] + self.after_forward[stage + 2])
            self.after_forward[stage] = after

    def next_stages(self, stage: int) -> Iterator[tuple[int, float]]:
        """Where ``stage`` sends to in forward, and gets gradients from, with the time of the transfer."""
        if stage < self.last:
            yield stage + 1, self.edge[stage]
            if self.lane[stage] > 0:
                yield stage + 2, self.lane[stage]

    def sent(self, stage: int) -> float:
        """Time on the sending port for what ``stage`` sends forward; its gradients take as long to come."""
        return sum(time for _, time in self.next_stages(stage))

    def received(self, stage: int) -> float:
        """Time on the receiving port for what ``stage`` needs in forward; its gradients take as long to go."""
        return (self.edge[stage - 1] if stage else 0.0) + (self.lane[stage - 2] if stage >= 2 else 0.0)

    @property
    def whole(self) -> float:
        """A step of one micro-batch."""
        return self.forward[0] + self.after_forward[0]
