"""Trains a plain GPT; the last rank is killed in its second save, when its own file has been written."""

from __future__ import annotations

import os
import signal
from typing import Any

from megatron.core.dist_checkpointing.strategies import async_utils

from megatron_disagmoe import gpt_task

_saves = 0
_save = async_utils.AsyncRequest.execute_sync


def execute_sync(self: Any) -> None:
    global _saves
    _saves += 1
    if _saves == 2 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        self.async_fn(self.async_fn_args[0], self.preload_fn(), self.async_fn_args[2])
        os.kill(os.getpid(), signal.SIGKILL)
    _save(self)


if __name__ == "__main__":
    async_utils.AsyncRequest.execute_sync = execute_sync
    gpt_task.train()
