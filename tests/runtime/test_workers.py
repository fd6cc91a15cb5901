"""What workers do with autograd, on a toy model: the gradients of the model in one piece, and memory freed in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_disagmoe import builders
from megatron_disagmoe.runtime.activations import Received
from megatron_disagmoe.runtime.executor import Emit, Worker
from megatron_disagmoe.runtime.weight_gradients import split
from megatron_disagmoe.runtime.workers import AttentionWorker, ExpertWorker
from megatron_disagmoe.schedules.actions import Action, Placement, Schedule, Side
from megatron_disagmoe.schedules.dataflow import redispatched
from megatron_disagmoe.schedules.verifier import ensure_safe
from megatron_disagmoe.topology import Role
from tests.runtime.pipe import Pipe
from tests.runtime.redispatch import redispatching
from tests.runtime.toy_model import ToyAttention, ToyExperts, Weights, in_one_piece

LAYERS, MICRO_BATCHES = 4, 6


def _no_loss_function(output: torch.Tensor) -> torch.Tensor:
    return output


@dataclass
class _Batch:
    micro_batch: int
    loss_func: Callable[..., Any] = _no_loss_function


class _Watched:
    """A worker around another, which looks before every action whether only live activations hold memory."""

    def __init__(self, worker: AttentionWorker | ExpertWorker, stages: ToyAttention | ToyExperts) -> None:
        self.worker, self.stages = worker, stages
        self.activations = worker.activations
        self.looks = 0

    def run(self, action: Action, received: Received, emit: Emit) -> None:
        live = {key for key in self._keys() if key in self.activations._live}
        assert self.stages.watch.in_use() <= live, f"before {action} memory of dead activations is in use"
        self.looks += len(live)
        if isinstance(self.stages, ToyExperts):
            self.stages.micro_batch = action.micro_batch
        with torch.no_grad() if self.worker.forward_only else torch.enable_grad():  # a rank is a thread here
            self.worker.run(action, received, emit)

    def _keys(self) -> set[tuple[int, int]]:
        return set(self.activations._live)


def _run(schedule: Schedule) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor], dict[Role, _Watched]]:
    """Gradients, losses by micro-batch, and the workers."""
    report = ensure_safe(schedule)
    again = redispatched(report.schedule)
    weights: dict[Role, Weights] = {}
    losses: dict[int, torch.Tensor] = {}

    def loss(micro_batch: int, output: torch.Tensor, loss_func: Callable[..., Any]) -> torch.Tensor:
        losses[micro_batch] = output.sum()
        return losses[micro_batch]

    def worker(role: Role) -> Worker:
        mine = weights[role] = Weights(LAYERS)
        if role.group.side is Side.F:
            experts = ToyExperts(mine)
            return _Watched(ExpertWorker(experts, forward_only=schedule.forward_only, again=again), experts)  # type: ignore[arg-type]
        attention = ToyAttention(mine)
        return _Watched(
            AttentionWorker(
                attention,  # type: ignore[arg-type]
                LAYERS,
                batch=_Batch,  # type: ignore[arg-type]
                loss=loss,
                forward_only=schedule.forward_only,
                again=again,
            ),
            attention,
        )

    with split(True):
        workers = Pipe(report.schedule, worker).run()
    for role, steps in workers.items():
        assert steps[0].activations.high_water == report.peak_live[role.group]
    found: dict[str, torch.Tensor] = {}
    for mine in weights.values():
        assert not found.keys() & mine.gradients().keys(), "a weight has a gradient on two ranks"
        found |= mine.gradients()
    watched = {role: steps[0] for role, steps in workers.items()}
    return found, losses, watched  # type: ignore[return-value]


def _build(kind: str, p_attention: int, p_ffn: int, *, forward_only: bool = False) -> Schedule:
    placement = Placement.round_robin(
        num_layers=LAYERS, num_attention_groups=p_attention, num_ffn_groups=p_ffn
    )
    costs = builders.NOMINAL_COSTS
    return builders.build(
        kind, placement, num_micro_batches=MICRO_BATCHES, costs=costs, forward_only=forward_only
    )


@pytest.mark.parametrize("again", [0, 1, 2], ids=["once", "all again", "some again"])
@pytest.mark.parametrize("groups", [(1, 1), (2, 2), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("kind", builders.KINDS)
def test_gradients_are_those_of_the_model_in_one_piece(kind: str, groups: tuple[int, int], again: int) -> None:
    whole = Weights(LAYERS)
    expected_losses = in_one_piece(whole, MICRO_BATCHES)
    schedule = _build(kind, *groups)
    gradients, losses, workers = _run(redispatching(schedule, every=again) if again else schedule)
    assert [losses[m].detach() for m in range(MICRO_BATCHES)] == expected_losses
    assert gradients.keys() == whole.gradients().keys()
    for name, gradient in whole.gradients().items():
        assert torch.equal(gradients[name], gradient), name
    assert all(worker.looks for role, worker in workers.items() if role.group.side is Side.A)


def test_a_forward_only_step_keeps_nothing() -> None:
    gradients, losses, workers = _run(_build("interleaved-1f1b", 1, 2, forward_only=True))
    assert gradients == {}
    assert [losses[m] for m in range(MICRO_BATCHES)] == in_one_piece(Weights(LAYERS), MICRO_BATCHES)
    for worker in workers.values():
        assert worker.activations.high_water == 1
        assert worker.stages.watch.in_use() == set()


def test_memory_is_in_use_while_an_activation_lives() -> None:
    """The other direction of what ``_Watched`` looks for, so that it cannot pass by watching nothing."""
    seen: set[tuple[int, int]] = set()
    schedule = ensure_safe(_build("split-backward", 1, 1)).schedule
    experts = ToyExperts(Weights(LAYERS))

    class Looking(_Watched):
        def run(self, action: Action, received: Received, emit: Emit) -> None:
            assert self.stages.watch.in_use() == self._keys()
            seen.update(self._keys())
            super().run(action, received, emit)

    def worker(role: Role) -> Worker:
        if role.group.side is Side.F:
            return Looking(ExpertWorker(experts, forward_only=False), experts)  # type: ignore[arg-type]
        attention = ToyAttention(Weights(LAYERS))
        options: dict[str, Any] = {"batch": _Batch, "loss": lambda micro_batch, output, _: output.sum()}
        return _Watched(AttentionWorker(attention, LAYERS, forward_only=False, **options), attention)  # type: ignore[arg-type]

    with split(True):
        Pipe(schedule, worker).run()
    assert len(seen) == LAYERS * MICRO_BATCHES
