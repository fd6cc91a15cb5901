"""What a limited link carries when plain sockets keep both of its directions full.

``tc tbf`` lets through less than its limit where its timer fires late, and the more so the faster the link: on two
shared cores 0.83 to 0.88 of 2 Gbit/s, 0.95 to 0.98 of 1, 0.96 to 0.99 below. No transport can do better.
"""

from __future__ import annotations

import socket
import threading
import time
from statistics import median

from megatron_disagmoe.benchmarks.hosts import Host, Hosts

_PORT = 29400
_CHUNK = 1 << 20
_CONNECT_SECONDS = 5.0
_WARM_UP_SECONDS, _WINDOWS = 0.3, 3


def achieved_share(hosts: Hosts, *, seconds: float = 0.5) -> float:
    """The share of ``hosts.gbit_per_s`` that crosses between the first and the last host, headers included.

    Both directions are busy at once; of three windows of ``seconds`` each the median of the slower direction.

    Raises:
        ValueError: where there is no limit, or no second host.
        RuntimeError: where nothing crosses.
    """
    if hosts.gbit_per_s is None or len(hosts) < 2:
        raise ValueError(f"a share needs a limit and two hosts, got {hosts.gbit_per_s} Gbit/s and {len(hosts)} hosts")
    ends = hosts[0], hosts[len(hosts) - 1]
    streams = [_Stream(ends[0], ends[1]), _Stream(ends[1], ends[0])]
    try:
        time.sleep(_WARM_UP_SECONDS)
        shares = []
        for _ in range(_WINDOWS):
            before = [(time.perf_counter(), host.counters().sent) for host in ends]
            time.sleep(seconds)
            after = [(time.perf_counter(), host.counters().sent) for host in ends]
            rates = [(b[1] - a[1]) / (b[0] - a[0]) * 8e-9 for a, b in zip(before, after, strict=True)]
            if min(rates) == 0:
                raise RuntimeError(f"nothing crosses between {ends[0].address} and {ends[1].address}, port {_PORT}")
            shares.append(min(rates) / hosts.gbit_per_s)
        return median(shares)
    finally:
        for stream in streams:
            stream.close()


class _Stream:
    """Bytes from one host to another while it is open. A thread that has entered a host opens its sockets there."""

    def __init__(self, source: Host, target: Host) -> None:
        self._closing = threading.Event()
        self._listening = threading.Event()
        self._source, self._target = source, target
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._receive, self._send)]
        for thread in self._threads:
            thread.start()

    def _receive(self) -> None:
        self._target.enter()
        with socket.create_server((self._target.address, _PORT)) as server:
            server.settimeout(_CONNECT_SECONDS)
            self._listening.set()
            connection, _ = server.accept()
        with connection:
            buffer = bytearray(_CHUNK)
            while connection.recv_into(buffer):
                pass

    def _send(self) -> None:
        self._source.enter()
        self._listening.wait()
        with socket.create_connection((self._target.address, _PORT)) as connection:
            chunk = bytes(_CHUNK)
            while not self._closing.is_set():
                connection.sendall(chunk)

    def close(self) -> None:
        """End the stream once what it has begun to send is through."""
        self._closing.set()
        for thread in self._threads:
            thread.join()
