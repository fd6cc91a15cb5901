"""One rank of ``disagmoe bench schedule``: the real executor and transport, stages that sleep.

Run by ``benchmarks.schedule`` as a module; the settings are its only argument.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_disagmoe.benchmarks.ports import SPIN_SECONDS, PortTransport
from megatron_disagmoe.runtime.activations import Activations, Received
from megatron_disagmoe.runtime.executor import Emit, Executor
from megatron_disagmoe.runtime.links import EdgeSpecs, Links, channel_specs
from megatron_disagmoe.schedules.actions import Action, Edge, Kind, Schedule, Side
from megatron_disagmoe.schedules.dataflow import outputs, redispatched
from megatron_disagmoe.schedules.text import load
from megatron_disagmoe.simulator.costs import StageCosts
from megatron_disagmoe.topology import Role, Topology
from megatron_disagmoe.tracing.recorder import NullRecorder, Recorder, TraceRecorder
from megatron_disagmoe.transport.base import Message, MessageSpec, Section, TransferKey
from megatron_disagmoe.transport.torch_backend import TorchTransport

_TIMEOUT_SECONDS = 60.0
_ROWS = Section(torch.float32, 64, 16, hidden=True)


def sleep_until(moment: float) -> None:
    """Sleep until ``time.monotonic()`` is ``moment``, to a few microseconds."""
    while (left := moment - time.monotonic()) > 0:
        if left > SPIN_SECONDS:
            time.sleep(left - SPIN_SECONDS)


@dataclass
class Times:
    """What stages and transfers of a case take, in seconds."""

    costs: StageCosts
    num_layers: int
    unit: float

    def compute(self, role: Role, action: Action) -> float:
        """Of a compute action."""
        stage = 2 * action.layer + (role.group.side is Side.F)
        times = {
            Kind.F: self.costs.forward,
            Kind.I: self.costs.input_gradient,
            Kind.W: self.costs.weight_gradient,
        }
        if action.kind is Kind.D:
            return 0.0
        kinds = (Kind.I, Kind.W) if action.kind is Kind.B else (action.kind,)
        return self.unit * sum(times[kind](stage, num_layers=self.num_layers) for kind in kinds)

    def transfer(self, key: TransferKey) -> float:
        """Of a message."""
        if key.edge == Edge.LANE.value:
            return self.unit * self.costs.lane
        return self.unit * self.costs.edge(2 * key.layer + (key.edge == Edge.N2M.value))


def turns_of(schedule: Schedule) -> dict[TransferKey, tuple[int, int]]:
    """How many transfers go before each on its sending and on its receiving port, where those are in order."""
    if not schedule.ports_in_order:
        return {}
    places: dict[Kind, dict[TransferKey, int]] = {Kind.SEND: {}, Kind.RECV: {}}
    for actions in schedule.actions.values():
        for kind, turns in places.items():
            mine = [action for action in actions if action.kind is kind and action.edge not in (None, Edge.LANE)]
            for turn, (_, layer, micro_batch, edge, gradient) in enumerate(mine):
                assert edge is not None, "a transfer names its edge"
                turns[TransferKey(edge.value, gradient, layer, micro_batch)] = turn
    return {key: (turn, places[Kind.RECV][key]) for key, turn in places[Kind.SEND].items()}


class SleepingWorker:
    """Stages that take their time and make the smallest messages that do."""

    def __init__(self, schedule: Schedule, role: Role, times: Times) -> None:
        self.schedule, self.role, self.times = schedule, role, times
        self.again = redispatched(schedule) if role.group.side is Side.F else frozenset()
        self.activations = Activations()
        self.ended = 0.0

    def run(self, action: Action, received: Received, emit: Emit) -> None:
        """See ``runtime.executor.Worker``."""
        end = time.monotonic() + self.times.compute(self.role, action)
        kind, layer, micro_batch = action[:3]
        again = (layer, micro_batch) in self.again
        if kind is Kind.F or (again and kind in (Kind.B, Kind.I)):
            self.activations.begin(layer, micro_batch)
        sleep_until(end)
        for port in outputs(self.role.group.side, kind, layer, num_layers=self.times.num_layers):
            emit(port, [Message(torch.zeros(0, dtype=torch.int64), (torch.zeros(1, 64),))])
        if kind in (Kind.B, Kind.W) or (kind is Kind.F and (again or self.schedule.forward_only)):
            self.activations.end(layer, micro_batch)
        self.ended = time.monotonic()


def _run_case(case: dict[str, Any], settings: dict[str, Any]) -> list[float] | None:
    """Seconds of each repeat, on rank 0; every rank of the world takes part."""
    schedule = load(case["schedule"])
    topology = Topology(schedule.placement, 1, 1, 1, redispatch=bool(redispatched(schedule)))
    channels = channel_specs(topology)
    inner = TorchTransport(channels, device=torch.device("cpu"), timeout_seconds=_TIMEOUT_SECONDS)
    rank = dist.get_rank()
    if rank >= topology.world_size:  # a case of fewer ranks
        for _ in range(settings["repeats"] + 1):
            dist.barrier()
            _gather(0.0, 0.0)
        inner.close()
        return None
    role = topology.role(rank)
    numbers = {group: number for number, group in enumerate(schedule.placement.groups)}
    costs = StageCosts(**case["costs"])
    times = Times(costs, schedule.placement.num_layers, settings["unit_seconds"])
    transport = PortTransport(
        inner,
        Path(settings["ports"]),
        group=numbers[role.group],
        group_of_rank=lambda other: numbers[topology.role(other).group],
        seconds=lambda key: times.transfer(key),
        turns=turns_of(schedule).get,
    )
    spec = MessageSpec(0, (_ROWS,))
    specs = EdgeSpecs({(edge, gradient): spec for edge in Edge for gradient in (False, True)})
    recorder: Recorder = NullRecorder()
    if settings["traces"] is not None:
        recorder = TraceRecorder(rank, role.group, Path(settings["traces"]) / case["name"])
    executor = Executor(Links(topology, role, transport, specs, recorder), recorder)
    seconds = []
    for repeat in range(settings["repeats"] + 1):
        times.unit = settings["unit_seconds"] if repeat else 0.0  # the first opens the connections
        transport.run = f"{case['name']} {repeat}"
        worker = SleepingWorker(schedule, role, times)
        dist.barrier()
        start, begun = time.monotonic(), time.perf_counter_ns()
        executor.run(schedule, worker)
        if repeat:
            recorder.step(repeat, begun, time.perf_counter_ns())
        seconds.append(_gather(start, worker.ended))
    recorder.close()
    transport.close()
    return seconds[1:] if rank == 0 else None


def _gather(start: float, end: float) -> float:
    """From the first start to the last end over the ranks that took part; one machine, so one clock."""
    mine = torch.tensor([start, end], dtype=torch.float64)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    spans = [pair.tolist() for pair in found if pair[1] > 0]
    return max(end for _, end in spans) - min(start for start, _ in spans)


def main() -> None:
    """Run every case and write rank 0's times."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {case["name"]: _run_case(case, settings) for case in settings["cases"]}
    if dist.get_rank() == 0:
        Path(settings["results"]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
