"""Buffers of the pool come back by themselves; what is counted is new memory, since an allocator reuses addresses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_disagmoe.transport.pool import HostPool


def test_a_buffer_comes_back_when_the_last_view_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = np.empty

    def counted(size: int, dtype: type[np.uint8]) -> np.ndarray:
        made.append(size)
        return empty(size, dtype)

    monkeypatch.setattr("megatron_disagmoe.transport.pool.np.empty", counted)
    pool = HostPool()
    buffer = pool.take(64)
    view = buffer.view(torch.float32)[4:]
    numbers = torch.frombuffer(buffer.numpy(), dtype=torch.int64, count=2, offset=8)
    rider = torch.from_numpy(np.ndarray((2, 3), np.float32, buffer.numpy(), 8))  # as Layout.unpack makes them
    del buffer, view
    second = pool.take(64)
    assert made == [64, 64]  # the first is still in use
    del numbers, second
    third, fourth = pool.take(64), pool.take(64)
    assert made == [64, 64, 64]  # only the second was back
    del rider, third, fourth
    held = [pool.take(64) for _ in range(3)]
    assert made == [64, 64, 64]  # all are back
    assert len({each.data_ptr() for each in held}) == 3
    pool.take(128)
    assert made == [64, 64, 64, 128]
