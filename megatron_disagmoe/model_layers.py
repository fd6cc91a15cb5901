"""Which transformer layers belong to which stage.

Megatron numbers transformer layers from 1; stages count MoE layers from 0. Dense layers belong to the attention
stage that follows them, so those after the last MoE layer belong to the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_disagmoe.schedules.actions import Placement


def moe_pattern(moe_layer_freq: int | Sequence[int], num_layers: int) -> tuple[bool, ...]:
    """For each transformer layer whether it is an MoE layer (``--moe-layer-freq``, as ``get_gpt_decoder_block_spec``).

    Raises:
        ValueError: for a list of the wrong length.
    """
    if isinstance(moe_layer_freq, int):
        return tuple(i % moe_layer_freq == 0 for i in range(num_layers))
    if len(moe_layer_freq) != num_layers:
        raise ValueError(
            f"--moe-layer-freq lists {len(moe_layer_freq)} layers but --num-layers is {num_layers}; make them equal"
        )
    return tuple(bool(is_moe) for is_moe in moe_layer_freq)


@dataclass(frozen=True)
class LayerLayout:
    """Transformer layers by stage.

    Attributes:
        moe_layers: the layer number (from 1) of each MoE layer, by stage.
        dense_before: for each attention stage (the tail last) the layer numbers of the dense layers it begins with.
    """

    moe_layers: tuple[int, ...]
    dense_before: tuple[tuple[int, ...], ...]

    @classmethod
    def from_pattern(cls, pattern: Sequence[bool]) -> LayerLayout:
        """Cut a pattern of MoE and dense layers into stages."""
        moe_layers: list[int] = []
        dense_before: list[tuple[int, ...]] = []
        dense: list[int] = []
        for number, is_moe in enumerate(pattern, start=1):
            if is_moe:
                moe_layers.append(number)
                dense_before.append(tuple(dense))
                dense = []
            else:
                dense.append(number)
        return cls(tuple(moe_layers), (*dense_before, tuple(dense)))

    def attention_layers(self, placement: Placement, group: int) -> tuple[int, ...]:
        """Layer numbers of which attention group ``group`` holds the attention half, ascending."""
        numbers: list[int] = []
        for stage, holder in enumerate(placement.attention):
            if holder == group:
                numbers.extend(self.dense_before[stage])
                if stage < len(self.moe_layers):
                    numbers.append(self.moe_layers[stage])
        return tuple(sorted(numbers))

    def ffn_layers(self, placement: Placement, group: int) -> tuple[int, ...]:
        """Layer numbers of which FFN group ``group`` holds the experts, ascending."""
        return tuple(self.moe_layers[stage] for stage, holder in enumerate(placement.ffn) if holder == group)
