"""The package ``nixl``: imported late, since it is optional, and set up for how we use it."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from typing import Any

#: Settings of UCX for TCP where the environment says nothing: reads of a ready socket a round, and socket buffers.
#: What a socket has taken waits in the network's queue, and acknowledgements and notes wait behind it: on a slow link a
#: smaller send buffer is better, but at 1 Gbit/s it costs throughput (docs/transport.md).
_UCX_DEFAULTS = {"UCX_TCP_MAX_POLL": "128", "UCX_TCP_SNDBUF": "2m", "UCX_TCP_RCVBUF": "2m"}


def import_nixl() -> Any:
    """The module with NIXL's Python API.

    Raises:
        ValueError: where the package is missing.
    """
    try:
        api = importlib.import_module("nixl._api")
    except ImportError as error:
        raise ValueError(
            "--af-transport nixl needs the package 'nixl': pip install 'megatron-disagmoe[nixl]', "
            "or choose --af-transport torch"
        ) from error
    logging.getLogger("nixl").setLevel(logging.WARNING)  # it logs to standard output
    for name, value in _UCX_DEFAULTS.items():
        os.environ.setdefault(name, value)
    return api


#: Microseconds that NIXL's progress thread sleeps at most; it wakes up whenever something arrives or can leave.
_SLEEP_MICROSECONDS = 20_000
_PATCHING = threading.Lock()


def open_agent(name: str) -> Any:
    """A NIXL agent with the UCX back end, whose progress thread sleeps while there is nothing to do.

    The Python API asks for a thread that never sleeps (``pthrDelay`` 0), which takes a core.
    It has no argument for that, so its configuration is replaced while it makes the agent.

    Raises:
        ValueError: where the package is missing.
        RuntimeError: where this version of it has no such configuration.
    """
    api = import_nixl()
    bindings = importlib.import_module("nixl._bindings")
    original = bindings.nixlAgentConfig
    if not hasattr(original, "pthrDelay") or getattr(api, "nixlBind", None) is not bindings:
        raise RuntimeError("this version of nixl has no nixl._bindings.nixlAgentConfig.pthrDelay; use the pinned one")
    made = []

    class Sleeping(original):  # type: ignore[misc,valid-type]  # a class of the bindings, known when it runs
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

        def __setattr__(self, attribute: str, value: Any) -> None:
            super().__setattr__(attribute, _SLEEP_MICROSECONDS if attribute == "pthrDelay" else value)

    with _PATCHING:
        bindings.nixlAgentConfig = Sleeping
        try:
            agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=True, backends=["UCX"]))
        finally:
            bindings.nixlAgentConfig = original
    if len(made) != 1:
        raise RuntimeError("this version of nixl does not take its settings from nixlAgentConfig; use the pinned one")
    return agent


def nixl_errors() -> tuple[type[Exception], ...]:
    """What its functions raise."""
    bindings = importlib.import_module("nixl._bindings")
    return tuple(getattr(bindings, name) for name in dir(bindings) if name.endswith("Error"))
