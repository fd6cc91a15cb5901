"""Emulated network ports: how long a transfer takes, when it may begin, for all ranks of a benchmark.

Each group has one sending and one receiving port; a transfer holds both for its duration, and a free port takes the
transfer that has waited longest among those whose other port is free (``simulator.engine``). One process, the arbiter,
keeps all ports in real time; ranks ask it over a local socket and send once it says that the time is over.

Where a schedule has its ports in order, a transfer also waits for its turn on both.
"""

from __future__ import annotations

import itertools
import json
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_disagmoe.transport.base import (
    ChannelSpec,
    Message,
    MessageSpec,
    RecvHandle,
    SendHandle,
    TransferKey,
    Transport,
)

#: Waits shorter than this are spent looking at the clock: sleeping longer than asked would add up along a pipe.
SPIN_SECONDS = 0.0002


@dataclass(eq=False)
class _Transfer:
    """``ready``: when it was asked for (``time.monotonic``); ``ends``: None while it waits for its ports.

    ``turns``: how many transfers of ``run`` its sending and its receiving port serve before it; None where they serve
    what comes.
    """

    connection: socket.socket
    number: int
    source: int
    target: int
    seconds: float
    ready: float
    run: str
    turns: list[int] | None
    ends: float | None = None

    @property
    def ports(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """Sending and receiving."""
        return ("out", self.source), ("in", self.target)


class Arbiter:
    """Serves the ports of all groups on a Unix socket until ``close``."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="ports", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # Not epoll, whose waits Python rounds up to whole milliseconds: every transfer would seem to end that late.
        selector = selectors.SelectSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        waiting: list[_Transfer] = []
        running: list[_Transfer] = []
        free_since: dict[tuple[str, int], float] = {}
        served: Counter[tuple[str, tuple[str, int]]] = Counter()  # in order, by run and port
        lines: dict[socket.socket, bytes] = {}
        while True:
            end = min((transfer.ends for transfer in running if transfer.ends is not None), default=None)
            left = None if end is None else end - time.monotonic()
            for key, _ in selector.select(0 if left is not None and left < SPIN_SECONDS else left):
                if key.fileobj is self._woken:
                    selector.close()
                    return
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    selector.register(connection, selectors.EVENT_READ)
                    lines[connection] = b""
                else:
                    connection = key.fileobj  # type: ignore[assignment]
                    data = connection.recv(1 << 16)
                    if not data:
                        selector.unregister(connection)
                        connection.close()
                        continue
                    *whole, lines[connection] = (lines[connection] + data).split(b"\n")
                    waiting += [_Transfer(connection, *json.loads(line)) for line in whole]
            now = time.monotonic()
            for transfer in [transfer for transfer in running if transfer.ends is not None and transfer.ends <= now]:
                running.remove(transfer)
                assert transfer.ends is not None, "it runs"
                for port in transfer.ports:
                    free_since[port] = transfer.ends
                transfer.connection.sendall(b"%d\n" % transfer.number)
            busy = {port for transfer in running for port in transfer.ports}
            for transfer in sorted(waiting, key=lambda transfer: transfer.ready):
                ports, run = transfer.ports, transfer.run
                is_its_turn = transfer.turns is None or transfer.turns == [served[run, port] for port in ports]
                if is_its_turn and not busy & set(ports):
                    if transfer.turns is not None:
                        served.update((run, port) for port in ports)
                    waiting.remove(transfer)
                    running.append(transfer)
                    busy |= set(ports)
                    # Its true beginning, not when we got round to it: or our delays would add up.
                    begins = max(transfer.ready, *(free_since.get(port, 0.0) for port in ports))
                    transfer.ends = begins + transfer.seconds

    def close(self) -> None:
        """End the thread."""
        self._wake.send(b".")
        self._thread.join()
        for end in (self._listener, self._wake, self._woken):
            end.close()


@contextmanager
def arbiter(path: Path) -> Iterator[None]:
    """An ``Arbiter`` for the length of a block."""
    ports = Arbiter(path)
    try:
        yield
    finally:
        ports.close()


class PortTransport(Transport):
    """A transport whose messages leave when the emulated ports let them.

    Args:
        inner: what moves them.
        path: socket of the arbiter.
        group: number of this rank's group.
        group_of_rank: number of the group of a global rank.
        seconds: how long a transfer takes; 0 for none at all.
        turns: how many transfers its two ports serve before it in a run; None where they serve what comes.

    ``run`` names the run that is under way; turns are counted in each.
    """

    def __init__(
        self,
        inner: Transport,
        path: Path,
        *,
        group: int,
        group_of_rank: Callable[[int], int],
        seconds: Callable[[TransferKey], float],
        turns: Callable[[TransferKey], tuple[int, int] | None] = lambda key: None,
    ) -> None:
        super().__init__((), timeout_seconds=inner.timeout_seconds)
        self._inner, self._group, self._group_of_rank, self._seconds = inner, group, group_of_rank, seconds
        self._turns, self.run = turns, ""
        self._numbers = itertools.count()
        self._waiting: dict[int, Callable[[], SendHandle]] = {}
        self._changed = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._thread = threading.Thread(target=self._run, name="port", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._socket.makefile("rb") as done:
            for line in done:
                with self._changed:
                    self._waiting.pop(int(line))()
                    self._changed.notify_all()

    def send(
        self, channel: ChannelSpec, key: TransferKey, peer: int, message: Message, spec: MessageSpec
    ) -> SendHandle:
        """The handle says only that the message has been taken over."""
        seconds = self._seconds(key)
        with self._changed:
            if seconds == 0:
                return self._inner.send(channel, key, peer, message, spec)
            number = next(self._numbers)
            self._waiting[number] = lambda: self._inner.send(channel, key, peer, message, spec)
        request: list[object] = [number, self._group, self._group_of_rank(peer), seconds, time.monotonic()]
        request += [self.run, self._turns(key)]
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        return _TakenOver()

    def post_recv(self, channel: ChannelSpec, key: TransferKey, peer: int, spec: MessageSpec) -> RecvHandle:
        return self._inner.post_recv(channel, key, peer, spec)

    def flush(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
        self._inner.flush()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        self._inner.close()


class _TakenOver(SendHandle):
    def wait(self) -> None:
        """Nothing to wait for."""
