"""What a limited link carries when plain sockets keep both of its directions full, and how long a word then takes.

``tc tbf`` lets through less than its limit where its timer fires late, and the more so the faster the link: on two
shared cores 0.83 to 0.88 of 2 Gbit/s, 0.95 to 0.98 of 1, 0.96 to 0.99 below. No transport can do better.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import median

from megatron_disagmoe.benchmarks.hosts import Host, Hosts

_PORT, _PING_PORT = 29400, 29401
_CHUNK = 1 << 20
_CONNECT_SECONDS = 5.0
_WARM_UP_SECONDS, _WINDOWS = 0.3, 3
_PING_SECONDS = 0.005


@dataclass(frozen=True)
class LinkSpeed:
    """Of a link whose two directions are both full.

    Attributes:
        share: of the limit that crosses, headers included, the slower direction.
        round_trip: seconds from a few bytes' leaving to their echo, on a connection of their own; median.
    """

    share: float
    round_trip: float


def link_speed(hosts: Hosts, *, seconds: float = 0.5) -> LinkSpeed:
    """Between the first and the last host; of three windows of ``seconds`` each the median.

    Raises:
        ValueError: where there is no limit, or no second host.
        RuntimeError: where nothing crosses.
    """
    if hosts.gbit_per_s is None or len(hosts) < 2:
        raise ValueError(f"a share needs a limit and two hosts, got {hosts.gbit_per_s} Gbit/s and {len(hosts)} hosts")
    ends = hosts[0], hosts[len(hosts) - 1]
    there, back, words = _Stream(*ends), _Stream(*reversed(ends)), _Words(*ends)
    try:
        time.sleep(_WARM_UP_SECONDS)
        shares = []
        for _ in range(_WINDOWS):
            before = [(time.perf_counter(), host.counters().sent) for host in ends]
            time.sleep(seconds)
            after = [(time.perf_counter(), host.counters().sent) for host in ends]
            rates = [(b[1] - a[1]) / (b[0] - a[0]) * 8e-9 for a, b in zip(before, after, strict=True)]
            shares.append(min(rates) / hosts.gbit_per_s)
        if min(shares) == 0 or not words.round_trips:
            raise RuntimeError(f"nothing crosses between {ends[0].address} and {ends[1].address}, port {_PORT}")
        return LinkSpeed(median(shares), median(words.round_trips))
    finally:
        for each in (words, there, back):
            each.close()


class _Connection(ABC):
    """From one host to another, while it is open. A thread that has entered a host opens its sockets there."""

    port = _PORT

    def __init__(self, source: Host, target: Host) -> None:
        self.closing = threading.Event()
        self._listening = threading.Event()
        self._source, self._target = source, target
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._serve, self._call)]
        for thread in self._threads:
            thread.start()

    def _serve(self) -> None:
        self._target.enter()
        with socket.create_server((self._target.address, self.port)) as server:
            server.settimeout(_CONNECT_SECONDS)
            self._listening.set()
            connection, _ = server.accept()
        with connection:
            self.answer(connection)

    def _call(self) -> None:
        self._source.enter()
        self._listening.wait()
        with socket.create_connection((self._target.address, self.port)) as connection:
            self.talk(connection)

    def answer(self, connection: socket.socket) -> None:
        """At the target, until the source hangs up."""
        buffer = bytearray(_CHUNK)
        while connection.recv_into(buffer):
            pass

    @abstractmethod
    def talk(self, connection: socket.socket) -> None:
        """At the source, until ``closing``."""

    def close(self) -> None:
        """End it once what it has begun to send is through."""
        self.closing.set()
        for thread in self._threads:
            thread.join()


class _Stream(_Connection):
    """As many bytes as go."""

    def talk(self, connection: socket.socket) -> None:
        chunk = bytes(_CHUNK)
        while not self.closing.is_set():
            connection.sendall(chunk)


class _Words(_Connection):
    """A few bytes and their echo, over and over; ``round_trips``: seconds of each."""

    port = _PING_PORT

    def __init__(self, source: Host, target: Host) -> None:
        self.round_trips: list[float] = []
        super().__init__(source, target)

    def answer(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            while word := connection.recv(64):
                connection.sendall(word)

    def talk(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not self.closing.wait(_PING_SECONDS):
            start = time.perf_counter()
            connection.sendall(b"word")
            connection.recv(64)
            self.round_trips.append(time.perf_counter() - start)
