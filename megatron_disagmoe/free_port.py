"""A TCP port of this machine for a rendezvous that somebody else opens a little later."""

from __future__ import annotations

import random
import socket

#: Below the ports that the kernel gives to outgoing connections (Linux: from 32768 on), so none of those takes the port
#: between our look and its use.
_LOW, _HIGH = 20_000, 32_767
_TRIES = 200


def free_port() -> int:
    """A port that nobody listens on.

    Raises:
        OSError: none of many tried is free.
    """
    chance = random.SystemRandom()  # ranks seed the usual one alike
    for _ in range(_TRIES):
        port = chance.randint(_LOW, _HIGH)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of {_TRIES} ports tried between {_LOW} and {_HIGH} is free; end what occupies them")
