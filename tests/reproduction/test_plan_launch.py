"""Launchers of two nodes, rank 0 not on node 0: ranks meet at the store of node 0's launcher."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_disagmoe.free_port import free_port
from megatron_disagmoe.plan_launch import Process, start

_MEETS = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=20)))
store.set(f"rank{rank}", "here")
if sys.argv[1] == "all":
    time.sleep(3 * (rank == 0))  # node 0's rank has ended long before
    for other in range(world):
        assert store.get(f"rank{other}") == b"here"
"""


@pytest.fixture
def port() -> int:
    return free_port()


def process(node: int, rank: int, port: int, *, waits_for: str = "all") -> Process:
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return Process(node, rank, f"rank {rank}", environment, (sys.executable, "-c", _MEETS, waits_for))


def test_ranks_of_two_nodes_meet(port: int) -> None:
    with ThreadPoolExecutor(2) as launchers:
        nodes = [[process(1, 0, port)], [process(0, 1, port)]]
        assert list(launchers.map(lambda mine: start(mine, num_nodes=2), nodes)) == [0, 0]


def test_node_0_serves_the_store_though_rank_0_is_elsewhere(port: int) -> None:
    """On hosts of their own, ranks of node 1 reach nothing at all without it."""
    assert start([process(0, 1, port, waits_for="nobody")], num_nodes=1) == 0


def test_a_taken_port_is_refused_before_any_process_starts(port: int, tmp_path: Path) -> None:
    trace = tmp_path / "started"
    never = Process(
        0, 1, "rank 1", {"MASTER_PORT": str(port)}, (sys.executable, "-c", f"open({str(trace)!r}, 'w')")
    )
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        taken.bind(("::", port))
        taken.listen()
        with pytest.raises(ValueError, match=f"--port {port} is taken"):
            start([never], num_nodes=1)
    assert not trace.exists()
