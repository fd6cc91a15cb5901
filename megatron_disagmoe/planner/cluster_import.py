"""Clusters from YAML."""

from __future__ import annotations

from megatron_disagmoe.planner.cluster_spec import Cluster
from megatron_disagmoe.planner.files import find_config, read_mapping, validate


def load_cluster(name_or_path: str) -> Cluster:
    """A shipped cluster by name, or a YAML file.

    Raises:
        ValueError: naming the file and the field.
        OSError: not readable.
    """
    path = find_config("clusters", name_or_path)
    return validate(Cluster, read_mapping(path), source=str(path))
