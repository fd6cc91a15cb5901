"""The package ``nixl``: imported late, since it is optional, and set up for how we use it."""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

#: Settings of UCX for TCP where the environment says nothing: reads of a ready socket a round, and socket buffers.
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


def nixl_errors() -> tuple[type[Exception], ...]:
    """What its functions raise."""
    bindings = importlib.import_module("nixl._bindings")
    return tuple(getattr(bindings, name) for name in dir(bindings) if name.endswith("Error"))
