"""What a rank says before it ends because another one is gone: one line, with who waited for what."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from megatron_disagmoe.transport import TransportError

_handler: Callable[..., None] | None = None


def say(rank: int, role: object, text: str) -> None:
    """One line on standard error, whole even where several ranks share it."""
    sys.stderr.flush()
    os.write(sys.stderr.fileno(), f"disagmoe: rank {rank} ({role}): {text}\n".encode())


@contextlib.contextmanager
def on_lost_peer(rank: int, role: object) -> Iterator[None]:
    """Within: a transfer that fails ends this process with exit code 1 and what the transport says of it.

    The stack of the wait would say less than that.
    """
    try:
        yield
    except TransportError as error:
        if signal.getsignal(signal.SIGTERM) is _handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        say(rank, role, str(error))
        raise SystemExit(1) from None


def on_error(rank: int, role: object, doing: Callable[[], str]) -> None:
    """From now on an exception that nobody catches is followed by a line that says whose it is and when."""
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        show(kind, error, trace)
        say(rank, role, f"{kind.__name__} {doing()}: {error}")

    sys.excepthook = hook


def on_sigterm(rank: int, role: object, doing: Callable[[], str]) -> None:
    """From now on SIGTERM, by which a launcher ends the ranks that outlive another, makes this one say what it does.

    Afterwards the signal has the effect that it has without this. Another handler (``--exit-signal-handler``) stays.
    """
    global _handler
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    process = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() == process:  # not in a child that it has forked
            say(rank, role, f"ended from outside (SIGTERM) {doing()}")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    _handler = handle
    signal.signal(signal.SIGTERM, handle)
