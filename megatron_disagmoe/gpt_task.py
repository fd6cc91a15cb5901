"""A plain GPT for Megatron's ``pretrain()``: its data, its forward step and its loss.

Written on the public ``megatron.training`` API; equal in numbers to ``pretrain_gpt.py`` at core_v0.19.0 for the
same flags. What that script does beyond a plain GPT is refused (``REFUSED``), with the way to get it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, pretrain, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_disagmoe.errors import bad_input_ends_the_job

REFUSED = (
    "sft",
    "fim_data",
    "logits_load_dir",
    "mtp_num_layers",
    "hybrid_context_parallel",
    "dataloader_inter_document_masking",
    "modelopt_enabled",
    "inprocess_restart",
)
"""Arguments of Megatron that its own script serves and this one does not."""

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
UNEXPECTEDLY_LARGE = 10
"""``--check-for-spiky-loss`` complains about a loss this many times the largest seen."""

straggler_timer = StragglerDetector()


def train() -> None:
    """Parse ``sys.argv`` as Megatron does and train."""
    # Every rank enters the builder, also those without data: it synchronises over all of them.
    train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    with bad_input_ends_the_job():
        check(args)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=embedding_ranks,
    )


def check(args: Namespace) -> None:
    """``ValueError`` for an argument in ``REFUSED``."""
    asked = [name for name in REFUSED if getattr(args, name, None)]
    if asked:
        flags = ", ".join("--" + name.replace("_", "-") for name in asked)
        raise ValueError(
            f"{flags}: this entry trains a plain GPT; for more, take a checkout of Megatron-LM at core_v0.19.0 and "
            "run its pretrain_gpt.py with python -m megatron_disagmoe.launch"
        )


def train_valid_test_datasets(samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """The three datasets, ``samples`` being how many each must hold at least; ``None`` where a rank reads none."""
    args = get_args()
    config = dataset_config(args)
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    datasets = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset, samples, partial(_reads_data, vp_stage), config
    ).build()
    print_rank_0("> finished creating GPT datasets ...")
    train, valid, test = datasets
    return train, valid, test


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's dataset settings from its arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def _reads_data(vp_stage: int | None = None) -> bool:
    return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)


def get_batch(data: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None) -> dict[str, Any]:
    """The next micro-batch on this rank: [micro-batch, sequence / CP] per key of ``BATCH_KEYS``, or ``None``."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        assert data is not None, "tensor-parallel rank 0 of the first and last stages reads data"
        batch = next(data)
        for key in BATCH_KEYS:
            tensor = batch.get(key)
            batch[key] = None if tensor is None else tensor.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., Any]]:
    """One micro-batch through ``model``: its output, and the function that makes a loss of it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with straggler_timer(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    call: Callable[..., Any] = model
    if return_schedule_plan:
        call = model.build_schedule_plan  # type: ignore[assignment]
    with straggler_timer:
        output = call(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    return output, partial(loss_func, batch["loss_mask"])


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the masked losses of one micro-batch, its tokens, and both for the log.

    ``loss_mask`` and ``output_tensor`` are [micro-batch, sequence], the latter the cross entropy per token.
    """
    losses, mask = output_tensor.view(-1).float(), loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    tokens = mask.sum().clone().detach().to(torch.int)
    _validate(loss)
    return loss, tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), tokens.view(1)])}


def _validate(loss: torch.Tensor) -> None:
    args = get_args()
    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        too_large = partial(machine.is_unexpectedly_large, threshold=UNEXPECTEDLY_LARGE, context="loss")
        machine.validate_result(result=loss, rejection_func=too_large, message="Spiky loss", tolerance=0.0, fatal=False)


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The ranks of one pipeline that hold an embedding: the first, and the last where it is tied."""
    tied = not get_args().untie_embeddings_and_output_weights
    return sorted({pp_ranks[0], pp_ranks[-1]} if tied else {pp_ranks[0]})
