"""Payloads of the ``nixl`` transport on their way out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from megatron_disagmoe.transport.nixl_agent import Agent
from megatron_disagmoe.transport.nixl_messages import SendState
from megatron_disagmoe.transport.nixl_protocol import DATA, envelope


class Writes:
    """Writes each payload once its receiver has offered a slot, and says so when it is there.

    The transport's lock is held in every method.

    Args:
        agent: what moves the bytes.
        failed: called with a payload that cannot be delivered, and why.
    """

    def __init__(self, agent: Agent, failed: Callable[[SendState, Exception], None]) -> None:
        self._agent, self._failed = agent, failed
        self._queued: deque[SendState] = deque()
        self._active: deque[SendState] = deque()

    @property
    def pending(self) -> list[SendState]:
        """What is not delivered yet: that under way first."""
        return [*self._active, *self._queued]

    def add(self, state: SendState) -> None:
        """Take over a payload, packed into ``state.slot``; it leaves at once where its receiver has offered a slot."""
        self._try(state, self._start)

    def progress(self) -> None:
        """End and begin whatever can be."""
        for _ in range(len(self._active)):
            self._try(self._active.popleft(), self._finish)
        for _ in range(len(self._queued)):
            self._try(self._queued.popleft(), self._start)

    def drop(self) -> None:
        """Forget everything."""
        self._active.clear()
        self._queued.clear()

    def _try(self, state: SendState, step: Callable[[SendState], None]) -> None:
        try:
            step(state)
        except self._agent.errors as error:
            self._failed(state, error)

    def _start(self, state: SendState) -> None:
        offer = state.pair.offers.get(state.sequence)
        ready = state.ready is None or state.ready.query()
        if offer is None or offer.capacity < state.size or not ready:
            self._queued.append(state)
            return
        del state.pair.offers[state.sequence]
        assert state.slot is not None, "a payload of no bytes is not written"
        state.handle = self._agent.write(state.pair.peer, state.slot, state.size, offer)
        self._finish(state)

    def _finish(self, state: SendState) -> None:
        if not self._agent.is_written(state.handle):
            self._active.append(state)
            return
        pair = state.pair
        self._agent.say(pair.peer, envelope(DATA, pair.number, state.sequence))
        assert state.slot is not None, "it was written from"
        self._agent.sending.give(state.slot)
        state.slot, state.handle, state.done = None, None, True
