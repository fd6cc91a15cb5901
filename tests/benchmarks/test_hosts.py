"""Hosts as network namespaces: traffic counted and limited, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_disagmoe.benchmarks import hosts as module
from megatron_disagmoe.benchmarks.hosts import Hosts, HostsUnavailable, why_unavailable
from megatron_disagmoe.benchmarks.shaped.raw_link import link_speed

needs_hosts = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

SERVER = """
    import socket
    with socket.create_server(("0.0.0.0", 5000)) as server:
        print("ready", flush=True)
        with server.accept()[0] as connection:
            received = 0
            while data := connection.recv(1 << 16):
                received += len(data)
    print(received, flush=True)
"""
CLIENT = """
    import socket, sys
    with socket.create_connection((sys.argv[1], 5000)) as connection:
        connection.sendall(bytes(int(sys.argv[2])))
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *arguments]


def namespaces() -> set[str]:
    folder = Path("/var/run/netns")
    return {path.name for path in folder.iterdir() if path.name.startswith("disagmoe-")} if folder.exists() else set()


def of_process(pid: int) -> set[str]:
    return {name for name in namespaces() if name.startswith(f"disagmoe-{pid}-")}


def rates(hosts: Hosts) -> list[int]:
    """Bytes a second that ``tc`` says each host may send; none where it has no limit."""
    found = []
    for host in hosts:
        command = ["tc", "-n", host.namespace, "-j", "qdisc", "show", "dev", "eth0"]
        qdiscs = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        found += [qdisc["options"]["rate"] for qdisc in qdiscs if qdisc["kind"] == "tbf"]
    return found


def transfer(hosts: Hosts, source: int, target: int, size: int) -> None:
    server = hosts[target].popen(python(SERVER), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    client = hosts[source].popen(python(CLIENT, hosts[target].address, str(size)))
    assert client.wait(20) == 0
    assert server.communicate(timeout=20)[0] == f"{size}\n"


@needs_hosts
def test_traffic_is_counted_and_limits_change_while_up() -> None:
    with Hosts(3, gbit_per_s=0.5) as hosts:
        assert rates(hosts) == [62_500_000] * 3
        before = [host.counters() for host in hosts]
        transfer(hosts, 0, 2, 2_000_000)
        passed = [host.counters() - old for host, old in zip(hosts, before, strict=True)]
        assert 2_000_000 < passed[0].sent < 2_100_000
        assert 2_000_000 < passed[2].received < 2_100_000
        assert passed[1].sent < 10_000
        hosts.limit(0.25)
        assert rates(hosts) == [31_250_000] * 3
        transfer(hosts, 1, 0, 1_000_000)
        hosts.limit(None)
        assert rates(hosts) == []
        transfer(hosts, 1, 0, 1_000_000)
        assert hosts.dropped() == 0
        sleeper = hosts[1].popen(["sleep", "60"])
        assert len(of_process(os.getpid())) == 4
    assert of_process(os.getpid()) == set()
    assert sleeper.poll() == -signal.SIGTERM


@needs_hosts
def test_what_plain_sockets_reach_of_a_limit() -> None:
    """Headers included it can be no more than all (and what ``tbf`` had saved up), and is most of it."""
    with Hosts(3, gbit_per_s=0.2) as hosts:
        sent = [host.counters().sent for host in hosts]
        speed = link_speed(hosts, seconds=0.2)
        more = [host.counters().sent - before for host, before in zip(hosts, sent, strict=True)]
        assert 0.5 < speed.share < 1.05
        assert 0 < speed.round_trip < 1
        # Both ends sent for three windows of 0.2 s at least, the host between them nothing to speak of.
        assert min(more[0], more[2]) > 0.5 * 0.2e9 / 8 * 0.6 > 1e6 > more[1]
        assert link_speed(hosts, seconds=0.1).share > 0.5, "the port is free again"
        hosts.limit(None)
        with pytest.raises(ValueError, match="a share needs a limit and two hosts, got None"):
            link_speed(hosts)


@needs_hosts
def test_a_forked_process_enters_a_host() -> None:
    with Hosts(2) as hosts:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            hosts[1].enter()
            addresses = subprocess.run(["ip", "-j", "address"], capture_output=True, check=False).stdout
            os.write(writer, addresses)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            interfaces = json.loads(pipe.read())
        assert os.waitpid(pid, 0)[1] == 0
        assert [link["ifname"] for link in interfaces] == ["lo", "eth0"]
        assert interfaces[1]["addr_info"][0]["local"] == hosts[1].address == "10.77.0.2"


@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals) -> None:
    code = """
        import signal, time
        from megatron_disagmoe.benchmarks.hosts import Hosts
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script ignores it
        with Hosts(2, gbit_per_s=1) as hosts:
            hosts[0].popen(["sh", "-c", "trap '' TERM; echo $$; sleep 60"])
            time.sleep(60)
    """
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert len(of_process(process.pid)) == 3
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143}[number]
    assert of_process(process.pid) == set()
    assert not Path(f"/proc/{child}").exists()


@needs_hosts
def test_the_next_run_removes_what_a_killed_one_left() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = f"disagmoe-{dead.pid}-host0"
    subprocess.run(["ip", "netns", "add", left], check=True)
    alive = f"disagmoe-{os.getppid()}-host0"  # as if another run were at work
    subprocess.run(["ip", "netns", "add", alive], check=True)
    try:
        with Hosts(1):
            assert left not in namespaces()
            assert alive in namespaces()
    finally:
        subprocess.run(["ip", "netns", "del", alive], check=True)


@needs_hosts
def test_a_fault_while_building_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LATENCY", "soon")
    monkeypatch.setattr(module, "why_unavailable", lambda: None)
    with pytest.raises(ValueError, match="tc .* latency soon: "), Hosts(2, gbit_per_s=1):
        pass
    assert of_process(os.getpid()) == set()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_without_root_or_commands_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostsUnavailable, match=r"need root, .* run it as root \(user id 1000\)"), Hosts(2):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostsUnavailable, match="ip and tc not found"), Hosts(2):
        pass


@pytest.mark.parametrize("count, rate, message", [(0, 1.0, "must be 1 to 250, got 0"), (2, 0.0, "0.001 to 100")])
def test_numbers_that_make_no_sense(count: int, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hosts(count, gbit_per_s=rate)
