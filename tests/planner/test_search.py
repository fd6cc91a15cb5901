"""The search against an exhaustive one in plain Python, on random small problems."""

from __future__ import annotations

import math
import random

import pytest

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import DISPATCH_MODES, SCHEDULE_KINDS, Job
from megatron_disagmoe.planner.cluster_spec import Cluster, Network, Pool
from megatron_disagmoe.planner.files import find_config, read_mapping
from megatron_disagmoe.planner.model_spec import GroupedQueryAttention, MixtureOfExperts, ModelSpec
from megatron_disagmoe.planner.problem import Problem
from megatron_disagmoe.planner.search import search
from megatron_disagmoe.planner.space import FFN_LEVERS, LAYOUTS, Space
from megatron_disagmoe.planner.states import state_level
from tests.planner.oracle import Oracle

INSTANCES = 200


def random_problem(rng: random.Random) -> Problem:
    """A few layers, a few GPUs, some of the choices; memory from ample to too little."""
    layers, hidden = rng.randint(2, 5), rng.choice([512, 2048])
    experts = rng.choice([2, 4, 6])
    model = ModelSpec(
        name="random",
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=rng.choice([1000, 64000]),
        tied_embeddings=rng.random() < 0.3,
        dense_layers=(0,) if rng.random() < 0.3 else (),
        dense_ffn_hidden_size=4 * hidden,
        attention=GroupedQueryAttention(
            num_heads=8,
            num_query_groups=rng.choice([1, 2, 8]),
            head_dim=64,
            sliding_windows=rng.choice([(0,), (64, 0)]),
        ),
        moe=MixtureOfExperts(
            num_experts=experts,
            top_k=rng.randint(1, 2),
            ffn_hidden_size=rng.choice([256, 4096]),
            shared_ffn_hidden_size=rng.choice([0, 512]),
        ),
    )
    nodes, gpus = rng.choice([(1, 4), (2, 2), (2, 4), (4, 2), (3, 2), (1, 6)])
    gpu = read_mapping(find_config("gpus", "h800-sxm"))
    state = state_level("bf16", rng.choice([18, 12]))
    # Between a little less than the parameters take and many times that.
    share = model.num_parameters * state.total / (nodes * gpus)
    memory = share / 1e9 * rng.uniform(1, 8)
    pool = Pool.model_validate(
        {
            "name": "p",
            "num_nodes": nodes,
            "gpus_per_node": gpus,
            "gpu": gpu | {"memory_gb": memory, "reserved_memory_gb": 0},
            "nvlink_gb_per_s": rng.choice([50, 200]),
            "nvlink_efficiency": 0.8,
            "nics_gbit_per_s": rng.choice([[100], [100, 100], [200, 50], [400, 400, 100]]),
        }
    )
    network = Network(
        efficiency=0.9,
        latency_us=10,
        local_latency_us=5,
        rail_optimised=rng.random() < 0.5,
        cross_rail_forwarding=rng.random() < 0.7,
        nodes_per_leaf=rng.choice([0, 1, 2]),
        oversubscription=rng.choice([1.0, 3.0]),
        shared_nics=rng.random() < 0.7,
    )
    return Problem(
        model=model,
        cluster=Cluster(name="c", pools=(pool,), network=network, storage_gb_per_s=1),
        job=Job(rng.choice([256, 1024]), rng.choice([4, 6, 8]), imbalance=rng.choice([1.0, 1.4])),
        space=Space(
            tensor_parallel=rng.choice([(1,), (1, 2)]),
            context_parallel=rng.choice([(1,), (1,), (1, 2)]),
            expert_tensor_parallel=rng.choice([(1,), (1,), (1, 2)]),
            recompute_attention=tuple(rng.sample(list(Recompute), 2)),
            ffn_levers=tuple(rng.sample(FFN_LEVERS, 2)),
            dispatch=tuple(rng.sample(DISPATCH_MODES, rng.randint(1, 2))),
            layouts=tuple(rng.sample(LAYOUTS, 2)),
            schedules=tuple(rng.sample(SCHEDULE_KINDS, rng.randint(1, 2))),
            asymmetric=rng.random() < 0.5,
            whole_nodes=rng.random() < 0.2,
            distributed_optimizer=rng.random() < 0.7,
        ),
        state=state,
    )


def test_the_search_finds_what_exhaustive_search_finds() -> None:
    rng = random.Random(20260510)
    feasible = allocations = 0
    for number in range(INSTANCES):
        problem = random_problem(rng)
        best, whose, count = Oracle(problem).best()
        allocations += count
        found = search(problem, keep=1)
        seconds = float(found.seconds[0]) if len(found.seconds) else math.inf
        assert seconds == pytest.approx(best, rel=1e-9), f"instance {number}: {whose}"
        feasible += math.isfinite(best)
    print(f"{feasible} of {INSTANCES} problems feasible, {allocations} allocations in all")
    assert 0.6 * INSTANCES < feasible < INSTANCES  # both happen
