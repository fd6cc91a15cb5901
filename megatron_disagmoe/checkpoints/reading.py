"""Read a torch_dist checkpoint of Megatron without Megatron, a GPU or a process group.

On disk a checkpoint is a folder: ``metadata.json`` (written last, so its absence means an unfinished save),
``.metadata`` (which tensors there are, and in which file each of their chunks lies) and ``*.distcp``. A training run's
``--save`` folder holds one folder a saved iteration and names the last complete one in
``latest_checkpointed_iteration.txt``.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

TRACKER = "latest_checkpointed_iteration.txt"
OPTIMIZER = "optimizer."
"""How the keys of the optimizer's tensors begin; every other tensor is a weight (or a buffer of the model)."""


@dataclass(frozen=True)
class Chunk:
    """A box of one tensor: where it begins and its size in every dimension."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def find(path: Path) -> Path:
    """The checkpoint's own folder, given it or the ``--save`` folder around it (then the last complete one).

    Raises:
        ValueError: where there is none, or one of another format, or one that was not finished.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: name a training run's --save folder, or one iter_... folder in it")
    tracker = path / TRACKER
    if tracker.is_file():
        last = tracker.read_text().strip()
        if last != "release" and not last.isdecimal():
            raise ValueError(f"{tracker} says {last!r}, neither an iteration nor 'release'")
        folder = path / ("release" if last == "release" else f"iter_{int(last):07d}")
        if not folder.is_dir():
            raise ValueError(f"{tracker} names {folder.name}, which is not there")
    else:
        folder = path
    description = folder / "metadata.json"
    if not description.is_file():
        raise ValueError(f"{folder} holds no complete torch_dist checkpoint: {_what_is_there(folder)}")
    try:
        backend = json.loads(description.read_text()).get("sharded_backend")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{description} is damaged: {error}") from error
    if backend != "torch_dist":
        raise ValueError(f"{folder} is a checkpoint of format {backend!r}; only torch_dist is read")
    return folder


def _what_is_there(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if any(name.endswith(".distcp") for name in names):
        return "it was not finished (no metadata.json)"
    if any(name.startswith("mp_rank_") for name in names):
        return "it is of Megatron's old format (mp_rank_...); save it with --ckpt-format torch_dist"
    iterations = [name for name in names if name.startswith("iter_")]
    if iterations:
        return f"it has no {TRACKER}; name one of {', '.join(iterations[-3:])}"
    return "it has no metadata.json"


class Checkpoint:
    """One torch_dist checkpoint on disk.

    Attributes:
        folder: where it lies.
        tensors: shape, type and chunks of every tensor, by key.
        objects: keys of what else is in it (random numbers, common state, ...).
    """

    def __init__(self, path: Path) -> None:
        """Open the checkpoint at ``path`` (see ``find``).

        Raises:
            ValueError: as ``find``, or where its metadata are damaged.
        """
        self.folder = find(path)
        self._reader = FileSystemReader(self.folder)
        try:
            metadata: Metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, AssertionError) as error:
            raise ValueError(f"{self.folder / '.metadata'} is damaged: {error or type(error).__name__}") from error
        entries = metadata.state_dict_metadata
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
        }
        self.objects = [key for key in entries if key not in self.tensors]

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor; homogeneous layers are stacked in its first dimension, experts in the next."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self.tensors[key].properties.dtype

    def chunks(self, key: str) -> Iterator[Chunk]:
        """The boxes in which a tensor was saved: together all of it, each in one file."""
        for chunk in self.tensors[key].chunks:
            yield Chunk(key, tuple(chunk.offsets), tuple(chunk.sizes))

    def read(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """The values in ``chunks`` (any boxes of this checkpoint's tensors), on the CPU.

        Raises:
            ValueError: where a file is missing or damaged, or where it does not hold a whole box.
        """
        into = {(chunk.key, chunk.offsets): torch.empty(chunk.sizes, dtype=self.dtype(chunk.key)) for chunk in chunks}
        items = [item for key in dict.fromkeys(chunk.key for chunk in chunks) for item in self._items(key, chunks)]
        planner = _Into(into)
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except (FileNotFoundError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.folder} cannot be read, it is incomplete or damaged: {error}") from error
        for chunk in chunks:
            if planner.filled[chunk.key, chunk.offsets] != into[chunk.key, chunk.offsets].numel():
                raise ValueError(f"{self.folder} holds {chunk.key} only in part")
        return [into[chunk.key, chunk.offsets] for chunk in chunks]

    def _items(self, key: str, chunks: Sequence[Chunk]) -> list[ReadItem]:
        boxes = [
            ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
            for chunk in chunks
            if chunk.key == key
        ]
        return create_read_items_for_chunk_list(key, self.tensors[key], boxes)


class _Into(DefaultLoadPlanner):
    """Directs what is read into given tensors and counts the elements."""

    def __init__(self, into: dict[tuple[str, tuple[int, ...]], torch.Tensor]) -> None:
        super().__init__()
        self._into = into
        self.filled = dict.fromkeys(into, 0)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        box = self._into[_address(read_item)]
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            box = box.narrow(dimension, start, length)
        return box

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.filled[_address(read_item)] += tensor.numel()


def _address(item: ReadItem) -> tuple[str, tuple[int, ...]]:
    offset = item.dest_index.offset
    assert offset is not None
    return item.dest_index.fqn, tuple(offset)


def is_weight(key: str) -> bool:
    """Whether a tensor belongs to the model rather than to the optimizer."""
    return not key.startswith(OPTIMIZER)


def batches(chunks: Iterable[Chunk], *, num_elements: int) -> Iterator[list[Chunk]]:
    """Cut ``chunks`` into lists of about ``num_elements`` elements, for fewer and larger reads."""
    batch: list[Chunk] = []
    held = 0
    for chunk in chunks:
        batch.append(chunk)
        held += torch.Size(chunk.sizes).numel()
        if held >= num_elements:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
