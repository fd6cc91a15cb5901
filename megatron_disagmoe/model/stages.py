"""What one stage computes, on Megatron's own modules: A(i), the tail, and F(i).

Shape legend: ``s`` sequence, ``b`` micro-batch, ``h`` hidden, ``E`` experts, ``k`` top-k, ``T = s*b`` tokens,
``r`` rows of one message, ``R`` rows on one FFN rank.

A stage gets plain tensors and gives plain tensors; it neither communicates nor detaches (the runtime does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_disagmoe.model_layers import LayerLayout
from megatron_disagmoe.transport.base import Message
from megatron_disagmoe.transport.dispatch import Dispatcher


@dataclass
class Batch:
    """The arguments with which the user's ``forward_step`` called the model, and the loss function it gave back."""

    input_ids: torch.Tensor | None
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    labels: torch.Tensor | None
    loss_mask: torch.Tensor | None
    loss_func: Callable[..., Any]


@dataclass
class Lane:
    """What A(i+1) needs from A(i) besides the experts' output.

    Attributes:
        residual: ``[s, b, h]``.
        shared: ``[s, b, h]``, the shared experts' output, or None.
        routing: the dispatcher's state, needed to combine.
    """

    residual: torch.Tensor
    shared: torch.Tensor | None
    routing: Any

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that take part in autograd."""
        return [self.residual] if self.shared is None else [self.residual, self.shared]


class AttentionStages:
    """The attention stages of one rank: call ``forward`` for A(i), ``0 <= i < L``, ``tail`` for A(L)."""

    def __init__(self, model: GPTModel, layout: LayerLayout, dispatcher: Dispatcher) -> None:
        self.model = model
        self.dispatcher = dispatcher
        self.layout = layout
        self._layers: dict[int, TransformerLayer] = {layer.layer_number: layer for layer in model.decoder.layers}
        self._any_layer = next(iter(self._layers.values()))

    def forward(
        self,
        stage: int,
        batch: Batch,
        combined: list[Message] | None,
        lane: Lane | None,
        emit: Callable[[list[Message]], None],
    ) -> Lane:
        """A(stage): finish the layer before, dense layers, attention, norm, router; ``emit`` the dispatch; shared experts.

        Args:
            stage: MoE layer, from 0.
            batch: of this micro-batch.
            combined: what the FFN ranks returned for the layer before; None at stage 0.
            lane: from the stage before; None at stage 0.
            emit: takes one message per FFN rank as soon as they exist, so that they travel while the shared experts run.
        """
        layer = self._layers[self.layout.moe_layers[stage]]
        hidden, rotary = self._enter(stage, batch, combined, lane)
        residual, _ = layer._forward_attention(hidden, attention_mask=batch.attention_mask, rotary_pos_emb=rotary)
        normed = layer._forward_pre_mlp_layernorm(residual)
        probs, routing_map = layer.mlp.route(normed)
        messages, routing = self.dispatcher.dispatch(normed.view(-1, normed.shape[-1]), probs, routing_map)
        emit(messages)
        return Lane(residual, layer.mlp.shared_experts_compute(normed), routing)

    def tail(self, batch: Batch, combined: list[Message], lane: Lane) -> torch.Tensor:
        """A(L): finish the last MoE layer, dense layers after it, final norm, output layer; the loss per token ``[b, s]``."""
        hidden, _ = self._enter(len(self.layout.moe_layers), batch, combined, lane)
        hidden = self.model.decoder.final_layernorm(hidden)
        output = self.model._postprocess(
            hidden_states=hidden,
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            rotary_pos_emb=None,
            rotary_pos_cos=None,
            rotary_pos_sin=None,
            loss_mask=batch.loss_mask,
            attention_mask=batch.attention_mask,
        )
        return output.float()

    def _enter(
        self, stage: int, batch: Batch, combined: list[Message] | None, lane: Lane | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states ``[s, b, h]`` before this stage's MoE layer (or the final norm), and rotary embeddings."""
        if stage == 0:
            hidden, rotary = self.model._preprocess(input_ids=batch.input_ids, position_ids=batch.position_ids)[:2]
        else:
            assert combined is not None and lane is not None
            hidden = self._finish(combined, lane)
            rotary = self.model._preprocess(input_ids=None, position_ids=None, decoder_input=hidden)[1]
        for number in self.layout.dense_before[stage]:
            hidden, _ = self._layers[number](
                hidden_states=hidden, attention_mask=batch.attention_mask, rotary_pos_emb=rotary
            )
        return hidden, rotary

    def _finish(self, combined: list[Message], lane: Lane) -> torch.Tensor:
        """The end of an MoE layer: weighted sum, shared experts' output, residual (dropout as the layer's own)."""
        output = self.dispatcher.combine(combined, lane.routing).view_as(lane.residual)
        if lane.shared is not None:
            output = output + lane.shared
        layer = self._any_layer  # bias-dropout-add has no parameters: that of any layer will do
        with layer.bias_dropout_add_exec_handler():
            return layer.mlp_bda(layer.training, layer.config.bias_dropout_fusion)(
                (output, None), lane.residual, layer.hidden_dropout
            )


class ExpertStages:
    """The FFN stages of one rank: call ``forward`` for F(i)."""

    def __init__(self, model: GPTModel, layout: LayerLayout, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.layout = layout
        self._layers: dict[int, TransformerLayer] = {layer.layer_number: layer for layer in model.decoder.layers}

    def forward(self, stage: int, received: list[Message]) -> list[Message]:
        """F(stage): the experts of MoE layer ``stage`` on whatever arrived; one message back per attention rank."""
        work = self.dispatcher.expert_input(received)
        experts = self._layers[self.layout.moe_layers[stage]].mlp.experts
        output, bias = experts(work.tokens, work.tokens_per_expert, work.probs)
        assert bias is None, "experts with a bias that is added later are not dispatched"
        return self.dispatcher.expert_output(output, work.state)
