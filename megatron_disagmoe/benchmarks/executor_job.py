"""A training run that meters what the executor costs beyond Megatron's modules; started by ``benchmarks.executor``.

The processor time of its thread goes into two buckets: *modules* (stages, dispatch arithmetic, autograd, the loss,
drawing a batch) and *ours* (interpreting, messages, the transport). Waiting costs no processor time. Reading the
thread's clock does, more than much of what is measured (a system call, up to 6 us here); it goes into neither.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Where each rank writes ``rank<N>.json``.
ENVIRONMENT = "DISAGMOE_EXECUTOR_METER"
#: Steps before the meter counts: connections open, memory is first touched.
WARM_UP_STEPS = 3

_OURS, _MODULES, _OFF = "ours", "modules", "off"


class Meter:
    """Processor time of this thread by bucket; one bucket at a time."""

    def __init__(self) -> None:
        self.seconds = {_OURS: 0.0, _MODULES: 0.0, _OFF: 0.0}
        self._bucket = _OFF
        self._since = time.thread_time()

    def switch(self, bucket: str) -> str:
        """From now on time goes into ``bucket``; the one before is returned."""
        now = time.thread_time()
        self.seconds[self._bucket] += now - self._since
        before, self._bucket = self._bucket, bucket
        self._since = time.thread_time()
        return before

    def metered(self, bucket: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time goes into ``bucket``."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.switch(bucket)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(before)

        return call


def install() -> None:
    """Meter every later step of this process; each writes what it cost."""
    import torch

    from megatron_disagmoe.model.stages import AttentionStages, ExpertStages
    from megatron_disagmoe.runtime.executor import Executor
    from megatron_disagmoe.runtime.links import Links
    from megatron_disagmoe.runtime.weight_gradients import WeightGradients
    from megatron_disagmoe.schedules.dataflow import COMPUTE
    from megatron_disagmoe.training.batches import BatchFeed
    from megatron_disagmoe.training.forward_backward import _Step

    meter = Meter()
    for owner, name, bucket in (
        (AttentionStages, "forward", _MODULES),
        (AttentionStages, "tail", _MODULES),
        (ExpertStages, "forward", _MODULES),
        (WeightGradients, "compute", _MODULES),
        (_Step, "loss", _MODULES),
        (BatchFeed, "_draw", _MODULES),
        (torch.autograd, "backward", _MODULES),
        (Links, "send", _OURS),  # called from within a stage
    ):
        setattr(owner, name, meter.metered(bucket, getattr(owner, name)))
    run = Executor.run
    steps: list[dict[str, Any]] = []
    path = Path(os.environ[ENVIRONMENT]) / f"rank{os.environ['RANK']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def metered_run(self: Executor, schedule: Any, worker: Any) -> None:
        if schedule.forward_only:
            run(self, schedule, worker)
            return
        meter.seconds = dict.fromkeys(meter.seconds, 0.0)
        meter.metered(_OURS, run)(self, schedule, worker)
        actions = schedule.actions[self.links.role.group]
        computes = sum(action.kind in COMPUTE for action in actions)
        steps.append({"actions": len(actions), "compute_actions": computes, **meter.seconds})
        path.write_text(json.dumps({"group": str(self.links.role.group), "steps": steps[WARM_UP_STEPS:]}))

    Executor.run = metered_run  # type: ignore[method-assign]


def main() -> None:
    """What the generated script calls: train as ``megatron_disagmoe.pretrain_gpt`` does, metered."""
    from megatron_disagmoe import gpt_task

    install()
    gpt_task.train()
