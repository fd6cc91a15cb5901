"""What is varied: one thing at a time around Qwen3-235B at 4K on 16 nodes of H800, 14 bytes a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_disagmoe.planner.activations import Recompute
from megatron_disagmoe.planner.allocation import DispatchMode, ScheduleKind
from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.model_import import load_model
from megatron_disagmoe.planner.space import FFN_LEVERS, Space
from megatron_disagmoe.reproduction.constants import Constants
from megatron_disagmoe.reproduction.hardware import calibrate
from megatron_disagmoe.reproduction.systems.af_pipe import OUR_SPACE
from megatron_disagmoe.reproduction.systems.choose import Task


@dataclass(frozen=True)
class Levers:
    """What AF-pipe uses beyond the paper's own. ``planner``: the planner's whole search instead (slow)."""

    dispatch: DispatchMode = "per-expert"
    kind: ScheduleKind = "interleaved-1f1b"
    planner: Space | None = None


#: The paper's levers in the planner's search, which has equal depths then; and without levers of memory.
_PAPER_SPACE = Space(dispatch=("per-expert",), schedules=("interleaved-1f1b",), asymmetric=False)
_NO_MEMORY_LEVERS = replace(_PAPER_SPACE, recompute_attention=(Recompute.NONE,), ffn_levers=FFN_LEVERS[:1])

#: By name; each alone on top of the paper's, then two and all together.
LEVERS: dict[str, Levers] = {
    "as in the paper": Levers(),
    "split backward": Levers(kind="split-backward"),
    "one copy per rank": Levers("per-rank"),
    "one copy per node": Levers("per-node"),
    "one copy per node, split": Levers("per-node", "split-backward"),
    "planner, as in the paper": Levers(planner=_PAPER_SPACE),
    "planner, nothing recomputed": Levers(planner=_NO_MEMORY_LEVERS),
    "planner, unequal depths": Levers(planner=replace(_PAPER_SPACE, asymmetric=True)),
    "planner, everything": Levers(planner=OUR_SPACE),
}


@dataclass(frozen=True)
class Point:
    """One point of one study; ``x`` is what the study varies, ``at`` the same as a number where it is one.

    ``slow``: how much slower one GPU is. ``free_cuts``: whether baselines may share a sequence among GPUs as they like;
    AF-pipe always may here.
    """

    study: str
    x: str
    model: str = "qwen3-235b-a22b"
    sequence: int = 4096
    nodes: int = 16
    bytes_per_parameter: int = 14
    nic_gbit: float = 400.0
    oversubscription: float = 1.0
    nodes_per_leaf: int = 32
    cross_rail: bool = True
    zipf: float = 0.0
    slow: float = 1.0
    levers: str = "one copy per node, split"
    free_cuts: bool = True
    at: float | None = None

    @property
    def series(self) -> str:
        """What has a line of its own in a study's picture."""
        return f"{self.model}, {self.bytes_per_parameter} bytes"

    @property
    def case(self) -> Point:
        """The same whatever study it is in; points alike have the same outcome."""
        return replace(self, study="", x="", at=None)

    def cluster(self) -> Cluster:
        """H800 nodes, calibrated on figure 6a, as the point has them."""
        base = calibrate(Constants()).cluster()
        pool = base.pools[0]
        nics = (self.nic_gbit,) * len(pool.nics_gbit_per_s)
        pool = pool.model_copy(update={"num_nodes": self.nodes, "nics_gbit_per_s": nics})
        network = base.network.model_copy(
            update={
                "oversubscription": self.oversubscription,
                "nodes_per_leaf": self.nodes_per_leaf,
                "cross_rail_forwarding": self.cross_rail,
            }
        )
        return base.model_copy(update={"pools": (pool,), "network": network})

    def task(self) -> Task:
        """The same batch for every system; the tokens of a step stay the same as sequences grow."""
        constants = replace(Constants(), bytes_per_parameter=self.bytes_per_parameter, free_cuts=int(self.free_cuts))
        cluster, model = self.cluster(), load_model(self.model)
        sequences = max(constants.sequences_per_gpu * cluster.num_gpus * 4096 // self.sequence, cluster.num_gpus // 2)
        imbalance = zipf_imbalance(model.moe.num_experts, constants.expert_parallel, self.zipf)
        return Task(model, cluster, self.sequence, sequences, constants, imbalance)


def zipf_imbalance(experts: int, ranks: int, exponent: float) -> float:
    """Rows of the busiest of ``ranks`` over the mean where expert i is chosen as often as 1 / i**exponent.

    Experts are dealt out back and forth, so this is a placement that knows the loads.
    """
    loads = [0.0] * ranks
    for number in range(experts):
        turn, place = divmod(number, ranks)
        loads[place if turn % 2 == 0 else ranks - 1 - place] += (number + 1) ** -exponent
    return max(loads) * ranks / sum(loads)


#: DeepSeek-V3's 671B parameters don't fit 128 GPUs.
MODELS = {"deepseek-moe-16b": 16, "gpt-oss-120b": 16, "qwen3-235b-a22b": 16, "deepseek-v3": 64}
LEVELS = (14, 18, 8)
#: Tokens of a sequence; at 8 bytes, where memory binds least, the two that tell most.
LENGTHS = {14: (4096, 16384, 32768, 131072), 18: (4096, 16384, 32768, 131072), 8: (4096, 32768)}


def points() -> Iterator[Point]:
    """Every point of every study."""
    for level in LEVELS:
        for model, nodes in MODELS.items():
            for length in LENGTHS[level]:
                x = f"{length // 1024}K"
                yield Point(f"length at {level} bytes", x, model, length, nodes, level, at=length)
    for level in (14, 18):  # the rival is ahead at one, behind at the other
        for gbit in (50.0, 100.0, 200.0, 400.0, 800.0):
            yield Point("NIC Gbit/s", f"{gbit:g}", nic_gbit=gbit, bytes_per_parameter=level, at=gbit)
    for slow in (1.0, 1.2, 1.5):
        yield Point("one slow GPU", f"{slow:g}x", slow=slow, at=slow)
    for nodes in (16, 2048, 64, 256):
        yield Point("nodes", str(nodes), nodes=nodes, at=nodes)
    yield Point("spine", "1:1")
    for ratio in (4.0, 2.0):
        yield Point("spine", f"{ratio:g}:1, leaves of 4 nodes", oversubscription=ratio, nodes_per_leaf=4)
        yield Point("spine", f"{ratio:g}:1, across rails", oversubscription=ratio, cross_rail=False)
    for exponent in (0.0, 1.0, 0.3, 0.6):
        yield Point("imbalance (Zipf)", f"{exponent:g}", zipf=exponent, at=exponent)
    for levers in LEVERS:
        yield Point("levers", levers, levers=levers)


def studies() -> dict[str, list[Point]]:
    """Points by study, along what it varies where that is a number."""
    found: dict[str, list[Point]] = {}
    for point in points():
        found.setdefault(point.study, []).append(point)
    return {
        name: each if each[0].at is None else sorted(each, key=lambda point: point.at or 0.0)
        for name, each in found.items()
    }


BASE = Point("base", "Qwen3, 4K, 16 nodes, 14 bytes")
