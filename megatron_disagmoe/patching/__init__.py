"""Apply our patches to a Megatron-LM checkout, and take them back: all or nothing, byte for byte.

``index`` reads what is in ``patches/``; ``diffs`` computes patched contents; ``git_state`` knows what is committed;
``checkout`` puts them together into ``inspect``, ``apply`` and ``revert``. Neither torch nor Megatron is imported.
"""

from __future__ import annotations

from megatron_disagmoe.patching.checkout import Report, apply, inspect, revert

__all__ = ["Report", "apply", "inspect", "revert"]
