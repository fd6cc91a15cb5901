"""Layers and jobs for tests: times that one can add up by hand."""

from __future__ import annotations

from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.reproduction.systems.layer import Costs, Job, Layer, Parts


def job() -> Job:
    """DeepSeek-MoE at 4K on the shipped cluster, EP = 16."""
    return Job(load_model("deepseek-moe-16b"), load_cluster("h800-16x8"), 4096, 1, 16)


def layer(attention: float = 1.0, transfer: float = 2.0, ffn: float = 1.0) -> Layer:
    """Backward twice as long as forward in compute; a third of it weight gradients' share is half."""
    return Layer(
        forward=Parts(attention, transfer, ffn, transfer),
        backward=Parts(2 * attention, transfer, 2 * ffn, transfer),
        again=Parts(0.0, 0.0, 0.0, 0.0),
        attention_weight=attention,
        ffn_weight=ffn,
        kept=1.0,
    )


def costs(layers: int, *, hop: float = 0.0, tail: float = 0.0, **times: float) -> Costs:
    """``layers`` layers alike."""
    return Costs(
        job=job(),
        layers=(layer(**times),) * layers,
        tail_forward=tail,
        tail_backward=2 * tail,
        hop=hop,
        workspace=0.0,
        tail_workspace=0.0,
        transport=0.0,
    )
