"""One finding of an overflow for all parts and roles, before any loss scale moves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_disagmoe import cpu

cpu.install_if_needed()

from megatron.core.optimizer.optimizer import ChainedOptimizer  # noqa: E402

from megatron_disagmoe.training import optimizer  # noqa: E402


class Scaler:
    def __init__(self) -> None:
        self.updates: list[bool] = []

    def update(self, found_inf: bool) -> None:
        self.updates.append(found_inf)


class Part:
    """Megatron's way: check, let one's own scale follow, tell."""

    def __init__(self, finds: bool) -> None:
        self.config = SimpleNamespace()
        self.grad_scaler = Scaler()
        self.finds = finds

    def prepare_grads(self) -> bool:
        self.grad_scaler.update(self.finds)
        return self.finds


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the other ranks find; stands for the collective."""
    world: dict[str, Any] = {"finds": False, "reductions": 0}

    def all_reduce(tensor: torch.Tensor, op: Any) -> None:
        assert op == dist.ReduceOp.MAX
        world["reductions"] += 1
        tensor.clamp_(min=float(world["finds"]))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return world


@pytest.mark.parametrize(
    "parts, others, expected",
    [
        ((False, False), False, False),
        ((False, True), False, True),  # the dense part would not know
        ((True, False), False, True),  # nor the experts
        ((False, False), True, True),  # another role
        ((True,), True, True),
    ],
)
def test_all_scales_follow_everyones_finding(
    elsewhere: dict[str, Any], parts: tuple[bool, ...], others: bool, expected: bool
) -> None:
    chained = ChainedOptimizer([Part(finds) for finds in parts])
    elsewhere["finds"] = others
    optimizer.unify(chained)
    for step in range(1, 3):
        assert chained.prepare_grads() is expected
        assert elsewhere["reductions"] == step  # as many on every rank, however many parts it has
        for part in chained.chained_optimizers:
            assert part.grad_scaler.updates == [expected] * step


def test_an_optimizer_without_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="--optimizer Part is not supported with --af-pipe"):
        optimizer.unify(Part(False))
