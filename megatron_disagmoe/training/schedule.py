"""The schedule of a step: built once for each number of micro-batches, verified before the first action runs."""

from __future__ import annotations

from megatron.training import get_args

from megatron_disagmoe import arguments, parallel_state
from megatron_disagmoe.schedule_choice import StepSchedule, step_schedule


def schedule_for(num_micro_batches: int, *, forward_only: bool) -> StepSchedule:
    """This run's schedule for ``num_micro_batches``.

    Every rank builds the same one from the same flags.
    """
    placement = parallel_state.state().topology.placement
    return step_schedule(
        arguments.schedule_choice(get_args()), placement, num_micro_batches, forward_only=forward_only
    )
