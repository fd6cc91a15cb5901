"""Hooks AF-pipe into Megatron's training program, without a change to the user's script.

``install_plugin`` adds the flags always; everything else acts only where ``--af-pipe`` is among them, and only
through symbols registered in ``seam_records``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from megatron_disagmoe import megatron_seams
from megatron_disagmoe.errors import bad_input_ends_the_job, exit_with_message
from megatron_disagmoe.parity import step_values
from megatron_disagmoe.training import command_line

_TRAINING = "megatron.training.training"


def install_plugin(flags: Sequence[str]) -> None:
    """Hook into the imported Megatron; ``flags`` are those of the training program.

    Calling it again does nothing.
    """
    if megatron_seams.is_patched("megatron.training.arguments:add_megatron_arguments"):
        return
    megatron_seams.wrap(
        "megatron.training.arguments:add_megatron_arguments",
        lambda original: command_line.with_af_arguments(original, exit_with_message),
    )
    megatron_seams.wrap("megatron.training.arguments:validate_args", _validating_af)
    step_values.record_if_asked()
    if "--af-pipe" in flags:
        _install_af_pipe()


def _validating_af(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_args(args: argparse.Namespace, defaults: dict[str, Any] | None = None) -> argparse.Namespace:
        with bad_input_ends_the_job():
            return command_line.validate(original, args, defaults)

    return validate_args


def _install_af_pipe() -> None:
    from megatron_disagmoe.training import (
        checkpoint,
        forward_backward,
        loaders,
        metrics,
        optimizer,
        process_groups,
        reports,
        split_linear,
    )

    megatron_seams.wrap("megatron.core.parallel_state:initialize_model_parallel", process_groups.replacing)
    megatron_seams.patch("megatron.training.models.gpt:GPTModelConfig.builder", process_groups.MODEL_BUILDER)
    megatron_seams.patch(f"{_TRAINING}:get_forward_backward_func", forward_backward.get_forward_backward_func)
    megatron_seams.wrap(f"{_TRAINING}:get_megatron_optimizer", optimizer.unified)
    megatron_seams.wrap(f"{_TRAINING}:setup_model_and_optimizer", reports.announcing)
    megatron_seams.wrap(f"{_TRAINING}:build_pretraining_data_loader", loaders.without_workers_on_ffn_ranks)
    metrics.install()
    split_linear.install()
    checkpoint.install()
