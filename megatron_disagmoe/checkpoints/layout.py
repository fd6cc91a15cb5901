"""Over which ranks a run was laid out, read from the arguments that Megatron saves in every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Sizes of a run; without AF-pipe the ``af`` sizes are 0.

    Attributes:
        attention_groups: p_A.
        ffn_groups: p_F.
        attention_ranks: M.
        ffn_ranks: N.
        world_size: ranks in all.
        tensor_parallel: TP.
        pipeline_parallel: Megatron's own PP.
        expert_parallel: EP; with AF-pipe this only names an initialisation, so it is left at 1.
        layers: who holds which (``--af-place-layers``); older checkpoints do not say, and mean in turn.
    """

    attention_groups: int
    ffn_groups: int
    attention_ranks: int
    ffn_ranks: int
    world_size: int
    tensor_parallel: int
    pipeline_parallel: int
    expert_parallel: int
    layers: str = "in-turn"

    @classmethod
    def of(cls, args: Any) -> Layout:
        """The layout that a namespace of Megatron's arguments describes."""

        def size(name: str) -> int:
            return int(getattr(args, name, None) or 1)

        if not getattr(args, "af_pipe", False):
            tensor, pipeline, expert = (
                size(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline", "expert")
            )
            return cls(0, 0, 0, 0, size("world_size"), tensor, pipeline, expert)
        return cls(
            attention_groups=size("af_attention_groups"),
            ffn_groups=int(getattr(args, "af_ffn_groups", None) or size("af_attention_groups")),
            attention_ranks=size("af_attention_ranks"),
            ffn_ranks=size("af_ffn_ranks"),
            world_size=size("world_size"),
            tensor_parallel=size("tensor_model_parallel_size"),
            pipeline_parallel=1,
            expert_parallel=1,
            layers=getattr(args, "af_place_layers", None) or "in-turn",
        )

    def __str__(self) -> str:
        if self.attention_groups:
            sizes = f"p_A={self.attention_groups} p_F={self.ffn_groups} M={self.attention_ranks} N={self.ffn_ranks}"
            sizes += f" layers {self.layers}" if self.layers != "in-turn" else ""
            return f"AF-pipe {sizes} on {self.world_size} ranks"
        sizes = f"TP={self.tensor_parallel} PP={self.pipeline_parallel} EP={self.expert_parallel}"
        return f"plain Megatron {sizes} on {self.world_size} ranks"
