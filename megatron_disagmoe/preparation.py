"""Makes Megatron ready for this machine and for the AF flags, once, whoever starts a training run.

Cheap to import: a patched checkout imports it, by ``hook``, in every program.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

_begun = False


def begun() -> bool:
    """Whether somebody (the launcher, a hook, one of our commands) has begun already."""
    return _begun


def prepare(arguments: Sequence[str]) -> list[str]:
    """Make Megatron ready for this machine and for the AF flags; the flags to run with.

    ``arguments`` are the flags without the script. Everything that must happen before the first import of
    Megatron happens here, so call it before that, with ``sys.path`` as the script will see it.
    ``ValueError`` for what the user can mend, ``SeamGone`` for a Megatron whose parts are not where they should be.
    """
    added = make_ready(arguments)
    from megatron_disagmoe.training import install

    if added and os.environ.get("RANK", "0") == "0":
        print(f"disagmoe: no CUDA device, so Megatron runs on the CPU, with {' '.join(added)}", flush=True)
    flags = [*arguments, *added]
    install.install_plugin(flags)
    return flags


def make_ready(arguments: Sequence[str]) -> list[str]:
    """The part of ``prepare`` that Megatron needs to be imported here at all; the flags that this machine needs too."""
    global _begun
    _begun = True
    from megatron_disagmoe import cpu

    added = cpu.flags(arguments) if cpu.is_needed() else []
    cpu.install_if_needed()

    from megatron_disagmoe import megatron_seams, upstream_fixes

    megatron_seams.check_version()
    upstream_fixes.install()
    return added
