"""Builds this rank's half of the model with vanilla Megatron's initial weights.

``--af-init replay``: every rank runs vanilla's constructors with vanilla's seeds, layer by layer, keeps its own
part and drops the rest at once, so a rank never holds more than its own half, one whole layer and the embedding.
Vanilla's expert weights depend on the expert-parallel rank that draws them, so an FFN rank replays once for each
vanilla expert-parallel rank whose experts it holds. ``--af-init local``: each rank builds its own layers only, and of
those the experts only where it keeps them (an attention rank builds one, to have Megatron's layer whole).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import get_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_disagmoe import megatron_seams, parallel_state
from megatron_disagmoe.model.halves import AttentionHalfLayer, ExpertHalfLayer, ForeignLayer, SkippedLayer
from megatron_disagmoe.model_layers import LayerLayout, moe_pattern
from megatron_disagmoe.parallel_state import AFParallelState
from megatron_disagmoe.seam_records import CALLED

BUILDER = "megatron_disagmoe.model.builder.AFGPTModelBuilder"


@dataclass(frozen=True)
class PretendGroup:
    """Stands for an expert-parallel group of vanilla while its constructors are replayed: size and rank, no peers."""

    world_size: int
    group_rank: int

    def size(self) -> int:
        """Ranks in the group."""
        return self.world_size

    def rank(self) -> int:
        """The rank that this process plays."""
        return self.group_rank


ExpertWeights = dict[tuple[int, int, str], torch.Tensor]
"""(layer number, global expert, parameter's name inside the expert) -> weight."""

_OF_EXPERT = (
    re.compile(r"local_experts\.(?P<expert>\d+)\.(?P<rest>.+)"),  # SequentialMLP
    re.compile(r"(?P<rest>.*(?:weight|bias))(?P<expert>\d+)"),  # TEGroupedMLP
)


class AFGPTModelBuilder(GPTModelBuilder):
    """``GPTModelBuilder`` that returns this rank's half; the config container names it as ``builder``."""

    def __init__(self, model_config: GPTModelConfig) -> None:
        super().__init__(model_config)
        for seam in CALLED:
            megatron_seams.resolve(seam.symbol)
        self._vanilla = model_config.transformer
        model_config.transformer = role_config(self._vanilla, parallel_state.state())

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        """As the base class; gradients are averaged over the attention side's data-parallel ranks on every rank."""
        models: list[Any] = super().build_distributed_models(*args, **kwargs)
        state = parallel_state.state()
        if not state.is_attention:
            for model in models:
                if isinstance(model, DistributedDataParallel):
                    average_over_attention_side(model, state)
        return models

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """As the base class; ``pre_process`` and ``post_process`` follow from the role."""
        state = parallel_state.state()
        config = self._vanilla
        layout = LayerLayout.from_pattern(moe_pattern(config.moe_layer_freq, config.num_layers))
        build = self._attention_half if state.is_attention else self._expert_half
        model = build(pg_collection, state, layout)
        _check_trainable(model, state)
        return model

    def _attention_half(
        self, pg_collection: ProcessGroupCollection, state: AFParallelState, layout: LayerLayout
    ) -> GPTModel:
        mine = layout.attention_layers(state.topology.placement, state.role.group.index)
        vanilla = self._vanilla
        ep_size = vanilla.expert_model_parallel_size
        if not _replays():
            _reseed(PretendGroup(1, 0), salt=_salt(state))
            ep_size = vanilla.num_moe_experts
        model = self._build_vanilla(vanilla, pg_collection, PretendGroup(ep_size, 0), mine, AttentionHalfLayer)
        _use_config(model, vanilla, self._model_config.transformer)
        keep_ends(model, embedding=state.is_first, output=state.is_tail)
        return model

    def _expert_half(
        self, pg_collection: ProcessGroupCollection, state: AFParallelState, layout: LayerLayout
    ) -> GPTModel:
        vanilla, own = self._vanilla, self._model_config.transformer
        mine = layout.ffn_layers(state.topology.placement, state.role.group.index)
        num_local = vanilla.num_moe_experts // state.topology.ffn_ranks
        first = state.role.index * num_local
        weights: ExpertWeights = {}
        if _replays():
            per_rank = vanilla.num_moe_experts // vanilla.expert_model_parallel_size
            for ep_rank in range(first // per_rank, (first + num_local - 1) // per_rank + 1):
                group = PretendGroup(vanilla.expert_model_parallel_size, ep_rank)
                _reseed(group)
                model = self._build_vanilla(vanilla, pg_collection, group, mine, ExpertHalfLayer)
                _collect(model, weights, wanted=range(first, first + num_local))
                del model
        else:
            _reseed(PretendGroup(1, 0), salt=_salt(state))
        model = self._build_vanilla(own, pg_collection, pg_collection.ep, mine, ExpertHalfLayer)
        if weights:
            _fill(model, weights, first_expert=first)
        keep_ends(model, embedding=False, output=False)
        return model

    def _build_vanilla(
        self, config: Any, pg_collection: ProcessGroupCollection, ep_group: Any, mine: tuple[int, ...], half: type
    ) -> GPTModel:
        """Vanilla's whole model with the layers of others emptied as soon as they are built."""
        groups = copy.copy(pg_collection)
        groups.ep = ep_group
        kept = self._model_config.transformer
        self._model_config.transformer = config
        cut = _cut_layers(mine, half, ForeignLayer if _replays() else SkippedLayer)
        try:
            with megatron_seams.patched("megatron.core.transformer.transformer_block:build_module", cut):
                model = super().build_model(groups, pre_process=True, post_process=True)
        finally:
            self._model_config.transformer = kept
        model.decoder.layers = _layers_by_number(
            [layer for layer in model.decoder.layers if not isinstance(layer, ForeignLayer | SkippedLayer)]
        )
        model.decoder.num_layers_per_pipeline_rank = len(model.decoder.layers)
        for module in model.modules():
            if getattr(module, "pg_collection", None) is groups:
                module.pg_collection = pg_collection
        return model


def role_config(vanilla: TransformerConfig, state: AFParallelState) -> TransformerConfig:
    """Vanilla's config as it is true on this rank: no routed experts on A, no router on F."""
    own = copy.copy(vanilla)
    own.expert_model_parallel_size = 1 if state.is_attention else state.topology.ffn_ranks
    if not state.is_attention:
        own.moe_router_enable_expert_bias = False
    return own


def average_over_attention_side(model: DistributedDataParallel, state: AFParallelState) -> None:
    """Scale this FFN rank's gradients by 1/(M*R), as vanilla does, where Megatron took its own 1/(N*R).

    With ``--calculate-per-token-loss`` Megatron's factor is 1 and stays so (``DistributedDataParallel.__init__``).
    """
    if model.config.calculate_per_token_loss:
        return
    factor = 1.0 / state.topology.data_parallel_size
    for buffer in (*model.buffers, *model.expert_parallel_buffers):
        for scaled in (buffer, *buffer.buckets):
            assert hasattr(scaled, "gradient_scaling_factor"), f"{type(scaled).__name__} scales its gradients otherwise"
            scaled.gradient_scaling_factor = factor


def _layers_by_number(layers: list[TransformerLayer]) -> torch.nn.ModuleList:
    """A list whose entries are named by their global layer, as in vanilla's state dict."""
    named = torch.nn.ModuleList()
    for layer in layers:
        named.add_module(str(layer.layer_number - 1), layer)
    return named


def _replays() -> bool:
    return bool(get_args().af_init == "replay")


def _cut_layers(mine: tuple[int, ...], half: type[torch.nn.Module], other: type[torch.nn.Module]) -> Callable[..., Any]:
    """A ``build_module`` for the block that builds our layers as ``half`` and those of other groups as ``other``."""
    original = megatron_seams.resolve("megatron.core.transformer.transformer_block:build_module")

    def build_module(spec: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(spec, "module", None) is TransformerLayer:
            spec = copy.copy(spec)
            spec.module = half if kwargs["layer_number"] in mine else other
        return original(spec, *args, **kwargs)

    return build_module


def keep_ends(model: GPTModel, *, embedding: bool, output: bool) -> None:
    """Drop the embedding, the final norm and the output layer where another group holds them.

    Where the weight is tied and only the output layer is kept, it takes over the embedding's weight as Megatron's last
    pipeline stage does: a copy of its own, marked as shared, whose gradient is summed with the embedding's.
    """
    tied = model.share_embeddings_and_output_weights
    if tied and output and not embedding:
        weight = model.embedding.word_embeddings.weight
        weight.shared = True
        weight.shared_embedding = True
        model.output_layer.weight = weight
        model.output_layer.skip_weight_param_allocation = False
    elif tied and embedding and not output:
        model.embedding.word_embeddings.weight.shared_embedding = True
    if not embedding:
        del model.embedding
    if not output:
        del model.output_layer
        model.decoder.final_layernorm = None
    for module in (model, model.decoder):
        module.pre_process, module.post_process = embedding, output


def _salt(state: AFParallelState) -> int:
    """Different for every group and FFN rank, equal on ranks that hold the same weights."""
    order = state.topology.group_order.index(state.role.group)
    return 1 + order * state.topology.ffn_ranks + (0 if state.is_attention else state.role.index)


def _reseed(ep_group: PretendGroup, *, salt: int = 0) -> None:
    """Set every generator as vanilla's ``initialize_megatron`` does on the rank that ``ep_group`` plays."""
    args = get_args()
    megatron_seams.resolve("megatron.training.initialize:_set_random_seed")(
        args.seed + 1000 * salt,
        args.data_parallel_random_init,
        args.te_rng_tracker,
        args.inference_rng_tracker,
        ep_group=ep_group,
    )


def _expert_parameters(model: GPTModel) -> list[tuple[int, int, str, torch.nn.Parameter]]:
    """Every expert parameter as (layer number, local expert, name inside the expert, parameter)."""
    found = []
    for layer in model.decoder.layers:
        for name, parameter in layer.mlp.experts.named_parameters():
            for pattern in _OF_EXPERT:
                match = pattern.fullmatch(name)
                if match:
                    found.append((layer.layer_number, int(match["expert"]), match["rest"], parameter))
                    break
            else:
                raise ValueError(
                    f"experts of type {type(layer.mlp.experts).__name__} have a parameter {name!r} that belongs to no "
                    f"single expert; use SequentialMLP or TEGroupedMLP, or --af-init local"
                )
    return found


def _collect(model: GPTModel, weights: ExpertWeights, *, wanted: range) -> None:
    first = next(iter(model.decoder.layers)).mlp.local_expert_indices[0]
    for number, expert, name, parameter in _expert_parameters(model):
        if first + expert in wanted:
            weights[number, first + expert, name] = parameter.detach().clone()


@torch.no_grad()
def _fill(model: GPTModel, weights: ExpertWeights, *, first_expert: int) -> None:
    for number, expert, name, parameter in _expert_parameters(model):
        parameter.copy_(weights.pop((number, first_expert + expert, name)))
    assert not weights, f"weights without a place: {list(weights)[:3]}"


def _use_config(model: GPTModel, old: Any, new: Any) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def _check_trainable(model: GPTModel, state: AFParallelState) -> None:
    assert any(True for _ in model.parameters()), f"{state.role} holds no parameter"
