"""What a patched Megatron checkout calls, first of all, when ``megatron.core`` is imported (docs/patches.md).

It does for a script that is started without our launcher what the launcher does before it runs one. Cheap to import:
a patched checkout imports it in every program.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_disagmoe import preparation


def activate() -> None:
    """Get this process ready, unless somebody has, if its command line is that of a training run that needs it.

    To be called at the top of ``megatron/core/__init__.py``. What is prepared must come before Megatron's modules
    bind torch's names, and imports ``megatron.core`` itself: so the half-imported one is put aside, and imported
    anew, whole, within this call. Python keeps the one that is in ``sys.modules`` when the outer import ends.
    Ends the process with exit code 2 and one message where the user's flags cannot work.
    """
    if preparation.begun() or "megatron_disagmoe.cli" in sys.modules or not _is_wanted(sys.argv[1:]):
        return
    from megatron_disagmoe.errors import bad_input_ends_the_job

    del sys.modules["megatron.core"]
    with bad_input_ends_the_job():
        sys.argv[1:] = preparation.prepare(sys.argv[1:])


def _is_wanted(flags: Sequence[str]) -> bool:
    """Any of our flags, or a training run (they all need a micro-batch size) on a machine without CUDA."""
    names = {word.partition("=")[0] for word in flags}
    if any(name.startswith("--af-") for name in names):
        return True
    if "--micro-batch-size" not in names:
        return False
    from megatron_disagmoe import cpu

    return cpu.is_needed()
