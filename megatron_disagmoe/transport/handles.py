"""What the back ends' posted receives and errors have in common."""

from __future__ import annotations

from abc import abstractmethod

from megatron_disagmoe.transport.base import Message, RecvHandle, TransportError, TransportTimeout
from megatron_disagmoe.transport.wire import Where


class PostedRecv(RecvHandle):
    """One posted receive; ``where`` begins its errors."""

    def __init__(self, where: Where) -> None:
        self.where = where
        self.error: TransportError | None = None
        self.message: Message | None = None

    def wait(self) -> Message:
        if self.message is None:
            self.message = self._complete()
        return self.message

    @abstractmethod
    def _complete(self) -> Message:
        """Wait for the whole message."""


def nothing_came(where: Where, seconds: float, expected: int, *, at_most: bool = True) -> TransportTimeout:
    """A receive's wait is over; ``expected`` bytes, or at most so many while their number is not known."""
    return TransportTimeout(
        f"{where}: nothing came within {seconds:g} s (--af-timeout-seconds); "
        f"expected {'up to ' if at_most else ''}{expected} bytes, had 0"
    )


def not_taken(where: Where, seconds: float, size: int) -> TransportTimeout:
    """A send's wait is over."""
    return TransportTimeout(
        f"{where}: not taken within {seconds:g} s (--af-timeout-seconds); "
        f"expected the peer to receive {size} bytes, had no sign of it"
    )


def lost(where: Where, size: int, reason: object) -> TransportError:
    """The connection is gone: while receiving up to ``size`` bytes, or while sending ``size``."""
    expected = (
        f"expected up to {size} bytes, had 0"
        if where.receiving
        else f"expected the peer to receive {size} bytes, had no sign of it"
    )
    return TransportError(f"{where}: the connection was lost; {expected} ({reason})")
