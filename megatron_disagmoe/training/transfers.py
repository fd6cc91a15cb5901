"""What this run moves between ranks: dispatch mode, wire format, channels, and the count of bytes in the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.training import get_args

from megatron_disagmoe import arguments, parallel_state
from megatron_disagmoe.runtime.lane import lane_grad_spec, lane_spec
from megatron_disagmoe.runtime.links import EdgeSpecs, channel_specs, node_channels
from megatron_disagmoe.schedules.actions import Edge
from megatron_disagmoe.transport import ChannelSpec, Transport
from megatron_disagmoe.transport.dispatch import Dispatcher, NodeExchange, TransportExchange, create_dispatcher
from megatron_disagmoe.transport.precision import create_wire_format
from megatron_disagmoe.transport.traffic import as_numbers, format_traffic, from_numbers


def channels(args: Any) -> list[ChannelSpec]:
    """Every channel of the world, in one order everywhere."""
    topology = arguments.topology(args, args.world_size)
    return channel_specs(topology, ffn_node_size=arguments.ffn_node_size(args, topology))


def dispatcher(args: Any, config: Any) -> Dispatcher:
    """The dispatch mode, for the largest micro-batch.

    Args:
        args: Megatron's.
        config: the model's ``TransformerConfig``.
    """
    micro_batch = max(args.micro_batch_size, args.eval_micro_batch_size or 0)
    router_dtype = {None: args.params_dtype, "fp32": torch.float32, "fp64": torch.float64}
    return create_dispatcher(
        args.af_dispatch,
        num_tokens=micro_batch * args.seq_length,
        hidden_size=config.hidden_size,
        num_experts=config.num_moe_experts,
        topk=config.moe_router_topk,
        num_attention_ranks=args.af_attention_ranks,
        num_ffn_ranks=args.af_ffn_ranks,
        dtype=args.params_dtype,
        probs_dtype=router_dtype[config.moe_router_dtype],
        ranks_per_node=arguments.ffn_node_size(args, parallel_state.state().topology),
    )


def edge_specs(args: Any, dispatcher: Dispatcher, *, shared: bool) -> EdgeSpecs:
    """What travels on each edge; ``shared``: there are shared experts."""
    sizes = dispatcher.sizes
    specs = {
        (Edge.M2N, False): dispatcher.m2n_spec(),
        (Edge.M2N, True): dispatcher.m2n_grad_spec(),
        (Edge.N2M, False): dispatcher.n2m_spec(),
        (Edge.N2M, True): dispatcher.n2m_grad_spec(),
        (Edge.AGAIN, False): dispatcher.m2n_spec(),
        (Edge.LANE, False): lane_spec(sizes, shared=shared),
        (Edge.LANE, True): lane_grad_spec(sizes, shared=shared),
    }
    return EdgeSpecs(specs, create_wire_format(args.af_wire_dtype))


def node_exchange(transport: Transport, dispatcher: Dispatcher) -> Callable[[int, int], NodeExchange | None]:
    """Gives the exchange among this rank's node for a stage and micro-batch; None where the mode needs none."""
    rank = dist.get_rank()
    node = node_channels(parallel_state.state().topology, rank, ffn_node_size=dispatcher.node_size)

    def exchange(stage: int, micro_batch: int) -> NodeExchange | None:
        if node is None:
            return None
        return TransportExchange(transport, node, rank=rank, layer=stage, micro_batch=micro_batch)

    return exchange


class TrafficLog:
    """Counts what training steps send (evaluation apart) and logs it every ``--log-interval`` steps.

    The line comes before Megatron's own of the same iteration, from the same rank, and gives means over the steps
    since the last one, summed over all ranks.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._begun: list[int] = []
        self._numbers: list[int] = []
        self._steps = 0

    def begin(self) -> None:
        """A training step begins."""
        self._begun = as_numbers(self._transport.traffic)

    def end(self, iteration: int) -> None:
        """It has ended as number ``iteration`` (from 1); collective over the world where the line is due."""
        sent = [now - before for now, before in zip(as_numbers(self._transport.traffic), self._begun, strict=True)]
        self._numbers = [a + b for a, b in zip(self._numbers, sent, strict=True)] if self._numbers else sent
        self._steps += 1
        args = get_args()
        if iteration % args.log_interval:
            return
        total = torch.tensor(self._numbers, dtype=torch.int64, device=torch.cuda.current_device())
        dist.all_reduce(total)
        if dist.get_rank() == dist.get_world_size() - 1:
            line = format_traffic(from_numbers(total.tolist()), steps=self._steps)
            how = f"dispatch {args.af_dispatch}, wire {args.af_wire_dtype}, sent per step"
            print(f" AF-pipe iteration {iteration} | {how} | {line}", flush=True)
        self._numbers, self._steps = [], 0
