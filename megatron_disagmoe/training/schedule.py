"""The schedule of a step: built once for each number of micro-batches, verified before the first action runs."""

from __future__ import annotations

import functools

from megatron.training import get_args

from megatron_disagmoe import parallel_state
from megatron_disagmoe.builders.sequential import sequential
from megatron_disagmoe.schedules.actions import Schedule
from megatron_disagmoe.schedules.lowering import lowered


@functools.cache
def schedule_for(num_micro_batches: int, *, forward_only: bool) -> Schedule:
    """This run's schedule for ``num_micro_batches``, with its transfers.

    Every rank builds the same one from the same flags.
    """
    args = get_args()
    return lowered(
        sequential(
            parallel_state.state().topology.placement, num_micro_batches=num_micro_batches, forward_only=forward_only
        )
    )
