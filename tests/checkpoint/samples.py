"""Small torch_dist checkpoints written with torch alone, in pieces as a job of several ranks would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

WEIGHT = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"
MOMENT = f"optimizer.state.exp_avg.{WEIGHT}"


def tensors() -> dict[str, torch.Tensor]:
    """A stacked weight, a vector and a moment; every value different."""
    return {
        WEIGHT: torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5),
        NORM: torch.linspace(-1, 1, 7),
        MOMENT: torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5) / 1000,
    }


def write(folder: Path, values: Mapping[str, torch.Tensor], *, pieces: int = 1) -> Path:
    """A checkpoint of ``values``, each cut into up to ``pieces`` along its first dimension; ``folder``."""
    state: dict[str, Any] = {key: _Pieces(value, pieces) for key, value in values.items()}
    state["rng_state/shard_0.0_1.1"] = "not a tensor"
    save(state, storage_writer=FileSystemWriter(folder), planner=_InPieces(), no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


class _Pieces:
    """A tensor that is saved in several chunks."""

    def __init__(self, tensor: torch.Tensor, pieces: int) -> None:
        self._size = tensor.size()
        self.chunks = [chunk.clone() for chunk in tensor.tensor_split(pieces)]

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        items, start = [], 0
        for position, chunk in enumerate(self.chunks):
            offsets = torch.Size([start, *[0] * (chunk.dim() - 1)])
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=chunk.size()),
                properties=TensorProperties.create_from_tensor(chunk),
                size=self._size,
            )
            items.append(WriteItem(MetadataIndex(key, offsets, position), WriteItemType.SHARD, tensor_data=data))
            start += chunk.size(0)
        return items


class _InPieces(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.chunks[index.index or 0] if isinstance(found, _Pieces) else found
