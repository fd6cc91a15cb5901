"""The AF-pipe group of flags: what they are, what they ask for, what is wrong with them.

Works on a parsed namespace and imports neither torch nor Megatron. Every check returns a message with the numbers and
the remedy, so that the launcher and ``disagmoe check`` say the same thing.
"""

from __future__ import annotations

from megatron_disagmoe.arguments.checks import check
from megatron_disagmoe.arguments.flags import add_arguments, settle
from megatron_disagmoe.arguments.sizes import ffn_node_size, layout, placement, schedule_choice, topology

__all__ = ["add_arguments", "check", "ffn_node_size", "layout", "placement", "schedule_choice", "settle", "topology"]
