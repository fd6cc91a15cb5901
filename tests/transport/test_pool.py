"""Buffers of the pool come back by themselves."""

from __future__ import annotations

import torch

from megatron_disagmoe.transport.pool import HostPool


def test_a_buffer_comes_back_when_the_last_view_is_gone() -> None:
    pool = HostPool()
    buffer = pool.take(64)
    where = buffer.data_ptr()
    view = buffer.view(torch.float32)[4:]
    numbers = torch.frombuffer(buffer.numpy(), dtype=torch.int64, count=2, offset=8)
    del buffer
    assert pool.take(64).data_ptr() != where
    del view
    assert pool.take(64).data_ptr() != where
    del numbers
    assert pool.take(64).data_ptr() == where


def test_sizes_are_apart() -> None:
    pool = HostPool()
    where = pool.take(64).data_ptr()
    assert pool.take(128).numel() == 128
    again = pool.take(64)
    assert (again.data_ptr(), again.numel()) == (where, 64)
