"""Transports between real processes: results, order, checks."""

from __future__ import annotations

import os
import random

import pytest
import torch

from megatron_disagmoe.transport import ChannelSpec, Message, MessageSpec, Section, TransferKey, create_transport
from megatron_disagmoe.transport.dispatch import DISPATCH_MODES
from tests.transport.layer import BACK_ENDS, Case, open_transport, run_rank
from tests.transport.local import Result, assert_equal, reference
from tests.transport.ranks import no_shared_memory_left, run_ranks, values

THERE = ChannelSpec("M2N A0->F0 r0", (0,), (1,))
BACK = ChannelSpec("N2M F0->A0 r0", (1,), (0,))
SPEC = MessageSpec(
    header_length=2,
    sections=(
        Section(torch.bfloat16, 64, 512, hidden=True),
        Section(torch.float32, 1, 2048),
        Section(torch.int32, 1, 2048, differentiable=False),
    ),
)


def key(number: int) -> TransferKey:
    return TransferKey("M2N", False, number % 4, number // 4)


def make_message(number: int, generator: random.Random) -> Message:
    """Sizes from ``generator``, contents from ``number``; one in five has no rows at all."""
    rows = 0 if generator.random() < 0.2 else generator.randint(0, 512)
    pairs = generator.randint(rows, 2048) if rows else 0
    tokens = torch.full((rows, 64), float(number % 97), dtype=torch.bfloat16)
    return Message(
        torch.tensor([number, pairs]),
        (tokens, torch.full((pairs, 1), number * 0.5), torch.full((pairs, 1), number, dtype=torch.int32)),
    )


def same(ours: Message, theirs: Message) -> bool:
    return all(torch.equal(a, b) for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True))


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_layer_equals_the_reference(name: str) -> None:
    batches, cases = range(3), []
    for m, n in ((1, 1), (2, 3), (3, 1), (1, 4), (2, 2)):
        dtypes = (torch.float32, torch.bfloat16) if m == n else (torch.float32,)
        node_size = 2 if n % 2 == 0 else n
        cases += [Case(mode, m, n, dtype, node_size) for mode in DISPATCH_MODES for dtype in dtypes]
    outcomes = values(run_ranks(5, run_rank, name, cases, len(batches)))
    for number, case in enumerate(cases):
        routed = []
        for b in batches:
            layer = case.layer(b)
            exact = reference(layer)
            for rank in range(case.m):
                one = Result([exact.output[rank]], [exact.hidden_grad[rank]], [exact.probs_grad[rank]])
                assert_equal(outcomes[rank][0][number][b], one, case.dtype)
                routed.append(layer.routing_map[rank].view(13, case.n, -1).sum(dim=2))
        per_rank = torch.cat(routed)  # [tokens, N], experts of each token on each FFN rank
        pairs = int(per_rank.sum())
        rows = {
            "per-expert": pairs,
            "per-rank": int((per_rank > 0).sum()),
            "per-node": int((per_rank.view(len(per_rank), -1, case.ranks_per_node).sum(dim=2) > 0).sum()),
        }[case.mode]
        sent = sum(outcomes[rank][1][case.edges()["M2N"].name] for rank in range(case.m))
        # A pair has a probability beside the rows and, where rows are shared, the number of its row.
        assert sent == rows * 6 * case.dtype.itemsize + pairs * (4 if case.mode == "per-expert" else 8)


def _exchange(rank: int, name: str, count: int, ahead: int) -> int:
    """Both ranks send ``count`` messages with ``ahead`` receives posted; waits come in pairs the wrong way round."""
    transport = open_transport(name, [THERE, BACK])
    out, into, peer = (THERE, BACK, 1) if rank == 0 else (BACK, THERE, 0)
    sizes, expected = random.Random(rank), random.Random(peer)
    handles = [transport.post_recv(into, key(i), peer, SPEC) for i in range(min(ahead, count))]
    for i in range(0, count, 2):
        for j in (i, i + 1):
            transport.send(out, key(j), peer, make_message(j, sizes), SPEC)
            if j + ahead < count:
                handles.append(transport.post_recv(into, key(j + ahead), peer, SPEC))
        first, second = make_message(i, expected), make_message(i + 1, expected)
        assert same(handles[i + 1].wait(), second)
        assert same(handles[i].wait(), first)
        assert handles[i].wait() is handles[i].wait()
        handles[i].release()
        handles[i + 1].release()
    transport.flush()
    traffic = transport.traffic[out.name]
    transport.close()
    assert traffic.messages == count
    assert traffic.hidden == traffic.hidden_rows * 128
    return traffic.payload


@pytest.mark.parametrize("ahead", [2, 7])
@pytest.mark.parametrize("name", BACK_ENDS)
def test_random_sizes_arrive_intact_in_order(name: str, ahead: int) -> None:
    sent = values(run_ranks(2, _exchange, name, 60, ahead))
    for rank in range(2):
        sizes = random.Random(rank)
        messages = [make_message(i, sizes) for i in range(60)]
        assert sent[rank] == sum(t.nbytes for message in messages for t in message.sections)


def _send_first(rank: int, name: str) -> None:
    """The sender is far ahead of the receiver: nothing blocks, nothing is lost."""
    transport = open_transport(name, [THERE, BACK])
    sizes = random.Random(5)
    if rank == 0:
        go = transport.post_recv(BACK, key(0), 1, MessageSpec(1, ()))
        for i in range(30):
            transport.send(THERE, key(i), 1, make_message(i, sizes), SPEC)
        transport.send(THERE, key(30), 1, make_message(30, sizes), SPEC)
        go.wait()
        transport.flush()
    else:
        transport.send(BACK, key(0), 0, Message(torch.tensor([7]), ()), MessageSpec(1, ()))
        transport.flush()
        for i in range(31):
            handle = transport.post_recv(THERE, key(i), 0, SPEC)
            assert same(handle.wait(), make_message(i, sizes))
            handle.release()
    transport.close()


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_sender_may_run_ahead(name: str) -> None:
    values(run_ranks(2, _send_first, name))


def _resident_kib() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def _soak(rank: int, name: str, count: int) -> tuple[int, int]:
    transport = open_transport(name, [THERE, BACK])
    out, into, peer = (THERE, BACK, 1) if rank == 0 else (BACK, THERE, 0)
    sizes, expected = random.Random(rank), random.Random(peer)
    handles = [transport.post_recv(into, key(i), peer, SPEC) for i in range(4)]
    warm = 0
    for i in range(count):
        transport.send(out, key(i), peer, make_message(i, sizes), SPEC)
        if i + 4 < count:
            handles.append(transport.post_recv(into, key(i + 4), peer, SPEC))
        handle = handles.pop(0)
        # Some buffers are given back, others go back by themselves.
        message, wanted = handle.wait() if i % 3 else handle.take(), make_message(i, expected)
        assert same(message, wanted)
        handle.release()
        if i % 50 == 49:
            transport.flush()
        if i == count // 4:
            warm = _resident_kib()
    end = _resident_kib()
    transport.close()
    return warm, end


@pytest.mark.parametrize("name", BACK_ENDS)
def test_soak_loses_and_leaks_nothing(name: str) -> None:
    with no_shared_memory_left():
        outcomes = values(run_ranks(2, _soak, name, 2000))
    for warm, end in outcomes:
        assert end <= warm * 1.05, f"resident memory grew from {warm} to {end} KiB"


def _misuse(rank: int, name: str) -> list[str]:
    """Errors that are raised before anything is sent."""
    transport = open_transport(name, [THERE, BACK])
    errors = []
    if rank == 0:
        good = make_message(3, random.Random(1))
        bad = [
            (good._replace(header=torch.zeros(3, dtype=torch.int64)), SPEC),
            (good._replace(sections=good.sections[:2]), SPEC),
            (good._replace(sections=(good.sections[0].float(), *good.sections[1:])), SPEC),
            (good._replace(sections=(torch.zeros(513, 64, dtype=torch.bfloat16), *good.sections[1:])), SPEC),
        ]
        for message, spec in bad:
            with pytest.raises(ValueError, match=r"M2N A0->F0 r0: cannot send M2N of layer 1, micro-batch 0") as info:
                transport.send(THERE, key(1), 1, message, spec)
            errors.append(str(info.value))
        transport.send(THERE, key(0), 1, good, SPEC)
        with pytest.raises(ValueError, match="needs a channel of its own"):
            transport.send(THERE, key(1), 1, Message(torch.zeros(0, dtype=torch.int64), ()), MessageSpec(0, ()))
    else:
        handle = transport.post_recv(THERE, key(0), 0, SPEC)
        handle.wait()
        with pytest.raises(ValueError, match="needs a channel of its own"):
            transport.post_recv(THERE, key(1), 0, MessageSpec(0, ()))
    transport.flush()
    transport.close()
    return errors


@pytest.mark.parametrize("name", BACK_ENDS)
def test_messages_that_do_not_fit_their_spec(name: str) -> None:
    errors = values(run_ranks(2, _misuse, name))[0]
    assert "the header must be int64 [2] on the host, got torch.int64 [3]" in errors[0]
    assert "3 sections expected, got 2" in errors[1]
    assert "section 0 must be [<=512, 64] bfloat16, got torch.float32" in errors[2]
    assert "section 0 holds 513 rows, 65664 bytes; at most 512 rows, 65536 bytes, fit" in errors[3]


def _cost_of_creation(rank: int, name: str) -> None:
    transport = open_transport(name, [THERE, BACK])
    transport.close()
    transport.close()


@pytest.mark.parametrize("name", BACK_ENDS)
def test_closing_twice_and_without_use(name: str) -> None:
    values(run_ranks(2, _cost_of_creation, name))


def test_unknown_names_and_bad_timeouts() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="unknown transport 'pigeon'; choose from torch, nixl"):
        create_transport("pigeon", [], device=cpu, timeout_seconds=1)
    with pytest.raises(ValueError, match="timeout_seconds must be positive and finite, got 0"):
        create_transport("torch", [], device=cpu, timeout_seconds=0)
    with pytest.raises(ValueError, match="channel names must be unique; 'M2N A0->F0 r0' appears 2 times"):
        create_transport("torch", [THERE, THERE], device=cpu, timeout_seconds=1)
