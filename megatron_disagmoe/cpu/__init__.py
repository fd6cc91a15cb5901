"""What lets Megatron run without a GPU: stand-ins for ``torch.cuda``, patches of Megatron, and flags.

Nothing here happens where CUDA is present. ``torch.cuda.is_available()`` stays ``False``: code that asks keeps its
own CPU branch, and only the calls Megatron makes without asking are answered. See ``docs/cpu.md``.
"""

from __future__ import annotations

import torch

from megatron_disagmoe.cpu.flags import flags

__all__ = ["flags", "install_if_needed", "is_needed"]

_installed = False


def is_needed() -> bool:
    """Whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


def install_if_needed() -> bool:
    """Apply everything once, in the order it must be: torch's stand-ins before Megatron is first imported.

    Returns whether this process runs on the CPU. Raises ``SeamGone`` where a symbol of torch or Megatron that is
    replaced is not there.
    """
    global _installed
    if not is_needed():
        return False
    if not _installed:
        from megatron_disagmoe.cpu import torch_stand_ins

        torch_stand_ins.install()
        from megatron_disagmoe.cpu import megatron_patches

        megatron_patches.install()
        _installed = True
    return True
