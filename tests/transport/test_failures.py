"""Peers that die, stall or send the wrong thing: everyone ends in time and says who waited for what."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import torch

from megatron_disagmoe.transport import ChannelSpec, Message, MessageSpec, Section, TransferKey, Transport
from tests.transport.layer import BACK_ENDS, open_transport
from tests.transport.ranks import Outcome, no_shared_memory_left, run_ranks

TIMEOUT = 4.0
#: Two attention ranks and one FFN rank, which is the one that misbehaves.
M2N = ChannelSpec("M2N A0->F0 r0", (0, 1), (2,))
N2M = ChannelSpec("N2M F0->A0 r0", (2,), (0, 1))
SPEC = MessageSpec(1, (Section(torch.float32, 256, 1024, hidden=True), Section(torch.float32, 1, 1024)))
BYTES = 1024 * 257 * 4


def key(edge: str, micro_batch: int) -> TransferKey:
    return TransferKey(edge, False, 5, micro_batch)


def message(rows: int) -> Message:
    return Message(torch.tensor([rows]), (torch.ones(rows, 256), torch.ones(rows, 1)))


def _attention(transport: Transport, count: int) -> None:
    """Send and get an answer, ``count`` times."""
    for b in range(count):
        handle = transport.post_recv(N2M, key("N2M", b), 2, SPEC)
        transport.send(M2N, key("M2N", b), 2, message(512), SPEC)
        handle.wait()
        handle.release()
    transport.flush()
    transport.close()


def _answer(transport: Transport, micro_batch: int, edge: str = "N2M", rows: int = 512) -> None:
    handles = [transport.post_recv(M2N, key("M2N", micro_batch), peer, SPEC) for peer in (0, 1)]
    for peer, handle in enumerate(handles):
        handle.wait()
        handle.release()
        transport.send(N2M, key(edge, micro_batch), peer, message(rows), SPEC)


def _rank(rank: int, name: str, fault: str) -> None:
    transport = open_transport(name, [M2N, N2M], timeout_seconds=TIMEOUT)
    if rank < 2:
        _attention(transport, 4)
        return
    for b in range(3):
        _answer(transport, b)
    transport.flush()
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "silent":
        for b in range(3, 100):
            _answer_nothing(transport, b)
    elif fault == "wrong micro-batch":
        _answer(transport, 3, edge="LANE")
        transport.flush()
        time.sleep(1)


def _answer_nothing(transport: Transport, micro_batch: int) -> None:
    for peer in (0, 1):
        transport.post_recv(M2N, key("M2N", micro_batch), peer, SPEC).wait()


def _wrong_size(rank: int, name: str, factor: int) -> None:
    """The FFN rank was started with another micro-batch size and answers with more rows than fit."""
    transport = open_transport(name, [N2M], timeout_seconds=TIMEOUT)
    if rank < 2:
        handles = [transport.post_recv(N2M, key("N2M", b), 2, SPEC) for b in range(2)]
        handles[0].wait()
        return
    sections = tuple(replace(section, max_rows=section.max_rows * factor) for section in SPEC.sections)
    for b in range(2):
        for peer in (0, 1):
            transport.send(N2M, key("N2M", b), peer, message(1024 * factor), MessageSpec(1, sections))
    transport.flush()


def _deaf(rank: int, name: str) -> None:
    """The FFN rank never posts a receive."""
    transport = open_transport(name, [M2N], timeout_seconds=TIMEOUT)
    if rank == 2:
        time.sleep(60)
    transport.send(M2N, key("M2N", 0), 2, message(512), SPEC)
    transport.send(M2N, key("M2N", 1), 2, message(512), SPEC)
    transport.flush()


def check_end(outcomes: list[Outcome], *, faulty_exit: int | None) -> None:
    """The attention ranks ended by themselves, in time; no process of ours is left."""
    for outcome in outcomes[:2]:
        assert outcome.exit_code == 0
        assert outcome.seconds < TIMEOUT + 20
    if faulty_exit is not None:
        assert outcomes[2].exit_code == faulty_exit
    for child in psutil.Process().children(recursive=True):
        assert child.status() != psutil.STATUS_ZOMBIE


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with no_shared_memory_left():
        yield


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_peer_that_is_killed(name: str) -> None:
    outcomes = run_ranks(3, _rank, name, "killed")
    check_end(outcomes, faulty_exit=-signal.SIGKILL)
    for rank, outcome in enumerate(outcomes[:2]):
        assert outcome.error is not None
        assert outcome.error.startswith(("TransportError: ", "TransportTimeout: "))
        assert f"rank {rank} " in outcome.error
        assert "of layer 5, micro-batch 3" in outcome.error
        assert "rank 2: " in outcome.error
        assert "bytes" in outcome.error


@pytest.mark.parametrize("fault", ["stopped", "silent"])
@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_peer_that_stalls(name: str, fault: str) -> None:
    outcomes = run_ranks(3, _rank, name, fault, wait_for=(0, 1))
    check_end(outcomes, faulty_exit=None)
    for rank, outcome in enumerate(outcomes[:2]):
        assert outcome.error is not None
        assert outcome.error.startswith(
            f"TransportTimeout: N2M F0->A0 r0: rank {rank} receiving N2M of layer 5, micro-batch 3 from rank 2: "
            f"nothing came within 4 s (--af-timeout-seconds); expected up to "
        )
        assert outcome.error.endswith("bytes, had 0")
        assert outcome.seconds >= TIMEOUT


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_peer_that_takes_nothing(name: str) -> None:
    outcomes = run_ranks(3, _deaf, name, wait_for=(0, 1))
    check_end(outcomes, faulty_exit=None)
    for rank, outcome in enumerate(outcomes[:2]):
        assert outcome.error is not None
        assert outcome.error.startswith(
            f"TransportTimeout: M2N A0->F0 r0: rank {rank} sending M2N of layer 5, micro-batch 0 to rank 2: "
            f"not taken within 4 s (--af-timeout-seconds); expected the peer to receive 52"
        )


@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_message_out_of_order(name: str) -> None:
    outcomes = run_ranks(3, _rank, name, "wrong micro-batch")
    check_end(outcomes, faulty_exit=0)
    for outcome in outcomes[:2]:
        assert outcome.error is not None
        assert "expected message 3, N2M of layer 5, micro-batch 3" in outcome.error
        assert "had message 3, LANE of layer 5, micro-batch 3" in outcome.error


@pytest.mark.parametrize("factor", [2, 40])
@pytest.mark.parametrize("name", BACK_ENDS)
def test_a_peer_that_sends_the_wrong_size(name: str, factor: int) -> None:
    outcomes = run_ranks(3, _wrong_size, name, factor)
    check_end(outcomes, faulty_exit=0)
    named = 0
    for rank, outcome in enumerate(outcomes[:2]):
        start = f"TransportError: N2M F0->A0 r0: rank {rank} receiving N2M of layer 5, micro-batch 0 from rank 2: "
        assert outcome.error is not None
        assert outcome.error.startswith((f"{start}the peer sends messages of another shape: expected", f"{start}the c"))
        named += "start every rank with the same sizes" in outcome.error
    assert named >= 1  # the other one may only see the connection go, once the first has ended the sender
    assert outcomes[2].error is not None
    assert outcomes[2].error.startswith(("TransportError: N2M F0->A0 r0", "TransportTimeout: N2M F0->A0 r0"))
