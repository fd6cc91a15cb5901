"""A whole MoE layer over a dispatcher in one process, cut at the edges as the executor cuts it.

Every number is a small integer, so that fp32 and bf16 sums are exact in any order and results can be compared
bit for bit with a plain reference that knows nothing of ranks.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from megatron_disagmoe.transport.base import ChannelSpec, Message, MessageSpec, TransferKey, check_message
from megatron_disagmoe.transport.dispatch import Dispatcher, NodeExchange

_CHANNEL = ChannelSpec("local", (0,), (0,))
_KEY = TransferKey("M2N", False, 0, 0)


@dataclass
class Layer:
    """Inputs of one layer on M attention ranks, all integers: ``hidden[m]`` ``[T, h]``, ``probs[m]`` and
    ``routing_map[m]`` ``[T, E]``, ``scale`` ``[E]`` (expert e multiplies by it), ``upstream[m]`` ``[T, h]``."""

    hidden: list[torch.Tensor]
    probs: list[torch.Tensor]
    routing_map: list[torch.Tensor]
    scale: torch.Tensor
    upstream: list[torch.Tensor]


@dataclass
class Result:
    """What a layer computed, per attention rank: output and the gradients of hidden states and probabilities."""

    output: list[torch.Tensor]
    hidden_grad: list[torch.Tensor]
    probs_grad: list[torch.Tensor]


def make_layer(
    *,
    num_attention_ranks: int,
    num_experts: int,
    topk: int,
    dtype: torch.dtype,
    num_tokens: int = 13,
    hidden_size: int = 6,
    idle_experts: tuple[int, ...] = (),
    seed: int = 0,
) -> Layer:
    """A layer whose tokens choose ``topk`` distinct experts, never one of ``idle_experts``."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    layer = Layer([], [], [], integers(1, 3, num_experts).float(), [])
    alive = torch.tensor([e not in idle_experts for e in range(num_experts)])
    for _ in range(num_attention_ranks):
        # Squared weights make some experts popular, so counts are uneven.
        score = torch.rand(num_tokens, num_experts, generator=generator) * torch.linspace(1, 3, num_experts) ** 2
        chosen = score.masked_fill(~alive, -1).topk(min(topk, int(alive.sum())), dim=1).indices
        routing_map = torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter(1, chosen, True)
        layer.routing_map.append(routing_map)
        layer.hidden.append(integers(-2, 2, num_tokens, hidden_size).to(dtype))
        layer.probs.append(integers(1, 2, num_tokens, num_experts).float() * routing_map)
        layer.upstream.append(integers(-1, 1, num_tokens, hidden_size).to(dtype))
    return layer


def reference(layer: Layer) -> Result:
    """The same layer without ranks, rows or messages, in fp64: ``sum_e p_e scale_e x``."""
    result = Result([], [], [])
    for hidden, probs, routing_map, upstream in zip(
        layer.hidden, layer.probs, layer.routing_map, layer.upstream, strict=True
    ):
        x = hidden.double().requires_grad_()
        p = probs.double().requires_grad_()
        output = (p * routing_map * layer.scale.double()).sum(dim=1, keepdim=True) * x
        output.backward(upstream.double())
        assert x.grad is not None
        assert p.grad is not None
        result.output.append(output.detach())
        result.hidden_grad.append(x.grad)
        result.probs_grad.append(p.grad)
    return result


def cut(messages: list[Message], spec: MessageSpec) -> list[Message]:
    """What arrives: checked against the spec, without history, differentiable where the spec says so."""
    arrived = []
    for message in messages:
        check_message(_CHANNEL, _KEY, message, spec)
        sections = [tensor.detach().clone() for tensor in message.sections]
        for tensor, section in zip(sections, spec.sections, strict=True):
            tensor.requires_grad_(section.differentiable)
        arrived.append(Message(message.header.clone(), tuple(sections)))
    return arrived


def gradients(message: Message, spec: MessageSpec, grad_spec: MessageSpec) -> Message:
    """The gradient message of an arrived message."""
    sections = []
    for tensor, section in zip(message.sections, spec.sections, strict=True):
        if section.differentiable:
            sections.append(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
    sent = Message(torch.empty(0, dtype=torch.int64), tuple(sections))
    check_message(_CHANNEL, _KEY, sent, grad_spec)
    return sent


def backward(sent: Message, spec: MessageSpec, gradient: Message) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs for ``torch.autograd.backward`` on the sender's side."""
    differentiable = [t for t, section in zip(sent.sections, spec.sections, strict=True) if section.differentiable]
    return [(t, g) for t, g in zip(differentiable, gradient.sections, strict=True) if t.requires_grad]


def run_backward(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """One autograd call for all of a stage's outputs."""
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def experts(
    tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Expert e multiplies by ``scale[e]`` and by the probability, as Megatron's experts apply it."""
    assert int(tokens_per_expert.sum()) == tokens.shape[0] == probs.shape[0]
    return tokens * (scale.repeat_interleave(tokens_per_expert) * probs).unsqueeze(-1).to(tokens.dtype)


class ThreadExchange(NodeExchange):
    """Ranks of a node as threads of one process; ``boxes[a][b]`` is the queue from rank a to rank b."""

    def __init__(self, boxes: list[list[queue.SimpleQueue[list[Message]]]], *, index: int) -> None:
        super().__init__(index=index, size=len(boxes))
        self.boxes = boxes

    def move(self, step: str, messages: list[Message], spec: MessageSpec, *, gradient: bool) -> list[Message]:
        peers = [q for q in range(self.size) if q != self.index]
        for peer, message in zip(peers, messages, strict=True):
            check_message(_CHANNEL, TransferKey(step, gradient, 0, 0), message, spec)
            sections = tuple(tensor.detach().clone() for tensor in message.sections)
            self.boxes[self.index][peer].put([Message(message.header.clone(), sections)])
        return [self.boxes[peer][self.index].get(timeout=20)[0] for peer in peers]


def thread_exchanges(dispatcher: Dispatcher) -> list[NodeExchange]:
    """One per FFN rank."""
    size = dispatcher.node_size
    exchanges: list[NodeExchange] = []
    for _ in range(dispatcher.sizes.num_ffn_ranks // size):
        boxes = [[queue.SimpleQueue[list[Message]]() for _ in range(size)] for _ in range(size)]
        exchanges += [ThreadExchange(boxes, index=index) for index in range(size)]
    return exchanges


def on_every_rank[T](dispatcher: Dispatcher, function: Callable[[int], T]) -> list[T]:
    """``function(n)`` of every FFN rank: in turn, or in threads where ranks exchange."""
    ranks = range(dispatcher.sizes.num_ffn_ranks)
    if dispatcher.node_size == 1:
        return [function(n) for n in ranks]
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(function, ranks, timeout=30))


def run_layer(dispatcher: Dispatcher, layer: Layer) -> Result:
    """Forward and backward of ``layer`` over all ranks of ``dispatcher``."""
    sizes = dispatcher.sizes
    m_ranks, n_ranks = range(sizes.num_attention_ranks), range(sizes.num_ffn_ranks)
    hidden = [t.clone().requires_grad_() for t in layer.hidden]
    probs = [t.clone().requires_grad_() for t in layer.probs]
    sent, states = zip(*(dispatcher.dispatch(hidden[m], probs[m], layer.routing_map[m]) for m in m_ranks), strict=True)
    arrived = [cut([sent[m][n] for m in m_ranks], dispatcher.m2n_spec()) for n in n_ranks]
    exchanges = thread_exchanges(dispatcher)

    def forward(n: int) -> list[Message]:
        given = dispatcher.expert_input(arrived[n], exchanges[n])
        scale = layer.scale.view(sizes.num_ffn_ranks, -1)[n]
        output = experts(given.tokens, given.tokens_per_expert, given.probs, scale)
        return dispatcher.expert_output(output, given.state)

    returned = on_every_rank(dispatcher, forward)
    back = [cut([returned[n][m] for n in n_ranks], dispatcher.n2m_spec()) for m in m_ranks]
    combined = [dispatcher.combine(back[m], states[m]) for m in m_ranks]
    for m in m_ranks:
        combined[m].backward(layer.upstream[m])
    n2m, m2n = dispatcher.n2m_spec(), dispatcher.m2n_spec()

    def experts_backward(n: int) -> None:
        pairs = []
        for m in m_ranks:
            pairs += backward(returned[n][m], n2m, gradients(back[m][n], n2m, dispatcher.n2m_grad_spec()))
        run_backward(pairs)

    on_every_rank(dispatcher, experts_backward)
    for m in m_ranks:
        pairs = []
        for n in n_ranks:
            pairs += backward(sent[m][n], m2n, gradients(arrived[n][m], m2n, dispatcher.m2n_grad_spec()))
        run_backward(pairs)
    return Result([t.detach() for t in combined], [_grad(t) for t in hidden], [_grad(t) for t in probs])


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def assert_equal(ours: Result, exact: Result, dtype: torch.dtype) -> None:
    """Bit for bit."""
    for m in range(len(exact.output)):
        assert torch.equal(ours.output[m], exact.output[m].to(dtype))
        assert torch.equal(ours.hidden_grad[m], exact.hidden_grad[m].to(dtype))
        assert torch.equal(ours.probs_grad[m], exact.probs_grad[m].float())
