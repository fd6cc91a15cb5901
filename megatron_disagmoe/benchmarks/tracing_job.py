"""A training run whose trace recorder is on in every other step; started by ``benchmarks.tracing``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

#: Where each rank writes ``rank<N>.json``.
ENVIRONMENT = "DISAGMOE_TRACING_STEPS"
#: Steps that do not count: connections open, memory is first touched.
WARM_UP_STEPS = 4


def modes() -> Iterator[bool]:
    """Whether a step is traced: on, off, off, on, so that a machine that gets slower or faster favours neither."""
    for number in count():
        yield number % 4 in (0, 3)


def install() -> None:
    """Switch the recorder from step to step, and note how long each step took, until the next one began."""
    from megatron_disagmoe.runtime.executor import Executor
    from megatron_disagmoe.tracing.recorder import TraceRecorder

    run, step = Executor.run, TraceRecorder.step
    begun: list[tuple[bool, float, float]] = []
    steps: list[dict[str, Any]] = []
    mode = modes()
    path = Path(os.environ[ENVIRONMENT]) / f"rank{os.environ['RANK']}.json"

    def switched(self: Executor, schedule: Any, worker: Any) -> None:
        if begun:
            traced, wall, processor = begun.pop()
            ended = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
            steps.append({"traced": traced, **ended})
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"group": str(self.links.role.group), "steps": steps[WARM_UP_STEPS:]}))
        TraceRecorder.enabled = not schedule.forward_only and next(mode)
        if not schedule.forward_only:
            begun.append((TraceRecorder.enabled, time.perf_counter(), time.process_time()))
        run(self, schedule, worker)

    def only_if_enabled(self: TraceRecorder, iteration: int, start_ns: int, end_ns: int) -> None:
        if self.enabled:
            step(self, iteration, start_ns, end_ns)

    Executor.run = switched  # type: ignore[method-assign]
    TraceRecorder.step = only_if_enabled  # type: ignore[method-assign]


def main() -> None:
    """What the generated script calls: train as ``megatron_disagmoe.pretrain_gpt`` does."""
    from megatron_disagmoe import gpt_task

    install()
    gpt_task.train()
