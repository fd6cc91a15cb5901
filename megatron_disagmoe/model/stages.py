"""What one stage computes, on Megatron's own modules: A(i), the tail, and F(i).

Shape legend: ``s`` sequence, ``b`` micro-batch, ``h`` hidden, ``E`` experts, ``k`` top-k, ``T = s*b`` tokens,
``r`` rows of one message, ``R`` rows on one FFN rank.

A stage gets plain tensors and gives plain tensors; it neither communicates nor detaches (the runtime does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_disagmoe.model_layers import LayerLayout
from megatron_disagmoe.transport.base import Message
from megatron_disagmoe.transport.dispatch import Dispatcher, NodeExchange
from megatron_disagmoe.transport.dispatch.gradients import no_header


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


@dataclass
class Dispatched:
    """What A(i) makes.

    Attributes:
        messages: one per FFN rank.
        lane: for A(i+1).
        again: makes the messages once more, without history; holds the router's input ``[T, h]`` and decision.
    """

    messages: list[Message]
    lane: Lane
    again: Callable[[], list[Message]]

    def tensors(self) -> list[torch.Tensor]:
        """Everything that takes part in autograd: the messages' sections, then the lane."""
        return [t for m in self.messages for t in m.sections if t.is_floating_point()] + self.lane.tensors()

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Dispatched:
        """The same with others in the place of ``tensors()``."""
        new = iter(tensors)
        messages = [
            Message(m.header, tuple(next(new) if t.is_floating_point() else t for t in m.sections))
            for m in self.messages
        ]
        shared = self.lane.shared
        lane = Lane(next(new), None if shared is None else next(new), self.lane.routing)
        return Dispatched(messages, lane, self.again)


class AttentionStages:
    """The attention stages of one rank: call ``forward`` for A(i), ``0 <= i < L``, ``tail`` for A(L).

    Args:
        recompute: keep only the hidden states a stage starts from, and run it again in backward.
    """

    def __init__(
        self, model: GPTModel, layout: LayerLayout, dispatcher: Dispatcher, *, recompute: bool = False
    ) -> None:
        self.model = model
        self.dispatcher = dispatcher
        self.layout = layout
        self.recompute = recompute
        self._layers: dict[int, TransformerLayer] = {layer.layer_number: layer for layer in model.decoder.layers}

    def forward(
        self,
        stage: int,
        batch: Batch,
        combined: list[Message] | None,
        lane: Lane | None,
        emit: Callable[[list[Message]], None],
        embedded: Callable[[torch.Tensor], torch.Tensor],
    ) -> Dispatched:
        """A(stage): finish the layer before, dense layers, attention, norm, router, dispatch; shared experts.

        Args:
            stage: MoE layer, from 0.
            batch: of this micro-batch.
            combined: what the FFN ranks returned for the layer before; None at stage 0.
            lane: from the stage before; None at stage 0.
            emit: takes the messages as soon as they exist, so that they travel while the shared experts run.
            embedded: called at stage 0 with the embedding's output; what it returns is used in its place.
        """
        hidden, rotary = self._enter(stage, batch, combined, lane)
        if stage == 0:
            hidden = embedded(hidden)
        if not (self.recompute and torch.is_grad_enabled()):
            return self._compute(stage, batch, hidden, rotary, emit)
        # The function outlives this call inside the graph: it must hold nothing that the stage has made.
        made: list[Dispatched] = []
        emits = [emit]

        def run(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if not emits:  # in backward
                return tuple(self._compute(stage, batch, hidden, rotary, _keep_quiet).tensors())
            made.append(self._compute(stage, batch, hidden, rotary, emits.pop()))
            return tuple(made[0].tensors())

        outputs = tensor_parallel.checkpoint(run, False, hidden)
        return made.pop().with_tensors(outputs)

    def _compute(
        self,
        stage: int,
        batch: Batch,
        hidden: torch.Tensor,
        rotary: torch.Tensor | None,
        emit: Callable[[list[Message]], None],
    ) -> Dispatched:
        layer = self._layers[self.layout.moe_layers[stage]]
        hidden = self._dense(stage, batch, hidden, rotary)
        residual, _ = layer._forward_attention(hidden, attention_mask=batch.attention_mask, rotary_pos_emb=rotary)
        normed = layer._forward_pre_mlp_layernorm(residual)
        probs, routing_map = layer.mlp.route(normed)
        tokens = normed.view(-1, normed.shape[-1])
        messages, routing = self.dispatcher.dispatch(tokens, probs, routing_map)
        emit(messages)
        routed = tokens.detach(), probs.detach(), routing_map
        lane = Lane(residual, layer.mlp.shared_experts_compute(normed), routing)
        return Dispatched(messages, lane, lambda: self.dispatcher.dispatch(*routed)[0])

    def tail(self, batch: Batch, combined: list[Message], lane: Lane) -> torch.Tensor:
        """A(L): the end of the last MoE layer, dense layers, final norm, output layer; loss per token ``[b, s]``."""
        stage = len(self.layout.moe_layers)
        hidden, rotary = self._enter(stage, batch, combined, lane)
        hidden = self._dense(stage, batch, hidden, rotary)
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
        """Hidden states ``[s, b, h]`` at the beginning of this stage's first layer, and rotary embeddings."""
        if stage == 0:
            hidden, rotary = self.model._preprocess(input_ids=batch.input_ids, position_ids=batch.position_ids)[:2]
        else:
            assert combined is not None
            assert lane is not None
            hidden = self._finish(combined, lane)
            rotary = self.model._preprocess(input_ids=None, position_ids=None, decoder_input=hidden)[1]
        return hidden, rotary

    def _dense(
        self, stage: int, batch: Batch, hidden: torch.Tensor, rotary: torch.Tensor | None
    ) -> torch.Tensor:
        """The dense layers that this stage begins with."""
        for number in self.layout.dense_before[stage]:
            hidden, _ = self._layers[number](
                hidden_states=hidden, attention_mask=batch.attention_mask, rotary_pos_emb=rotary
            )
        return hidden

    def _finish(self, combined: list[Message], lane: Lane) -> torch.Tensor:
        """The end of an MoE layer: weighted sum, shared experts' output, residual (dropout as the layer's own)."""
        output = self.dispatcher.combine(combined, lane.routing).view_as(lane.residual)
        if lane.shared is not None:
            output = output + lane.shared
        config = self.model.config
        add = get_bias_dropout_add(self.model.training, config.bias_dropout_fusion)
        return add((output, None), lane.residual, config.hidden_dropout)


def _keep_quiet(messages: list[Message]) -> None:
    """Emits nothing: in a stage that is run again the messages have long been sent."""


class ExpertStages:
    """The FFN stages of one rank: call ``forward`` for F(i).

    Args:
        recompute: keep only the messages a stage starts from, and run it again in backward.
    """

    def __init__(
        self, model: GPTModel, layout: LayerLayout, dispatcher: Dispatcher, *, recompute: bool = False
    ) -> None:
        self.dispatcher = dispatcher
        self.layout = layout
        self.recompute = recompute
        self._layers: dict[int, TransformerLayer] = {layer.layer_number: layer for layer in model.decoder.layers}

    def forward(
        self, stage: int, received: list[Message], exchange: NodeExchange | None = None
    ) -> list[Message]:
        """F(stage): the experts of MoE layer ``stage`` on whatever arrived; one message back per attention rank.

        ``exchange`` is that of this stage and micro-batch, where the dispatcher needs one.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return self._compute(stage, received, exchange)
        # The function outlives this call inside the graph: it takes the tensors as arguments and holds the rest only.
        headers = [message.header for message in received]
        fixed = [[None if t.is_floating_point() else t for t in message.sections] for message in received]

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = iter(tensors)
            messages = [
                Message(header, tuple(next(given) if t is None else t for t in sections))
                for header, sections in zip(headers, fixed, strict=True)
            ]
            return tuple(message.sections[0] for message in self._compute(stage, messages, exchange))

        rows = tensor_parallel.checkpoint(
            run, False, *(t for message in received for t in message.sections if t.is_floating_point())
        )
        return [Message(no_header(), (part,)) for part in rows]

    def _compute(self, stage: int, received: list[Message], exchange: NodeExchange | None) -> list[Message]:
        work = self.dispatcher.expert_input(received, exchange)
        experts = self._layers[self.layout.moe_layers[stage]].mlp.experts
        output, bias = experts(work.tokens, work.tokens_per_expert, work.probs)
        assert bias is None, "experts with a bias that is added later are not dispatched"
        return self.dispatcher.expert_output(output, work.state)
