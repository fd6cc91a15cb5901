"""Loading a checkpoint into AF-pipe, whoever wrote it: checked before anything is read, and after.

Megatron's ``load_checkpoint`` does the work. Around it: what this run asks for is compared with what is there, keys
named; state that belongs to another layout is left out where it cannot matter (random numbers), brought into this
run's form where it can be (the optimizer's common state), and refused where not; and weights that found no place end
the run, where Megatron only prints them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from megatron.core.utils import unwrap_model
from megatron.training import get_args, print_rank_0

from megatron_disagmoe import megatron_seams, parallel_state
from megatron_disagmoe.checkpoints import optimizer_state
from megatron_disagmoe.checkpoints.difference import misfits
from megatron_disagmoe.checkpoints.layout import Layout
from megatron_disagmoe.checkpoints.reading import Checkpoint
from megatron_disagmoe.errors import bad_input_ends_the_job

_CHECKPOINTING = "megatron.training.checkpointing"
_DIST = "megatron.core.dist_checkpointing"
_REMEDY = "add --no-load-optim to load the weights alone"


@dataclass(frozen=True)
class Saved:
    """The checkpoint that is about to be loaded.

    Attributes:
        folder: its own.
        common: what all ranks share in it: arguments, iteration, common state of the optimizer, ...
        resumes: whether the run goes on with its state, not with its weights alone.
    """

    folder: str
    common: dict[str, Any]
    resumes: bool


def checked(original: Callable[..., Any]) -> Callable[..., Any]:
    """``load_checkpoint`` that loads what fits, all of it, and otherwise ends the job with the keys."""

    def load_checkpoint(
        ddp_model: list[Any], optimizer: Any, opt_param_scheduler: Any, load_arg: str = "load", **options: Any
    ) -> Any:
        args = get_args()
        with bad_input_ends_the_job():
            saved = _peek(args, load_arg, options.get("checkpointing_context"))
            if saved is not None and saved.resumes and optimizer is not None and not args.no_load_optim:
                _common_optimizer_state(saved, optimizer, args)
        if saved is None:  # Megatron says so, and starts anew
            return original(ddp_model, optimizer, opt_param_scheduler, load_arg, **options)
        with (
            _random_numbers_of_same_layout_only(saved, args),
            _reading_what_fits(saved, optimizer, args),
            _noting_misplaced_weights(ddp_model) as misplaced,
        ):
            result = original(ddp_model, optimizer, opt_param_scheduler, load_arg, **options)
        with bad_input_ends_the_job():
            _end_if_any(misplaced, saved.folder)
        return result

    return load_checkpoint


def _peek(args: argparse.Namespace, load_arg: str, context: Any) -> Saved | None:
    """The checkpoint that Megatron will load, found as it does; None where it will start anew."""
    load, finetune = getattr(args, load_arg), args.finetune
    exists = megatron_seams.resolve(f"{_CHECKPOINTING}:checkpoint_exists")
    if args.pretrained_checkpoint is not None and not exists(load):
        load, finetune = args.pretrained_checkpoint, True
    base = megatron_seams.resolve(f"{_CHECKPOINTING}:_load_base_checkpoint")
    try:
        common, folder, release, kind = base(load, args, rank0=True, checkpointing_context=context)
    except (FileNotFoundError, NotImplementedError, CheckpointingException) as error:
        raise ValueError(f"{load} has no complete checkpoint to load: {error}") from error
    if common is None:
        return None
    if kind.name != "GLOBAL":
        raise ValueError(f"{folder}: AF-pipe reads checkpoints of --ckpt-format torch_dist only")
    return Saved(str(folder), common, resumes=not (finetune or release))


def _common_optimizer_state(saved: Saved, optimizer: Any, args: argparse.Namespace) -> dict[Any, Any]:
    """The optimizer's common state as this run's optimizer takes it; ``ValueError`` where it cannot take it."""
    sharding = (saved.common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    if sharding not in (None, "fully_reshardable"):
        raise ValueError(
            f"{saved.folder}: the distributed optimizer's state was saved as {sharding}, which fits the layout that "
            f"saved it and no other; save it with --dist-ckpt-optim-fully-reshardable, or {_REMEDY}"
        )
    if "optimizer" not in saved.common:
        raise ValueError(f"{saved.folder} holds no state of an optimizer; {_REMEDY}")
    state = saved.common["optimizer"]
    if args.use_distributed_optimizer:
        here = optimizer_state.DISTRIBUTED
    else:
        here = optimizer_state.MIXED if args.bf16 or args.fp16 else optimizer_state.PLAIN
    if optimizer_state.kind(state) != here:
        raise ValueError(
            f"{saved.folder}: its optimizer's state is of kind '{optimizer_state.kind(state)}', this run's of kind "
            f"'{here}'; {_REMEDY}"
        )
    groups = [part.param_groups for part in optimizer.chained_optimizers]
    try:
        return optimizer_state.refit(state, groups, identifiers=param_group_identifier_keys)
    except ValueError as error:
        raise ValueError(f"{saved.folder}: {error}; {_REMEDY}") from error


@contextlib.contextmanager
def _random_numbers_of_same_layout_only(saved: Saved, args: argparse.Namespace) -> Iterator[None]:
    there, here = Layout.of(saved.common.get("args")), Layout.of(args)
    if there == here or args.no_load_rng or not saved.resumes:
        yield
        return
    print_rank_0(f"disagmoe: saved by {there}, loaded by {here}: states of random numbers are not loaded")
    args.no_load_rng = True
    try:
        yield
    finally:
        args.no_load_rng = False


@contextlib.contextmanager
def _reading_what_fits(saved: Saved, optimizer: Any, args: argparse.Namespace) -> Iterator[None]:
    """Within it Megatron reads a checkpoint only if it fits, its optimizer's common state in the form of this run's."""
    read = megatron_seams.resolve(f"{_DIST}:load")
    read_common = megatron_seams.resolve(f"{_DIST}.serialization:load_common_state_dict")

    def load(sharded_state_dict: dict[str, Any], checkpoint_dir: str, *more: Any, **options: Any) -> dict[str, Any]:
        with bad_input_ends_the_job():
            _check_keys(sharded_state_dict, checkpoint_dir)
        with_optimizer = "optimizer" in sharded_state_dict

        def load_common_state_dict(folder: str) -> dict[str, Any]:
            common: dict[str, Any] = read_common(folder)
            if with_optimizer:
                common["optimizer"] = _common_optimizer_state(Saved(folder, common, resumes=True), optimizer, args)
            return common

        with megatron_seams.patched(f"{_DIST}.serialization:load_common_state_dict", load_common_state_dict):
            state: dict[str, Any] = read(sharded_state_dict, checkpoint_dir, *more, **options)
        if with_optimizer:
            optimizer_state.list_main_parameters(state["optimizer"])
        return state

    with megatron_seams.patched(f"{_DIST}:load", load):
        yield


def _check_keys(sharded_state_dict: dict[str, Any], folder: str) -> None:
    """``ValueError`` on every rank where what all ranks ask for is not what is in the checkpoint. Collective."""
    asked: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(_asked_for(sharded_state_dict), asked, dst=0)
    found: list[Any] = [None]
    if asked is not None:
        found = [misfits({key: shape for rank in asked for key, shape in rank.items()}, Checkpoint(Path(folder)))]
    dist.broadcast_object_list(found, src=0)
    if found[0]:
        raise ValueError(f"{folder} does not fit this run: {'; '.join(found[0])}")


def _asked_for(sharded_state_dict: dict[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """Global shape by key of every tensor that this rank wants; None for a size that may differ (padding of words)."""
    preprocess = megatron_seams.resolve(f"{_DIST}.state_dict_utils:load_preprocess")
    shapes: dict[str, tuple[int | None, ...]] = {}
    for value in nested_values(preprocess(sharded_state_dict)[0]):
        if isinstance(value, ShardedTensor):
            shape = tuple(value.global_shape)
            shapes[value.key] = (None, *shape[1:]) if value.allow_shape_mismatch else shape
    return shapes


@contextlib.contextmanager
def _noting_misplaced_weights(ddp_model: list[Any]) -> Iterator[list[str]]:
    """Collect what ``load_state_dict`` could not place: Megatron tries again without strictness and only prints it."""
    misplaced: list[str] = []
    role = parallel_state.state().role
    with contextlib.ExitStack() as stack:
        for model in unwrap_model(ddp_model):
            place = model.load_state_dict

            def load_state_dict(
                state_dict: dict[str, Any], strict: bool = True, place: Callable[..., Any] = place
            ) -> Any:
                result = place(state_dict, strict=False)
                for what, keys in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys)):
                    misplaced.extend(f"{role}: {what} {key}" for key in keys if not key.endswith("_extra_state"))
                return result

            model.load_state_dict = load_state_dict
            stack.callback(delattr, model, "load_state_dict")
        yield misplaced


def _end_if_any(misplaced: list[str], folder: str) -> None:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, misplaced)
    everywhere = [message for messages in gathered for message in messages]
    if everywhere:
        raise ValueError(f"{folder}: weights were not loaded: {', '.join(everywhere[:12])}")
