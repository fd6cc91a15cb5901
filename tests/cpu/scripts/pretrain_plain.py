"""A pretrain script as a user might have one: plain Megatron, knowing nothing of this package.

Its own loss and its own data set-up, so that agreement with ``megatron_disagmoe.pretrain_gpt`` means something.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from sibling import SIBLING  # type: ignore[import-not-found]  # found only if the script's folder is on sys.path, as Python itself would have it


def datasets(samples: Any, vp_stage: int | None = None) -> Any:
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, samples, lambda: True, config).build()


def masked_sum(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total = (losses.float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens])}


def forward_step(data: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = {key: value.cuda() for key, value in next(data).items() if torch.is_tensor(value)}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(masked_sum, batch["loss_mask"])


if __name__ == "__main__":
    datasets.is_distributed = True  # type: ignore[attr-defined]
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    print_rank_0(f"plain script: {SIBLING}, name {__name__}, pid {os.getpid()}")
    model = gpt_config_from_args(args)
    pretrain(pretrain_cfg_container_from_args(args, model), datasets, ModelType.encoder_or_decoder, forward_step)
