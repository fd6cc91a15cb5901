"""One rank of ``disagmoe bench transport``: measures every stream in its world; rank 0 writes the rows.

    python -m megatron_disagmoe.benchmarks.transport_worker '{"attention_ranks": 1, ...}'
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_disagmoe.benchmarks.gloo_streams import AllToAll, PointToPoint
from megatron_disagmoe.benchmarks.hosts import INTERFACE, Counters
from megatron_disagmoe.benchmarks.transport_streams import AHEAD, DispatchStream, ModeChannels, Stream
from megatron_disagmoe.transport import TRANSPORTS, create_transport
from megatron_disagmoe.transport.dispatch import DISPATCH_MODES, Dispatcher, create_dispatcher

#: Side of the matrices of the compute loop: a multiplication takes some 0.2 ms on one core.
_MATRIX = 192


class Worker:
    """Measures one stream after the other.

    Args:
        settings: see ``transport.Settings`` (as a dict), with the world's sizes and link.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.rank = dist.get_rank()
        self.m, self.n = settings["attention_ranks"], settings["ffn_ranks"]
        self.is_attention = self.rank < self.m
        self.shaped = settings["link_gbit_per_s"] is not None
        self._left, self._right, self._product = (torch.rand(_MATRIX, _MATRIX) for _ in range(3))

    def streams(self) -> Iterator[Stream]:
        """Each stream, ready; it may be used until the next one is asked for."""
        s = self.settings
        dispatchers = [self._dispatcher(mode) for mode in DISPATCH_MODES]
        generator = torch.Generator().manual_seed(self.rank)
        tokens = torch.randn(s["tokens"], s["hidden_size"], generator=generator)
        chosen = torch.rand(s["tokens"], s["experts"], generator=generator).topk(s["topk"], dim=1).indices
        routing_map = torch.zeros(s["tokens"], s["experts"], dtype=torch.bool).scatter(1, chosen, True)
        for name in TRANSPORTS:
            channels = [channel for dispatcher in dispatchers for channel in ModeChannels(dispatcher).all]
            transport = create_transport(name, channels, device=torch.device("cpu"), timeout_seconds=60)
            for dispatcher in dispatchers:
                yield DispatchStream(name, transport, dispatcher, tokens, routing_map)
            transport.flush()
            transport.close()
        peers = range(self.m, self.m + self.n) if self.is_attention else range(self.m)
        yield PointToPoint(peers, s["raw_bytes"])
        yield AllToAll(peers, s["raw_bytes"])

    def _dispatcher(self, mode: str) -> Dispatcher:
        s = self.settings
        return create_dispatcher(
            mode,
            num_tokens=s["tokens"],
            hidden_size=s["hidden_size"],
            num_experts=s["experts"],
            topk=s["topk"],
            num_attention_ranks=self.m,
            num_ffn_ranks=self.n,
            dtype=torch.float32,
            probs_dtype=torch.float32,
            ranks_per_node=self.n,
        )

    def measure(self, stream: Stream) -> dict[str, Any] | None:
        """The row of one stream; None but on rank 0."""
        count = self._count(stream)
        stream.run(AHEAD)  # buffers, connections
        repeats = [self._time(stream, count) for _ in range(self.settings["repeats"])]
        overlap = self._overlap(stream)
        if self.rank != 0:
            return None
        row = {
            "transport": stream.transport,
            "dispatch": stream.dispatch,
            "attention_ranks": self.m,
            "ffn_ranks": self.n,
            "link_gbit_per_s": self.settings["link_gbit_per_s"],
            "micro_batches": count,
            **_summary(repeats, self.settings["link_gbit_per_s"]),
            **overlap,
        }
        return row

    def _count(self, stream: Stream) -> int:
        """Micro-batches such that a timing lasts about ``seconds`` on the link (as if of 8 Gbit/s, without a limit)."""
        before = stream.sent().payload
        stream.run(1)
        mine = torch.tensor([stream.sent().payload - before, 0])
        if not self.is_attention:
            mine = mine.flip(0)
        dist.all_reduce(mine)
        rate = (self.settings["link_gbit_per_s"] or 8.0) * 1e9 / 8
        return max(2 * AHEAD, math.ceil(self.settings["seconds"] * rate / int(mine.max())))

    def _time(self, stream: Stream, count: int) -> dict[str, Any]:
        """One timing, as rank 0 sees it: times of all ranks, what each side sent, what the link carried."""
        before, wire = stream.sent(), _interface() if self.shaped else None
        dist.barrier()
        start = time.perf_counter_ns()
        stream.run(count)
        end = time.perf_counter_ns()
        after = stream.sent()
        mine = (start, end, after.payload - before.payload, after.hidden_rows - before.hidden_rows)
        gathered: list[tuple[int, int, int, int]] = [mine] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        passed = _interface() - wire if wire is not None else None
        return {
            "seconds": (max(g[1] for g in gathered) - min(g[0] for g in gathered)) / 1e9,
            "forward": sum(g[2] for g in gathered[: self.m]),
            "reverse": sum(g[2] for g in gathered[self.m :]),
            "rows": sum(g[3] for g in gathered[: self.m]) / count,
            "count": count,
            "wire": passed,
        }

    def _overlap(self, stream: Stream) -> dict[str, Any]:
        """How much a compute loop of rank 0 slows while messages travel both ways, and how much of them it hides.

        Messages alone, loop alone and both take turns; the fastest of each is compared, since whatever else runs on
        this machine only adds. The loop is shorter than the messages, so that they are under way all of its time.
        """
        count = AHEAD - 1
        alone = min(self._start_and_finish(stream, count, 0)[1] for _ in range(2))
        products = torch.tensor([int(0.9 * alone / self._one_product())])
        dist.broadcast(products, 0)
        mine = int(products) if self.rank == 0 else 0
        transfers, loops, both = [], [], []
        for _ in range(self.settings["overlap_repeats"]):
            transfers.append(self._start_and_finish(stream, count, 0)[1])
            loops.append(self._start_and_finish(stream, 0, mine)[0])
            both.append(self._start_and_finish(stream, count, mine))
        transfer, loop, together = min(transfers), min(loops), min(total for _, total in both)
        return {
            "transfer_ms": 1e3 * transfer,
            "compute_slowdown": min(busy for busy, _ in both) / loop - 1 if loop else 0.0,
            "overlap": (transfer + loop - together) / min(transfer, loop) if loop else 0.0,
        }

    def _start_and_finish(self, stream: Stream, count: int, products: int) -> tuple[float, float]:
        """Seconds this rank computed and seconds in all, with ``count`` micro-batches under way meanwhile."""
        dist.barrier()
        start = time.perf_counter()
        stream.start(count)
        computing = time.perf_counter()
        self._compute(products)
        computed = time.perf_counter()
        stream.finish()
        return computed - computing, time.perf_counter() - start

    def _compute(self, products: int) -> None:
        for _ in range(products):
            torch.mm(self._left, self._right, out=self._product)

    def _one_product(self) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self._compute(20)
            times.append((time.perf_counter() - start) / 20)
        return min(times)


def _summary(repeats: list[dict[str, Any]], link: float | None) -> dict[str, Any]:
    """Medians over the timings; rates in Gbit/s of payload, fractions of the link (None where it has no limit)."""
    seconds = median(r["seconds"] for r in repeats)
    forward, reverse = (median(r[way] * 8 / r["seconds"] / 1e9 for r in repeats) for way in ("forward", "reverse"))
    first = repeats[0]
    return {
        "seconds": seconds,
        "micro_batch_ms": 1e3 * seconds / first["count"],
        "forward_bytes": first["forward"] // first["count"],
        "reverse_bytes": first["reverse"] // first["count"],
        "hidden_rows": first["rows"],
        "forward_gbit_per_s": forward,
        "reverse_gbit_per_s": reverse,
        "forward_fraction": forward / link if link else None,
        "reverse_fraction": reverse / link if link else None,
        "bytes_on_wire": first["wire"].sent + first["wire"].received if first["wire"] else None,
        "payload_bytes": first["forward"] + first["reverse"],
        "slowest_seconds": max(r["seconds"] for r in repeats),
        "fastest_seconds": min(r["seconds"] for r in repeats),
    }


def _interface() -> Counters:
    """What this host's interface has carried (``/proc/net`` is that of the process's own namespace)."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == INTERFACE:
            columns = numbers.split()
            return Counters(sent=int(columns[8]), received=int(columns[0]))
    raise ValueError(f"no interface {INTERFACE} here")


def main() -> None:
    """Entry of a rank."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    worker = Worker(settings)
    rows = []
    with torch.no_grad():
        for stream in worker.streams():
            row = worker.measure(stream)
            if row is not None:
                rows.append(row)
                print(json.dumps(row), flush=True)
    if worker.rank == 0:
        Path(settings["out"]).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
