"""``megatron_disagmoe.gpt_task`` in which rank ``$DIES`` is killed in the middle of a step of the pipe."""

from __future__ import annotations

import os
import signal
from typing import Any

from megatron_disagmoe import gpt_task
from megatron_disagmoe.runtime import workers

#: Of two layers and four micro-batches: in the second step, with transfers under way both ways.
ACTIONS_TO_LIVE = 21


def dying(run: Any) -> Any:
    """``run`` of a worker that gets no further than the n-th action."""
    actions = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal actions
        actions += 1
        if actions == ACTIONS_TO_LIVE:
            print("dying now", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args, **options)

    return counted


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ["DIES"]:
        for worker in (workers.AttentionWorker, workers.ExpertWorker):
            worker.run = dying(worker.run)  # type: ignore[method-assign]
    gpt_task.train()
