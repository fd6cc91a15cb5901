"""Cluster descriptions: what is shipped, and messages that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_disagmoe.files import shipped_folder
from megatron_disagmoe.planner.cluster_import import load_cluster
from megatron_disagmoe.planner.files import read_mapping

CLUSTERS = {
    "h800-16x8": (128, 128),
    "h800-2048x8": (16384, 16384),
    "h100-16x8": (128, 128),
    "b200-16x8": (128, 128),
    "laptop": (4, 0),
}


@pytest.mark.parametrize(("name", "sizes"), CLUSTERS.items())
def test_sizes_and_sources(name: str, sizes: tuple[int, int]) -> None:
    cluster = load_cluster(name)
    assert (cluster.num_gpus, cluster.num_nics) == sizes
    assert cluster.sources
    assert all(pool.gpu.sources for pool in cluster.pools)


def test_the_clusters_are_shipped() -> None:
    shipped = {path.stem for path in (shipped_folder("configs") / "clusters").glob("*.yaml")}
    assert set(CLUSTERS) <= shipped


def _changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """``content`` with the entry at a dotted path replaced."""
    head, _, rest = path.partition(".")
    key: Any = int(head) if head.isdigit() else head
    copy: Any = list(content) if isinstance(content, list) else dict(content)
    copy[key] = _changed(copy[key], rest, value) if rest else value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("pools.0.nvlink_gb_per_s", 0, "nvlink_gb_per_s"),
        ("pools.0.nvlink_gb_per_s", float("nan"), "nvlink_gb_per_s"),
        ("pools.0.nvlink_gb_per_s", float("inf"), "nvlink_gb_per_s"),
        ("pools.0.nics_gbit_per_s", [400, 0], "nics_gbit_per_s.1"),
        ("pools.0.nics_gbit_per_s", [], "nics_gbit_per_s"),
        ("pools.0.num_nodes", 10**9, "num_nodes"),
        ("pools.0.num_nodes", 10**6, "num_nodes x gpus_per_node make 8,000,000 GPUs"),
        ("pools.0.gpus_per_node", 0, "gpus_per_node"),
        ("pools.0.gpu", "h9000", "h9000"),
        ("pools.0.gpu", {"name": "x"}, "peak_tflops"),
        ("pools", [], "pools"),
        ("network.efficiency", 1.5, "efficiency"),
        ("network.oversubscription", 0.5, "oversubscription"),
        ("network.latency_us", -1, "latency_us"),
        ("storage_gb_per_s", "fast", "storage_gb_per_s"),
        ("network.rails", 8, "network.rails"),
    ],
)
def test_a_bad_cluster_names_the_field(path: str, value: Any, field: str, tmp_path: Path) -> None:
    content = read_mapping(shipped_folder("configs") / "clusters" / "h800-16x8.yaml")
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(_changed(content, path, value)))
    with pytest.raises(ValueError, match=field) as caught:
        load_cluster(str(file))
    assert str(file) in str(caught.value)
    assert value == [] or "after validation" not in str(caught.value)  # as a list is whose only item is wrong


def _h800() -> dict[str, Any]:
    configs = shipped_folder("configs")
    gpu = read_mapping(configs / "gpus" / "h800-sxm.yaml")
    return gpu | {"efficiency": read_mapping(configs / "efficiency" / f"{gpu['efficiency']}.yaml")}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("peak_tflops", float("nan"), "peak_tflops"),
        ("reserved_memory_gb", 80, "leaves nothing"),
        ("efficiency.gemm", [[10, 0.5], [5, 0.6]], "must increase"),
        ("efficiency.gemm", [[10, 1.5]], "within"),
        ("efficiency.grouped_gemm", [], "at least one point"),
        ("efficiency.attention", {}, "attention"),
        ("dtype", "fp8", "dtype"),
    ],
)
def test_a_bad_gpu_names_the_field(path: str, value: Any, message: str, tmp_path: Path) -> None:
    gpu = _changed(_h800(), path, value)
    content = read_mapping(shipped_folder("configs") / "clusters" / "h800-16x8.yaml")
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(_changed(content, "pools.0.gpu", gpu)))
    with pytest.raises(ValueError, match=message):
        load_cluster(str(file))


def test_pools_need_different_names(tmp_path: Path) -> None:
    content = read_mapping(shipped_folder("configs") / "clusters" / "h800-16x8.yaml")
    content["pools"] = content["pools"] * 2
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="different names"):
        load_cluster(str(file))
