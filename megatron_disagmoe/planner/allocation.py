"""What is to be trained and one way to lay it out: the planner's two inputs beside model and cluster."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypedDict

from megatron_disagmoe.builders import NOMINAL_COSTS
from megatron_disagmoe.builders.placement import placed
from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.schedules.actions import Placement

ScheduleKind = Literal["interleaved-1f1b", "split-backward", "sequential"]
DispatchMode = Literal["per-expert", "per-rank", "per-node"]
DISPATCH_MODES: tuple[DispatchMode, ...] = ("per-expert", "per-rank", "per-node")
SCHEDULE_KINDS: tuple[ScheduleKind, ...] = ("interleaved-1f1b", "split-backward", "sequential")


#: Layers go round the groups of a side in turn.
IN_TURN = "in-turn"


class NodeLayout(enum.Enum):
    """Which groups share nodes.

    SEPARATE: a node holds ranks of one side. PAIRED: A_g and F_g share nodes (with gcd(pA, pF) such blocks).
    SPREAD: every node of a replica holds an equal part of each of its groups.
    """

    SEPARATE = "separate"
    PAIRED = "paired"
    SPREAD = "spread"


@dataclass(frozen=True)
class Job:
    """What a step trains.

    ``imbalance``: rows of the busiest FFN rank over the mean, 1 where routing is even.
    """

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int = 1
    imbalance: float = 1.0

    def __post_init__(self) -> None:
        for flag, value in (
            ("--seq-length", self.sequence_length),
            ("--global-batch-size", self.global_batch_size),
            ("--micro-batch-size", self.micro_batch_size),
        ):
            if not 1 <= value <= 1_000_000_000:
                raise ValueError(f"{flag} must be between 1 and 1,000,000,000, got {value}")
        if not 1 <= self.imbalance <= 1_000_000:
            raise ValueError(f"--imbalance is {self.imbalance}; the busiest FFN rank gets 1 to 1e6 times the mean")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size} is no multiple of --micro-batch-size "
                f"{self.micro_batch_size}"
            )

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch on one attention rank."""
        return self.micro_batch_size * self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length


class GroupSizes(TypedDict):
    """Numbers of groups and ranks and their cuts: what only a checkpoint can change in a run."""

    attention_groups: int
    ffn_groups: int
    attention_ranks: int
    ffn_ranks: int
    replicas: int
    tensor_parallel: int
    context_parallel: int
    expert_tensor_parallel: int


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One way to train: sizes, node layout and the levers of memory and time.

    ``attention_pool``, ``ffn_pool``: which of the cluster's pools hold the sides. ``nic_split``: where sides share
    nodes, which of the ways to split a node's NICs (``traffic.nic_splits``); it makes ``attention_nics_per_node`` and
    ``ffn_nics_per_node``, for people to read (fractions where every GPU owns a share).
    ``place_layers``: ``in-turn``, or the groups of all stages as ``--af-place-layers`` lists them.
    ``redispatch``: FFN ranks drop their input and get it again before backward; implies full recomputation there.
    """

    attention_groups: int
    ffn_groups: int
    attention_ranks: int
    ffn_ranks: int
    replicas: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    expert_tensor_parallel: int = 1
    attention_pool: int = 0
    ffn_pool: int = 0
    nodes: NodeLayout = NodeLayout.SPREAD
    nic_split: int = 0
    attention_nics_per_node: float = 0.0
    ffn_nics_per_node: float = 0.0
    schedule: ScheduleKind = "interleaved-1f1b"
    group_size: int = 1
    recompute_attention: Recompute = Recompute.NONE
    recompute_ffn: Recompute = Recompute.NONE
    redispatch: bool = False
    dispatch: DispatchMode = "per-rank"
    place_layers: str = IN_TURN

    @property
    def sizes(self) -> GroupSizes:
        """Without nodes, schedule and levers."""
        return GroupSizes(
            attention_groups=self.attention_groups,
            ffn_groups=self.ffn_groups,
            attention_ranks=self.attention_ranks,
            ffn_ranks=self.ffn_ranks,
            replicas=self.replicas,
            tensor_parallel=self.tensor_parallel,
            context_parallel=self.context_parallel,
            expert_tensor_parallel=self.expert_tensor_parallel,
        )

    @property
    def attention_gpus(self) -> int:
        """Of all replicas."""
        gpus = self.attention_groups * self.attention_ranks * self.tensor_parallel * self.context_parallel
        return self.replicas * gpus

    @property
    def ffn_gpus(self) -> int:
        """Of all replicas."""
        return self.replicas * self.ffn_groups * self.ffn_ranks * self.expert_tensor_parallel

    @property
    def num_gpus(self) -> int:
        return self.attention_gpus + self.ffn_gpus

    def placement(self, num_layers: int) -> Placement:
        """Which group holds which stage.

        Raises:
            ValueError: ``place_layers`` is for other sizes.
        """
        return _placement(self.place_layers, num_layers, self.attention_groups, self.ffn_groups)

    def num_micro_batches(self, job: Job) -> int:
        """Of one replica and step, n = batch / (M R b)."""
        return job.global_batch_size // (job.micro_batch_size * self.attention_ranks * self.replicas)


@lru_cache(maxsize=256)
def _placement(text: str, num_layers: int, attention_groups: int, ffn_groups: int) -> Placement:
    return placed(
        text,
        num_layers=num_layers,
        num_attention_groups=attention_groups,
        num_ffn_groups=ffn_groups,
        costs=NOMINAL_COSTS,
    )
