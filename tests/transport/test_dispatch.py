"""Dispatch modes against a reference without ranks, bit for bit, and against Megatron's own functions."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_disagmoe.transport.dispatch import DISPATCH_MODES, Dispatcher, create_dispatcher
from tests.transport.local import assert_equal, make_layer, reference, run_layer

DTYPES = [torch.float32, torch.bfloat16]


def make(
    mode: str,
    *,
    m: int = 1,
    n: int = 1,
    experts: int = 12,
    topk: int = 2,
    dtype: torch.dtype = torch.float32,
    ranks_per_node: int | None = None,
) -> Dispatcher:
    return create_dispatcher(
        mode,
        num_tokens=13,
        hidden_size=6,
        num_experts=experts,
        topk=topk,
        num_attention_ranks=m,
        num_ffn_ranks=n,
        dtype=dtype,
        probs_dtype=torch.float32,
        ranks_per_node=ranks_per_node or (2 if n % 2 == 0 else n),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n", list(itertools.product([1, 2, 3, 4], repeat=2)))
@pytest.mark.parametrize("mode", DISPATCH_MODES)
def test_every_size(mode: str, m: int, n: int, dtype: torch.dtype) -> None:
    layer = make_layer(num_attention_ranks=m, num_experts=12, topk=2, dtype=dtype)
    assert_equal(run_layer(make(mode, m=m, n=n, dtype=dtype), layer), reference(layer), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", range(1, 9))
@pytest.mark.parametrize("mode", DISPATCH_MODES)
def test_every_topk(mode: str, topk: int, dtype: torch.dtype) -> None:
    layer = make_layer(num_attention_ranks=2, num_experts=12, topk=topk, dtype=dtype)
    assert_equal(run_layer(make(mode, m=2, n=3, topk=topk, dtype=dtype), layer), reference(layer), dtype)


@pytest.mark.parametrize("n, ranks_per_node", [(4, 1), (4, 4), (4, 8), (6, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_node_size(n: int, ranks_per_node: int, dtype: torch.dtype) -> None:
    layer = make_layer(num_attention_ranks=3, num_experts=12, topk=5, dtype=dtype, idle_experts=(4,))
    dispatcher = make("per-node", m=3, n=n, topk=5, dtype=dtype, ranks_per_node=ranks_per_node)
    assert_equal(run_layer(dispatcher, layer), reference(layer), dtype)


def test_rows_sent_per_mode() -> None:
    """One row per (token, expert), per (token, rank), per (token, node): counted from the routing map alone."""
    layer = make_layer(num_attention_ranks=1, num_experts=12, topk=6, dtype=torch.float32)
    routing_map = layer.routing_map[0]
    for n, ranks_per_node in [(1, 1), (4, 2), (6, 3)]:
        by_rank = routing_map.view(13, n, -1).any(dim=2)
        by_node = by_rank.view(13, -1, ranks_per_node).any(dim=2)
        for mode, chosen in zip(DISPATCH_MODES, (routing_map, by_rank, by_node), strict=True):
            dispatcher = make(mode, n=n, topk=6, ranks_per_node=ranks_per_node)
            sent, _ = dispatcher.dispatch(layer.hidden[0], layer.probs[0], routing_map)
            assert sum(message.sections[0].shape[0] for message in sent) == int(chosen.sum())


def test_a_node_spreads_its_entries() -> None:
    """Where every token needs every rank of a node, each rank is the entry of its share."""
    dispatcher = make("per-node", n=4, experts=12, topk=12, ranks_per_node=4)
    sent, _ = dispatcher.dispatch(torch.ones(13, 6), torch.ones(13, 12), torch.ones(13, 12, dtype=torch.bool))
    assert [message.sections[0].shape[0] for message in sent] == [4, 3, 3, 3]


def test_per_node_needs_whole_nodes_and_an_exchange() -> None:
    with pytest.raises(ValueError, match="4 FFN ranks do not fill nodes of 3; choose --af-ranks-per-node"):
        make("per-node", n=4, ranks_per_node=3)
    dispatcher = make("per-node", n=4, ranks_per_node=2)
    layer = make_layer(num_attention_ranks=1, num_experts=12, topk=2, dtype=torch.float32)
    sent, _ = dispatcher.dispatch(layer.hidden[0], layer.probs[0], layer.routing_map[0])
    with pytest.raises(ValueError, match="needs the exchange of a node of 2 FFN ranks"):
        dispatcher.expert_input([sent[0]])


@pytest.mark.parametrize(
    "idle",
    [pytest.param((3,), id="expert"), pytest.param((4, 5, 6, 7), id="rank"), pytest.param(tuple(range(11)), id="all")],
)
@pytest.mark.parametrize("mode", DISPATCH_MODES)
def test_idle_experts_and_ranks(mode: str, idle: tuple[int, ...]) -> None:
    layer = make_layer(num_attention_ranks=2, num_experts=12, topk=4, dtype=torch.float32, idle_experts=idle)
    dispatcher = make(mode, m=2, n=3, topk=4, dtype=torch.float32)
    assert_equal(run_layer(dispatcher, layer), reference(layer), torch.float32)


@pytest.mark.parametrize("mode", DISPATCH_MODES)
def test_tokens_that_go_nowhere(mode: str) -> None:
    layer = make_layer(num_attention_ranks=2, num_experts=4, topk=2, dtype=torch.float32)
    layer.routing_map[0][2:9] = False
    layer.routing_map[1][:] = False
    for n in (1, 2, 4):
        dispatcher = make(mode, m=2, n=n, experts=4, dtype=torch.float32)
        assert_equal(run_layer(dispatcher, layer), reference(layer), torch.float32)


def test_experts_see_the_same_rows_per_rank_as_per_expert() -> None:
    """Rows by local expert, then attention rank, then token: so weight gradients are the same too."""
    layer = make_layer(num_attention_ranks=3, num_experts=12, topk=5, dtype=torch.float32)
    for n in (1, 2, 4):
        seen = []
        for name in ("per-expert", "per-rank"):
            dispatcher = make(name, m=3, n=n, topk=5, dtype=torch.float32)
            sent = [dispatcher.dispatch(layer.hidden[m], layer.probs[m], layer.routing_map[m])[0] for m in range(3)]
            seen.append([dispatcher.expert_input([sent[m][r] for m in range(3)])[:3] for r in range(n)])
        for ours, theirs in zip(*seen, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mode", ["per-rank", "per-node"])
def test_half_precision_partial_sums_accumulate_in_fp32(mode: str) -> None:
    """256 + eight ones is 264; adding one by one in bf16 (8 bits of mantissa) stays at 256."""
    dispatcher = make(mode, experts=12, topk=9, dtype=torch.bfloat16)
    routing_map = torch.zeros(13, 12, dtype=torch.bool)
    routing_map[:, :9] = True
    hidden = torch.ones(13, 6, dtype=torch.bfloat16, requires_grad=True)
    sent, state = dispatcher.dispatch(hidden, torch.ones(13, 12), routing_map)
    arrived = [message._replace(sections=tuple(t.detach() for t in message.sections)) for message in sent]
    arrived[0].sections[0].requires_grad_()
    given = dispatcher.expert_input(arrived)
    value = torch.ones(9)
    value[0] = 256
    output = dispatcher.expert_output(given.tokens * value.repeat_interleave(13).unsqueeze(-1).bfloat16(), given.state)
    assert torch.equal(dispatcher.combine(output, state), torch.full((13, 6), 264.0, dtype=torch.bfloat16))
    output[0].sections[0].backward(torch.ones(13, 6, dtype=torch.bfloat16))
    grad = arrived[0].sections[0].grad
    assert grad is not None
    assert torch.equal(grad, torch.full((13, 6), 264.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_expert_is_megatron_bit_for_bit(dtype: torch.dtype) -> None:
    """Random numbers, where order matters: rows, sums and gradients equal ``permute`` and ``unpermute``."""
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    generator = torch.Generator().manual_seed(1)
    num_tokens, hidden_size, experts, topk, n = 13, 6, 8, 4, 2
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    chosen = torch.rand(num_tokens, experts, generator=generator).topk(topk).indices
    routing_map = torch.zeros(num_tokens, experts, dtype=torch.bool).scatter(1, chosen, True)
    probs = torch.rand(num_tokens, experts, generator=generator) * routing_map
    upstream = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)

    results = []
    for side in ("ours", "megatron"):
        x, p = hidden.clone().requires_grad_(), probs.clone().requires_grad_()
        if side == "ours":
            dispatcher = make("per-expert", n=n, experts=experts, topk=topk, dtype=dtype)
            sent, state = dispatcher.dispatch(x, p, routing_map)
            rows = [m.sections[0] * m.sections[1].to(dtype) for m in sent]
            output = dispatcher.combine([m._replace(sections=(r,)) for m, r in zip(sent, rows, strict=True)], state)
            permuted = torch.cat([m.sections[0] for m in sent])
        else:
            permuted, row_probs, order, _, _ = moe_utils.permute(x, routing_map, p, num_out_tokens=num_tokens * topk)
            output = moe_utils.unpermute(permuted * row_probs.unsqueeze(-1).to(dtype), order, x.shape)
        output.backward(upstream)
        results.append((permuted.detach(), output.detach(), x.grad, p.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_experts": 10}, "10 experts do not divide over 4 FFN ranks"),
        ({"topk": 13}, "top-13 of 12 experts"),
        ({"num_tokens": 0}, "num_tokens must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(wrong: dict[str, int], message: str) -> None:
    sizes = {
        "num_tokens": 8,
        "hidden_size": 4,
        "num_experts": 12,
        "topk": 2,
        "num_attention_ranks": 1,
        "num_ffn_ranks": 4,
    }
    with pytest.raises(ValueError, match=message):
        create_dispatcher("per-expert", **(sizes | wrong), dtype=torch.float32, probs_dtype=torch.float32)


def test_unknown_mode_and_too_many_tokens() -> None:
    with pytest.raises(ValueError, match="unknown dispatch mode 'per-galaxy'"):
        make("per-galaxy", dtype=torch.float32)
    with pytest.raises(ValueError, match="14 tokens in a micro-batch; buffers were sized for 13"):
        make("per-rank", dtype=torch.float32).dispatch(
            torch.zeros(14, 6), torch.zeros(14, 12), torch.zeros(14, 12, dtype=torch.bool)
        )
