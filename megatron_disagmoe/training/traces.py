"""This rank's trace recorder (``--af-trace-dir``)."""

from __future__ import annotations

import functools

from megatron.training import get_args

from megatron_disagmoe import parallel_state
from megatron_disagmoe.tracing.recorder import NullRecorder, Recorder, TraceRecorder


@functools.cache
def recorder() -> Recorder:
    """A ``TraceRecorder`` where traces were asked for, else one that keeps nothing."""
    args = get_args()
    if args.af_trace_dir is None:
        return NullRecorder()
    role = parallel_state.state().role
    return TraceRecorder(args.rank, role.group, args.af_trace_dir, replica=role.replica)
