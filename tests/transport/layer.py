"""The layer of ``local.py`` on real processes: M attention ranks, then N FFN ranks, joined by a transport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from megatron_disagmoe.transport import (
    ChannelSpec,
    Message,
    MessageSpec,
    RecvHandle,
    TransferKey,
    Transport,
    create_transport,
)
from megatron_disagmoe.transport.dispatch import (
    Dispatcher,
    NodeChannels,
    NodeExchange,
    TransportExchange,
    create_dispatcher,
)
from megatron_disagmoe.transport.torch_backend import TorchTransport
from tests.transport.local import Layer, Result, backward, experts, gradients, make_layer, run_backward

#: Back ends under test; ``torch-exact`` posts bodies when their sizes are known, as NCCL needs.
BACK_ENDS = [
    "torch",
    "torch-exact",
    pytest.param("nixl", marks=pytest.mark.skipif(find_spec("nixl") is None, reason="the package nixl is missing")),
]

NUM_EXPERTS, TOPK = 12, 3


def open_transport(name: str, channels: list[ChannelSpec], *, timeout_seconds: float = 30) -> Transport:
    cpu = torch.device("cpu")
    if name == "torch-exact":
        return TorchTransport(channels, device=cpu, timeout_seconds=timeout_seconds, exact=True)
    return create_transport(name, channels, device=cpu, timeout_seconds=timeout_seconds)


@dataclass(frozen=True)
class Case:
    """One layer to run: dispatch mode, M, N, precision, FFN ranks a node."""

    mode: str
    m: int
    n: int
    dtype: torch.dtype = torch.float32
    ranks_per_node: int = 2

    def dispatcher(self) -> Dispatcher:
        return create_dispatcher(
            self.mode,
            num_tokens=13,
            hidden_size=6,
            num_experts=NUM_EXPERTS,
            topk=TOPK,
            num_attention_ranks=self.m,
            num_ffn_ranks=self.n,
            dtype=self.dtype,
            probs_dtype=torch.float32,
            ranks_per_node=self.ranks_per_node,
        )

    def layer(self, micro_batch: int) -> Layer:
        return make_layer(
            num_attention_ranks=self.m, num_experts=NUM_EXPERTS, topk=TOPK, dtype=self.dtype, seed=micro_batch
        )

    def edges(self) -> dict[str, ChannelSpec]:
        attention, ffn = tuple(range(self.m)), tuple(range(self.m, self.m + self.n))
        ends = {"M2N": (attention, ffn), "N2M": (ffn, attention), "M2N.grad": (ffn, attention)}
        ends["N2M.grad"] = attention, ffn
        return {edge: ChannelSpec(f"{edge} {self}", *ranks) for edge, ranks in ends.items()}

    def nodes(self) -> list[NodeChannels]:
        """Of every node of FFN ranks; none where the mode exchanges nothing on a node."""
        size = self.dispatcher().node_size
        starts = range(self.m, self.m + self.n, size) if size > 1 else ()
        return [NodeChannels.among(range(s, s + size), name=f"{self} {s}") for s in starts]

    def __str__(self) -> str:
        return f"{self.mode} {self.m}x{self.n} {self.dtype}"


class Edges:
    """Sends to and receives from every rank of the other side."""

    def __init__(self, transport: Transport, case: Case, dispatcher: Dispatcher, *, peers: list[int]) -> None:
        self.transport, self.peers = transport, peers
        self.channels = case.edges()
        self.specs = {
            "M2N": dispatcher.m2n_spec(),
            "N2M": dispatcher.n2m_spec(),
            "M2N.grad": dispatcher.m2n_grad_spec(),
            "N2M.grad": dispatcher.n2m_grad_spec(),
        }

    @staticmethod
    def key(edge: str, micro_batch: int) -> TransferKey:
        name, _, gradient = edge.partition(".")
        return TransferKey(name, bool(gradient), 0, micro_batch)

    def post(self, edge: str, micro_batch: int) -> list[RecvHandle]:
        key = self.key(edge, micro_batch)
        return [self.transport.post_recv(self.channels[edge], key, peer, self.specs[edge]) for peer in self.peers]

    def send(self, edge: str, micro_batch: int, messages: list[Message]) -> None:
        key = self.key(edge, micro_batch)
        for peer, message in zip(self.peers, messages, strict=True):
            self.transport.send(self.channels[edge], key, peer, message, self.specs[edge])


def arrived(handles: list[RecvHandle], spec: MessageSpec) -> list[Message]:
    """Received messages with ``requires_grad`` where the spec says so."""
    messages = [handle.wait() for handle in handles]
    for message in messages:
        for tensor, section in zip(message.sections, spec.sections, strict=True):
            tensor.requires_grad_(section.differentiable)
    return messages


def run_rank(
    rank: int, name: str, cases: Sequence[Case], num_micro_batches: int
) -> tuple[list[list[Result]], dict[str, int]]:
    """Every case on as many ranks as it needs, the first: all micro-batches forward, then all backward.

    Results of an attention rank, and bytes sent.
    """
    channels = [*(channel for case in cases for channel in case.edges().values())]
    channels += [channel for case in cases for node in case.nodes() for channel in node.all]
    transport = open_transport(name, channels)
    results = [_run_case(rank, transport, case, num_micro_batches) for case in cases]
    transport.flush()
    sent = transport.bytes_sent
    transport.close()
    return results, sent


def _run_case(rank: int, transport: Transport, case: Case, num_micro_batches: int) -> list[Result]:
    dispatcher = case.dispatcher()
    layers = [case.layer(b) for b in range(num_micro_batches)]
    m, n = case.m, case.n
    if rank >= m + n:
        return []
    if rank < m:
        edges = Edges(transport, case, dispatcher, peers=list(range(m, m + n)))
        return _attention_side(rank, edges, dispatcher, layers)
    edges = Edges(transport, case, dispatcher, peers=list(range(m)))
    nodes = case.nodes()
    node = nodes[(rank - m) // dispatcher.node_size] if nodes else None
    exchanges = [
        TransportExchange(transport, node, rank=rank, layer=0, micro_batch=b) if node is not None else None
        for b in range(num_micro_batches)
    ]
    return _ffn_side(rank - m, edges, dispatcher, layers, exchanges)


def _attention_side(rank: int, edges: Edges, dispatcher: Dispatcher, layers: list[Any]) -> list[Result]:
    batches = range(len(layers))
    back = [edges.post("N2M", b) for b in batches]
    returned = [edges.post("M2N.grad", b) for b in batches]
    hidden = [layer.hidden[rank].clone().requires_grad_() for layer in layers]
    probs = [layer.probs[rank].clone().requires_grad_() for layer in layers]
    sent, states = [], []
    for b in batches:
        messages, state = dispatcher.dispatch(hidden[b], probs[b], layers[b].routing_map[rank])
        edges.send("M2N", b, messages)
        sent.append(messages)
        states.append(state)
    outputs = []
    for b in batches:
        received = arrived(back[b], edges.specs["N2M"])
        output = dispatcher.combine(received, states[b])
        output.backward(layers[b].upstream[rank])
        outputs.append(output.detach().clone())
        spec, grad_spec = edges.specs["N2M"], edges.specs["N2M.grad"]
        edges.send("N2M.grad", b, [gradients(message, spec, grad_spec) for message in received])
    results = []
    for b in batches:
        pairs = []
        for message, handle in zip(sent[b], returned[b], strict=True):
            pairs += backward(message, edges.specs["M2N"], handle.wait())
        run_backward(pairs)
        assert hidden[b].grad is not None
        assert probs[b].grad is not None
        # Clones: where N = 1 a gradient is the received one itself, and its buffer goes back.
        results.append(Result([outputs[b]], [hidden[b].grad.clone()], [probs[b].grad.clone()]))
        for handle in [*back[b], *returned[b]]:
            handle.release()
    return results


def _ffn_side(
    rank: int, edges: Edges, dispatcher: Dispatcher, layers: list[Any], exchanges: Sequence[NodeExchange | None]
) -> list[Result]:
    batches = range(len(layers))
    posted = [edges.post("M2N", b) for b in batches]
    returned = [edges.post("N2M.grad", b) for b in batches]
    given, sent = [], []
    for b in batches:
        messages = arrived(posted[b], edges.specs["M2N"])
        tokens, tokens_per_expert, probs, state = dispatcher.expert_input(messages, exchanges[b])
        scale = layers[b].scale.view(dispatcher.sizes.num_ffn_ranks, -1)[rank]
        output = dispatcher.expert_output(experts(tokens, tokens_per_expert, probs, scale), state)
        edges.send("N2M", b, output)
        given.append(messages)
        sent.append(output)
    for b in batches:
        pairs = []
        for message, handle in zip(sent[b], returned[b], strict=True):
            pairs += backward(message, edges.specs["N2M"], handle.wait())
        run_backward(pairs)
        spec, grad_spec = edges.specs["M2N"], edges.specs["M2N.grad"]
        edges.send("M2N.grad", b, [gradients(message, spec, grad_spec) for message in given[b]])
    edges.transport.flush()
    for handle in [handle for b in batches for handle in [*posted[b], *returned[b]]]:
        handle.release()
    return []
