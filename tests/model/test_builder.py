"""Small parts of the model's builder; that the halves it builds equal Megatron's model is what parity tests show."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_disagmoe import cpu

cpu.install_if_needed()

from megatron_disagmoe.model import builder  # noqa: E402
from megatron_disagmoe.parallel_state import AFParallelState  # noqa: E402
from megatron_disagmoe.schedules.actions import Placement  # noqa: E402
from megatron_disagmoe.topology import Topology  # noqa: E402


def states(*, attention_ranks: int, ffn_ranks: int, replicas: int) -> Iterator[AFParallelState]:
    """The state of every rank of a ring of two attention and two FFN groups."""
    placement = Placement.round_robin(num_layers=4, num_attention_groups=2, num_ffn_groups=2)
    topology = Topology(placement, attention_ranks, ffn_ranks, replicas)
    for rank in range(topology.world_size):
        yield AFParallelState(topology=topology, role=topology.role(rank), world_size=topology.world_size)


def sequential_experts() -> torch.nn.Module:
    """Named as Megatron's SequentialMLP names its parameters."""
    experts = torch.nn.Module()
    experts.local_experts = torch.nn.ModuleList(
        torch.nn.ModuleDict({"linear_fc1": torch.nn.Linear(2, 3, bias=False)}) for _ in range(2)
    )
    return experts


def grouped_experts() -> torch.nn.Module:
    """Named as Megatron's TEGroupedMLP names its parameters."""
    experts, linear = torch.nn.Module(), torch.nn.Module()
    for expert in range(2):
        linear.register_parameter(f"weight{expert}", torch.nn.Parameter(torch.zeros(3, 2)))
        linear.register_parameter(f"bias{expert}", torch.nn.Parameter(torch.zeros(3)))
    experts.linear_fc1 = linear
    return experts


def model_with(experts: torch.nn.Module, number: int = 5) -> Any:
    layer = SimpleNamespace(layer_number=number, mlp=SimpleNamespace(experts=experts, local_expert_indices=[6, 7]))
    return SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))


@pytest.mark.parametrize(
    "experts, names",
    [
        (sequential_experts(), {"linear_fc1.weight"}),
        (grouped_experts(), {"linear_fc1.weight", "linear_fc1.bias"}),
    ],
)
def test_weights_move_by_global_expert(experts: torch.nn.Module, names: set[str]) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(experts.parameters()):
            parameter.fill_(number)
    before = [parameter.detach().clone() for parameter in experts.parameters()]
    model = model_with(experts)
    weights: builder.ExpertWeights = {}
    builder._collect(model, weights, wanted=range(6, 8))
    assert set(weights) == {(5, expert, name) for expert in (6, 7) for name in names}
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.zero_()
    builder._fill(model, weights, first_expert=6)
    assert all(torch.equal(a, b) for a, b in zip(before, experts.parameters(), strict=True))
    assert not weights


def test_only_experts_that_are_wanted_are_kept() -> None:
    weights: builder.ExpertWeights = {}
    builder._collect(model_with(sequential_experts()), weights, wanted=range(7, 9))
    assert {expert for _, expert, _ in weights} == {7}


def test_a_weight_of_no_single_expert_is_refused() -> None:
    experts = torch.nn.Module()
    experts.register_parameter("mixed", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="a parameter 'mixed' that belongs to no single expert.*--af-init local"):
        builder._collect(model_with(experts), {}, wanted=range(8))


def test_local_draws_differ_where_weights_do_and_only_there() -> None:
    salts: dict[tuple[Any, ...], set[int]] = {}
    for state in states(attention_ranks=2, ffn_ranks=3, replicas=2):
        holds = (state.role.group,) if state.is_attention else (state.role.group, state.role.index)
        salts.setdefault(holds, set()).add(builder._salt(state))
    assert all(len(found) == 1 for found in salts.values())  # data-parallel ranks draw the same
    assert len({next(iter(found)) for found in salts.values()}) == len(salts) == 2 + 2 * 3


def test_each_role_sees_the_config_that_is_true_of_it() -> None:
    vanilla: Any = SimpleNamespace(expert_model_parallel_size=4, moe_router_enable_expert_bias=True)
    for state in states(attention_ranks=1, ffn_ranks=2, replicas=1):
        own = builder.role_config(vanilla, state)
        assert own.expert_model_parallel_size == (1 if state.is_attention else 2)
        assert own.moe_router_enable_expert_bias is state.is_attention  # FFN ranks hold no router to update
    assert vanilla.expert_model_parallel_size == 4
