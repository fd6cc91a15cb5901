"""Ports for a rendezvous: free, and not among those that an outgoing connection may take meanwhile."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_disagmoe import free_port as module
from megatron_disagmoe.free_port import free_port


def test_no_outgoing_connection_takes_it() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port() for _ in range(50)]
    assert max(ports) < first
    assert len(set(ports)) > 25


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(module, "_LOW", port)
        monkeypatch.setattr(module, "_HIGH", port)
        with pytest.raises(OSError, match=f"between {port} and {port} is free"):
            free_port()
