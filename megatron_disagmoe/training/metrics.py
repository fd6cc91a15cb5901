"""What the log says about the whole model, though each rank holds a part of it.

Megatron sums such figures over pipeline stages; here every group is a pipeline of one stage to it, so the
sum over groups is taken beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_disagmoe import megatron_seams, parallel_state
from megatron_disagmoe.training.optimizer import norm_over_groups

_ROUTER_METRICS = "megatron.core.transformer.moe.moe_logging:MoEMetricsTracker._sync_metrics"
_PARAMS_NORM = "megatron.training.training:calc_params_l2_norm"


def install() -> None:
    """Replace both."""
    megatron_seams.wrap(_ROUTER_METRICS, _over_the_column)
    megatron_seams.wrap(_PARAMS_NORM, _over_all_groups)


def _over_the_column(original: Callable[..., None]) -> Callable[..., None]:
    """Router losses, a vector with one entry a layer: each attention group has filled in its own layers."""

    def sync_metrics(self: Any, metric_names: list[str], pg_collection: Any = None) -> None:
        column = parallel_state.state().column_group
        if column is not None:
            for name in metric_names:
                if name in self.metrics:
                    dist.all_reduce(self.metrics[name].values, group=column)
        original(self, metric_names, pg_collection)

    return sync_metrics


def _over_all_groups(original: Callable[..., float]) -> Callable[..., float]:
    """The norm of all parameters (``--log-params-norm``)."""

    def calc_params_l2_norm(*args: Any, **kwargs: Any) -> float:
        return norm_over_groups(original(*args, **kwargs))

    return calc_params_l2_norm
