"""The benchmarks of the executor: emulated ports, the meter, and both commands run small. Times are not looked at."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_disagmoe.benchmarks.executor import measure as measure_executor
from megatron_disagmoe.benchmarks.executor_job import Meter
from megatron_disagmoe.benchmarks.ports import PortTransport, arbiter
from megatron_disagmoe.benchmarks.schedule import CASES, named
from megatron_disagmoe.cli import app
from megatron_disagmoe.transport.base import (
    ChannelSpec,
    Message,
    MessageSpec,
    RecvHandle,
    SendHandle,
    TransferKey,
    Transport,
)

_CHANNEL, _SPEC = ChannelSpec("any", (0, 1), (2, 3)), MessageSpec(0, ())
_MESSAGE = Message(torch.zeros(0, dtype=torch.int64), ())


class _Log(Transport):
    """Writes down what leaves, in order, whichever rank sends it."""

    def __init__(self, left: list[int]) -> None:
        super().__init__((), timeout_seconds=10.0)
        self.left = left

    def send(
        self, channel: ChannelSpec, key: TransferKey, peer: int, message: Message, spec: MessageSpec
    ) -> SendHandle:
        self.left.append(key.micro_batch)
        return _Sent()

    def post_recv(self, channel: ChannelSpec, key: TransferKey, peer: int, spec: MessageSpec) -> RecvHandle:
        raise AssertionError("nothing is received here")

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _Sent(SendHandle):
    def wait(self) -> None: ...


class _Ports:
    """Ranks 0 .. 3, each a group of its own; a message's layer is its duration in hundredths of a second."""

    def __init__(self, path: Path) -> None:
        self.left: list[int] = []
        self.ranks = [
            PortTransport(
                _Log(self.left),
                path,
                group=rank,
                group_of_rank=lambda peer: peer,
                seconds=lambda key: key.layer / 100,
                turns=lambda key: self.turns.get(key.micro_batch),
            )
            for rank in range(4)
        ]
        self.turns: dict[int, tuple[int, int]] = {}

    def send(self, source: int, target: int, name: int, hundredths: int) -> None:
        key = TransferKey("M2N", False, hundredths, name)
        self.ranks[source].send(_CHANNEL, key, target, _MESSAGE, _SPEC)
        time.sleep(0.01)  # the next one is asked for later

    def flush(self) -> list[int]:
        for rank in self.ranks:
            rank.flush()
        return self.left


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[_Ports]:
    with arbiter(tmp_path / "socket"):
        found = _Ports(tmp_path / "socket")
        yield found
        for rank in found.ranks:
            rank.close()
    assert not [thread for thread in threading.enumerate() if thread.name in ("ports", "port")]


def test_one_port_sends_one_message_at_a_time(ports: _Ports) -> None:
    ports.send(0, 2, name=1, hundredths=40)
    ports.send(0, 3, name=2, hundredths=5)
    ports.send(1, 3, name=3, hundredths=10)
    assert ports.flush() == [3, 1, 2], "the second waits for its sender's port, the third for nobody"


def test_one_port_receives_one_message_at_a_time(ports: _Ports) -> None:
    ports.send(0, 2, name=1, hundredths=40)
    ports.send(1, 2, name=2, hundredths=5)
    assert ports.flush() == [1, 2]


def test_both_directions_are_busy_at_once(ports: _Ports) -> None:
    ports.send(0, 2, name=1, hundredths=60)
    ports.send(2, 0, name=2, hundredths=10)
    assert ports.flush() == [2, 1]


def test_nothing_idles_behind_a_transfer_that_cannot_begin(ports: _Ports) -> None:
    ports.send(1, 2, name=1, hundredths=60)
    ports.send(0, 2, name=2, hundredths=10)
    ports.send(0, 3, name=3, hundredths=10)
    assert ports.flush() == [3, 1, 2]


def test_ports_in_order_wait_for_a_turn(ports: _Ports) -> None:
    ports.turns = {1: (0, 1), 2: (0, 0), 3: (1, 0)}
    ports.send(0, 2, name=1, hundredths=10)
    ports.send(0, 3, name=3, hundredths=10)
    ports.send(1, 2, name=2, hundredths=30)
    assert ports.flush() == [2, 1, 3], "2 receives from 1 first; 0 sends to 2 first"


def test_what_takes_no_time_needs_no_port(ports: _Ports) -> None:
    ports.send(0, 2, name=1, hundredths=30)
    ports.send(0, 2, name=2, hundredths=0)
    assert ports.flush() == [2, 1]


def test_the_meter_counts_every_second_once() -> None:
    meter = Meter()
    start = time.thread_time()

    def burn(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    inner = meter.metered("modules", burn)

    def outer() -> None:
        burn(0.02)
        inner(0.03)
        burn(0.02)

    meter.metered("ours", outer)()
    burn(0.01)
    meter.switch("off")
    total = time.thread_time() - start
    assert meter.seconds["ours"] >= 0.04
    assert meter.seconds["modules"] >= 0.03
    assert meter.seconds["off"] >= 0.01
    assert sum(meter.seconds.values()) == pytest.approx(total, abs=0.001)


def test_the_executor_is_metered_on_every_rank(tmp_path: Path) -> None:
    rows = measure_executor([(1, 1, "split-backward", "torch", "per-rank")], tmp_path)
    assert [row["group"] for row in rows] == ["F0", "A0"]
    micro_batches, layers = 16, 4
    assert rows[0]["compute_actions"] == micro_batches * layers * 3
    assert rows[1]["compute_actions"] == micro_batches * (layers + 1) * 3
    for row in rows:
        assert row["steps"] == 30
        assert row["actions"] == row["compute_actions"] + micro_batches * layers * 4
        assert 0 < row["overhead_us_per_action"] < row["overhead_us_per_compute_action"]
        assert row["modules_us_per_compute_action"] > 0


def test_bench_schedule(tmp_path: Path) -> None:
    words = ["bench", "schedule", "--cases", "p1-sequential,p2-p1", "--stage-ms", "1", "--repeats", "2", "--json"]
    result = CliRunner().invoke(app, [*words, "--traces", "--out", str(tmp_path)])
    assert result.exit_code in (0, 1), result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["case"] for row in rows] == ["p1-sequential", "p2-p1"]
    for row in rows:
        assert row["fill_bound_s"] <= row["simulated_s"]
        assert row["measured_min_s"] <= row["measured_s"] <= row["measured_max_s"]
        assert row["repeats"] == 2
    assert (tmp_path / "schedule.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "schedule.json").read_text())["rows"] == rows
    assert len(list((tmp_path / "traces" / "p2-p1").glob("rank-*.json"))) == 3


def test_unknown_cases_are_named() -> None:
    assert named(None) == CASES
    assert [case.name for case in named("p2, p1")] == ["p2", "p1"]
    with pytest.raises(ValueError, match="there is no case 'p9'; choose among p1-sequential, p1, "):
        named("p9")
    result = CliRunner().invoke(app, ["bench", "schedule", "--cases", "p9"])
    assert result.exit_code == 2
