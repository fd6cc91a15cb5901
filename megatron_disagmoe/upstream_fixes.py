"""Faults of Megatron 0.19 that this package would otherwise trip over, on any machine, mended from outside.

Each is guarded: where the fault cannot occur (Transformer Engine or Apex drive the optimizer, a helper can be
compiled) Megatron's own code runs unchanged. Reasons and removal plans are in ``seam_records``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_disagmoe import megatron_seams

HELPERS = "megatron.core.datasets.helpers_cpp"
COMPILE_HELPERS = "megatron.core.datasets.utils:compile_helpers"
DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def install() -> None:
    """Apply all fixes once; ``SeamGone`` where Megatron's part is not there."""
    if megatron_seams.is_patched(COMPILE_HELPERS):
        return
    fix_dataset_helpers()
    fix_distributed_optimizer()


def fix_dataset_helpers() -> None:
    """Find Megatron's C++ index builder where it is built already, and compile only where it is not.

    The wheel ships it built, without the Makefile that ``compile_helpers`` runs (and then ends the process). A
    checkout next to an installed wheel uses the wheel's, if made from the same source.
    """
    ready = _import_helpers() or _borrow_helpers_of_the_wheel()

    def make(compile_helpers: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(compile_helpers)
        def compile_unless_ready() -> None:
            if not ready:
                compile_helpers()

        return compile_unless_ready

    megatron_seams.wrap(COMPILE_HELPERS, make)
    directory = _datasets_directory()
    if not ready and not (directory / "Makefile").is_file():
        raise ValueError(
            f"Megatron's C++ dataset helper is neither built nor can it be: {directory} has no helpers_cpp*.so and "
            "no Makefile. Reinstall the wheel: pip install --force-reinstall --no-deps megatron-core==0.19.2"
        )


def _import_helpers() -> bool:
    try:
        importlib.import_module(HELPERS)
    except ModuleNotFoundError:
        return False
    return True


def _borrow_helpers_of_the_wheel() -> bool:
    try:
        wheel = Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core/datasets")))
    except importlib.metadata.PackageNotFoundError:
        return False
    source, other = _datasets_directory() / "helpers.cpp", wheel / "helpers.cpp"
    built = sorted(wheel.glob("helpers_cpp*.so"))
    if not (built and source.is_file() and other.is_file() and source.read_bytes() == other.read_bytes()):
        return False
    sys.modules[HELPERS] = _load(HELPERS, built[0])
    return True


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _datasets_directory() -> Path:
    file = importlib.import_module("megatron.core.datasets.utils").__file__
    assert file is not None
    return Path(file).resolve().parent


def fix_distributed_optimizer() -> None:
    """Make the distributed optimizer load what it saved when torch's own Adam drives it (no TE, no Apex)."""
    if megatron_seams.resolve("megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE"):
        return
    megatron_seams.wrap(f"{DISTRIBUTED_OPTIMIZER}.state_dict", _with_state_before_the_first_step)
    megatron_seams.wrap(f"{DISTRIBUTED_OPTIMIZER}._set_main_param_and_optimizer_states", _without_step_or_gradient)
    megatron_seams.wrap(f"{DISTRIBUTED_OPTIMIZER}.load_state_dict", _with_a_step_per_parameter)


def _with_state_before_the_first_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        if _is_torch_adam(self.optimizer):
            _allocate_state(self.optimizer)
        return original(self)

    return state_dict


def _without_step_or_gradient(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        with torch.no_grad():
            # Not a tensor: passed over. load_state_dict has set the step already, and what dp_reshardable brings
            # along is not from the checkpoint: it is the step of before the load.
            original(self, model_param, {**tensors, "step": None})

    return set_main_param_and_optimizer_states


def _with_a_step_per_parameter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original(self, state_dict)
        if _is_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return load_state_dict


def _is_torch_adam(optimizer: object) -> bool:
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """What the first step of torch's Adam would allocate, for parameters that have seen none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state.get(parameter):
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
