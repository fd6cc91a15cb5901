"""Several hosts on one machine: network namespaces behind a switch, with links limited by ``tc tbf``.

    with Hosts(2, gbit_per_s=1) as hosts:
        worker = hosts[0].popen([sys.executable, "worker.py"], env={**os.environ, **hosts[0].environment})
        ...
        hosts.limit(0.5)
        print(hosts[0].counters().sent)

Each host has one interface ``eth0`` (and its own loopback); the other end of its cable is a port of a bridge that
lives in a namespace of its own, so the machine's network is left alone. A limit holds for each host and for each
direction apart (full duplex): what a host sends is limited at its interface, what it receives at the switch's port.

Needs root, ``ip`` and ``tc``. However the block is left, also by SIGINT or SIGTERM, every process started in a host
is ended and every namespace removed; what a killed run has left behind, the next one removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

INTERFACE = "eth0"
_PREFIX = "disagmoe"
_NAMESPACES = Path("/var/run/netns")
#: Jumbo frames, as data centres use: 8948 of 9014 bytes on the wire are payload (0.993).
_MTU = 9000
#: What ``tbf`` lets pass at once: more gives small messages free bandwidth. The packets that TCP hands down must be
#: smaller, or ``tbf`` cuts each into frames, which takes a fifth of a core at 1 Gbit/s (32 KiB: an eighth).
_BURST_BYTES, _PACKET_BYTES = 32 * 1024, 32_000
#: How long ``tbf`` queues before it drops. At 100 ms it drops thousands of packets of a busy step.
_LATENCY = "2s"
_END_SECONDS = 2.0


class HostsUnavailable(ValueError):
    """This machine or this user cannot make network namespaces."""


@dataclass(frozen=True)
class Counters:
    """Bytes a host's interface has sent and received since the host exists, headers included."""

    sent: int
    received: int

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(self.sent - earlier.sent, self.received - earlier.received)


@dataclass(frozen=True)
class Host:
    """One namespace with one interface.

    Attributes:
        namespace: its name, for ``ip netns exec``.
        address: IPv4 address of its interface.
    """

    namespace: str
    address: str
    _hosts: Hosts

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make torch.distributed and UCX use this host's network and nothing past it.

        UCX would find that the "hosts" share memory, since only their networks are apart.
        """
        return {"GLOO_SOCKET_IFNAME": INTERFACE, "UCX_TLS": "tcp,self"}

    def command(self, argv: Sequence[str]) -> list[str]:
        """``argv`` such that it runs inside this host."""
        return ["ip", "netns", "exec", self.namespace, *argv]

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process inside this host (options: ``subprocess.Popen``); it ends with the hosts at the latest."""
        process = subprocess.Popen(self.command(argv), **options)
        self._hosts.processes.append(process)
        return process

    def enter(self) -> None:
        """Move the calling thread into this host: for a forked process, before it opens any socket."""
        handle = os.open(_NAMESPACES / self.namespace, os.O_RDONLY)
        try:
            os.setns(handle, os.CLONE_NEWNET)
        finally:
            os.close(handle)

    def counters(self) -> Counters:
        """What its interface has carried."""
        text = _run("ip", "-n", self.namespace, "-j", "-s", "link", "show", INTERFACE)
        stats = json.loads(text)[0]["stats64"]
        return Counters(sent=stats["tx"]["bytes"], received=stats["rx"]["bytes"])


class Hosts:
    """``count`` hosts, each reaching every other; use it in a ``with`` statement.

    Args:
        count: at least 1.
        gbit_per_s: limit of each link in each direction; None for none.

    Raises:
        HostsUnavailable: on entering, with the reason and the remedy.
        ValueError: for a count or rate that makes no sense.
    """

    def __init__(self, count: int, *, gbit_per_s: float | None = None) -> None:
        if not 1 <= count <= 250:
            raise ValueError(f"the number of hosts must be 1 to 250, got {count}")
        _check_rate(gbit_per_s)
        self.gbit_per_s = gbit_per_s
        self.processes: list[subprocess.Popen[Any]] = []
        run = f"{_PREFIX}-{os.getpid()}"
        self._switch = f"{run}-switch"
        self.hosts = [Host(f"{run}-host{i}", f"10.77.0.{i + 1}", self) for i in range(count)]
        self._old_handler: Any = None

    def __enter__(self) -> Self:
        reason = why_unavailable()
        if reason is not None:
            raise HostsUnavailable(reason)
        _remove_left_over()
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, _exit_on_signal)
        try:
            self._build()
            self.limit(self.gbit_per_s)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def __len__(self) -> int:
        return len(self.hosts)

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def limit(self, gbit_per_s: float | None) -> None:
        """Change every link's limit, also while it is in use; None lifts it."""
        _check_rate(gbit_per_s)
        for i, host in enumerate(self.hosts):
            _limit(host.namespace, INTERFACE, gbit_per_s)
            _limit(self._switch, f"port{i}", gbit_per_s)
        self.gbit_per_s = gbit_per_s

    def dropped(self) -> int:
        """Packets the limits have dropped so far (0 unless more was queued than ``tbf`` holds)."""
        ends = [(host.namespace, INTERFACE) for host in self.hosts]
        ends += [(self._switch, f"port{i}") for i in range(len(self.hosts))]
        qdiscs = [json.loads(_run("tc", "-n", ns, "-j", "-s", "qdisc", "show", "dev", dev)) for ns, dev in ends]
        return sum(qdisc["drops"] for found in qdiscs for qdisc in found)

    def _build(self) -> None:
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "bridge", "mtu", str(_MTU), "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for i, host in enumerate(self.hosts):
            port, namespace = f"port{i}", host.namespace
            _run("ip", "netns", "add", namespace)
            ends = (("name", INTERFACE, "netns", namespace), ("name", port, "netns", self._switch))
            _run("ip", "link", "add", *ends[0], "mtu", str(_MTU), "type", "veth", "peer", *ends[1], "mtu", str(_MTU))
            _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _run("ip", "-n", namespace, "link", "set", INTERFACE, "gso_max_size", str(_PACKET_BYTES), "up")
            _run("ip", "-n", namespace, "link", "set", "lo", "up")

    def _remove(self) -> None:
        with _signals_ignored():
            for process in self.processes:
                process.terminate()
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_SECONDS)
            for namespace in [*(host.namespace for host in self.hosts), self._switch]:
                _delete(namespace)
            for process in self.processes:
                process.wait()
            self.processes.clear()
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)
            self._old_handler = None


def why_unavailable() -> str | None:
    """Why this process cannot make hosts, with the remedy; None where it can."""
    remedy = "shaped links need root, the commands ip and tc (package iproute2) and network namespaces"
    if os.geteuid() != 0:
        return f"{remedy}: run it as root (user id {os.geteuid()})"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{remedy}: {' and '.join(missing)} not found"
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        try:
            _run("ip", "-n", probe, "link", "add", "probe", "type", "bridge")
            _run("ip", "-n", probe, "link", "add", INTERFACE, "type", "veth", "peer", "name", "peer")
            _limit(probe, INTERFACE, 1.0)
        finally:
            _delete(probe)
    except ValueError as error:
        return f"{remedy}: {error}"
    return None


def _limit(namespace: str, device: str, gbit_per_s: float | None) -> None:
    if gbit_per_s is None:
        with contextlib.suppress(ValueError):  # there was no limit
            _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
        return
    rate, burst = f"{round(gbit_per_s * 1e9)}bit", str(_BURST_BYTES)
    limit = ("root", "tbf", "rate", rate, "burst", burst, "latency", _LATENCY)
    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, *limit)


def _check_rate(gbit_per_s: float | None) -> None:
    if gbit_per_s is not None and not 0.001 <= gbit_per_s <= 100:
        raise ValueError(f"a link's limit must be 0.001 to 100 Gbit/s, got {gbit_per_s:g}")


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ValueError(f"{' '.join(command)}: {result.stderr.strip() or f'exit code {result.returncode}'}")
    return result.stdout


def _delete(namespace: str) -> None:
    """End what still runs in a namespace and remove it; fine where it does not exist."""
    if not (_NAMESPACES / namespace).exists():
        return
    for pid in map(int, _run("ip", "netns", "pids", namespace).split()):
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    _run("ip", "netns", "del", namespace)


def _remove_left_over() -> None:
    """Remove namespaces whose maker is dead: it was killed before it could."""
    for path in _NAMESPACES.glob(f"{_PREFIX}-*-*"):
        maker = path.name.split("-")[1]
        if maker.isdigit() and not Path(f"/proc/{maker}").exists():
            _delete(path.name)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """A second Ctrl-C must not cut cleaning up short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
