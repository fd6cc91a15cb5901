"""A checkpoint is found, and read in any boxes; what is not a complete one is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_disagmoe.checkpoints.reading import TRACKER, Checkpoint, Chunk, batches, find
from tests.checkpoint.samples import MOMENT, NORM, WEIGHT, tensors, write


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``--save`` folder with two iterations, the first the last complete one by the tracker."""
    root = tmp_path_factory.mktemp("save")
    write(root / "iter_0000002", tensors(), pieces=3)
    write(root / "iter_0000004", tensors())
    (root / TRACKER).write_text("2\n")
    return root


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


class TestFind:
    def test_the_last_complete_one_of_a_run(self, saved: Path) -> None:
        assert find(saved) == saved / "iter_0000002"

    def test_one_iteration_by_name(self, saved: Path) -> None:
        assert find(saved / "iter_0000004") == saved / "iter_0000004"

    def test_a_release(self, damaged: Path) -> None:
        (damaged / "iter_0000004").rename(damaged / "release")
        (damaged / TRACKER).write_text("release")
        assert find(damaged) == damaged / "release"

    @pytest.mark.parametrize(
        "written, message",
        [("7", "names iter_0000007, which is not there"), ("", "says '', neither an iteration nor 'release'")],
    )
    def test_a_tracker_that_is_wrong(self, damaged: Path, written: str, message: str) -> None:
        (damaged / TRACKER).write_text(written)
        with pytest.raises(ValueError, match=message):
            find(damaged)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"nowhere is not a folder: name a training run's --save folder"):
            find(tmp_path / "nowhere")

    def test_an_unfinished_save(self, damaged: Path) -> None:
        (damaged / "iter_0000002" / "metadata.json").unlink()
        with pytest.raises(ValueError, match=r"iter_0000002 holds no complete.*was not finished \(no metadata\.json\)"):
            find(damaged)

    def test_a_run_that_has_completed_none(self, damaged: Path) -> None:
        (damaged / TRACKER).unlink()
        with pytest.raises(ValueError, match="name one of iter_0000002, iter_0000004"):
            find(damaged)

    def test_an_old_format(self, tmp_path: Path) -> None:
        (tmp_path / "mp_rank_00").mkdir()
        with pytest.raises(ValueError, match="Megatron's old format.*--ckpt-format torch_dist"):
            find(tmp_path)

    def test_another_format(self, damaged: Path) -> None:
        (damaged / "iter_0000002" / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
        with pytest.raises(ValueError, match="of format 'zarr'; only torch_dist is read"):
            find(damaged)

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_a_description_that_is_damaged(self, damaged: Path, text: str) -> None:
        (damaged / "iter_0000002" / "metadata.json").write_text(text)
        with pytest.raises(ValueError, match=r"metadata\.json is damaged"):
            find(damaged)


class TestCheckpoint:
    def test_tensors_and_objects_are_told_apart(self, saved: Path) -> None:
        checkpoint = Checkpoint(saved)
        assert sorted(checkpoint.tensors) == sorted([WEIGHT, NORM, MOMENT])
        assert checkpoint.objects == ["rng_state/shard_0.0_1.1"]
        assert checkpoint.shape(WEIGHT) == (4, 6, 5)
        assert checkpoint.dtype(NORM) is torch.float32

    def test_chunks_are_those_that_were_saved(self, saved: Path) -> None:
        chunks = sorted(Checkpoint(saved).chunks(WEIGHT), key=lambda chunk: chunk.offsets)
        assert [(chunk.offsets, chunk.sizes) for chunk in chunks] == [
            ((0, 0, 0), (2, 6, 5)),
            ((2, 0, 0), (1, 6, 5)),
            ((3, 0, 0), (1, 6, 5)),
        ]

    def test_a_box_across_chunks(self, saved: Path) -> None:
        box = Chunk(WEIGHT, (1, 2, 1), (3, 3, 4))
        norm = Chunk(NORM, (0,), (7,))
        read = Checkpoint(saved).read([box, norm])
        assert torch.equal(read[0], tensors()[WEIGHT][1:4, 2:5, 1:5])
        assert torch.equal(read[1], tensors()[NORM])

    def test_a_missing_file(self, damaged: Path) -> None:
        for file in (damaged / "iter_0000002").glob("*.distcp"):
            file.unlink()
        checkpoint = Checkpoint(damaged)
        with pytest.raises(ValueError, match="iter_0000002 cannot be read, it is incomplete or damaged"):
            checkpoint.read(list(checkpoint.chunks(WEIGHT)))

    def test_a_truncated_file(self, damaged: Path) -> None:
        for file in (damaged / "iter_0000002").glob("*.distcp"):
            file.write_bytes(file.read_bytes()[:100])
        checkpoint = Checkpoint(damaged)
        with pytest.raises(ValueError, match="iter_0000002 cannot be read, it is incomplete or damaged"):
            checkpoint.read(list(checkpoint.chunks(WEIGHT)))

    def test_metadata_that_are_damaged(self, damaged: Path) -> None:
        (damaged / "iter_0000002" / ".metadata").write_bytes(b"\x80\x04")
        with pytest.raises(ValueError, match=r"\.metadata is damaged"):
            Checkpoint(damaged)

    def test_a_chunk_that_is_not_there(self, damaged: Path) -> None:
        checkpoint = Checkpoint(damaged)
        checkpoint.tensors[WEIGHT].chunks.pop()
        with pytest.raises(ValueError, match=f"holds {WEIGHT} only in part"):
            checkpoint.read([Chunk(WEIGHT, (0, 0, 0), (4, 6, 5))])


def test_batches_hold_about_so_many_elements_and_lose_none() -> None:
    chunks = [Chunk("a", (position,), (4,)) for position in range(7)]
    cut = list(batches(chunks, num_elements=8))
    assert [len(batch) for batch in cut] == [2, 2, 2, 1]
    assert [chunk for batch in cut for chunk in batch] == chunks
