"""Two checkpoints compared by key, shape, type and value; and whether one holds what a run asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_disagmoe.checkpoints.difference import Difference, compare, largest_difference, misfits
from megatron_disagmoe.checkpoints.reading import Checkpoint
from tests.checkpoint.samples import MOMENT, NORM, WEIGHT, tensors, write

Values = dict[str, torch.Tensor]


@pytest.fixture
def difference(tmp_path: Path) -> Callable[..., Difference]:
    """``difference(change)``: the sample beside itself after ``change(values)``, saved in other pieces."""

    def run(change: Callable[[Values], None] = lambda values: None, *, optimizer: bool = False) -> Difference:
        values = tensors()
        change(values)
        folder = tmp_path / f"optimizer-{optimizer}"
        first = Checkpoint(write(folder / "a", tensors(), pieces=3))
        second = Checkpoint(write(folder / "b", values, pieces=2))
        return compare(first, second, optimizer=optimizer)

    return run


def test_equal_however_they_were_cut(difference: Callable[..., Difference]) -> None:
    found = difference(optimizer=True)
    assert found.equal
    assert found == Difference(num_compared=3)
    assert found.max_abs_difference == 0.0


def test_other_values_are_measured_at_their_place(difference: Callable[..., Difference]) -> None:
    def change(values: Values) -> None:
        values[WEIGHT][0, 0, 0] += 0.5
        values[WEIGHT][3, 5, 4] -= 2.0

    found = difference(change)
    assert not found.equal
    assert found.values == {WEIGHT: 2.0}
    assert found.max_abs_difference == 2.0
    assert found.num_compared == 2


def test_keys_that_one_lacks(difference: Callable[..., Difference]) -> None:
    def change(values: Values) -> None:
        values["new"] = values.pop(NORM)

    found = difference(change)
    assert (found.missing, found.unexpected, found.equal) == ([NORM], ["new"], False)


def test_shapes_and_types(difference: Callable[..., Difference]) -> None:
    def change(values: Values) -> None:
        values[WEIGHT] = values[WEIGHT][:2]
        values[NORM] = values[NORM].bfloat16()

    found = difference(change)
    assert found.shapes == {WEIGHT: ((4, 6, 5), (2, 6, 5))}
    assert found.dtypes == {NORM: (torch.float32, torch.bfloat16)}
    assert list(found.values) == [NORM]  # rounded
    assert found.num_compared == 1


def test_a_type_alone_makes_a_difference(difference: Callable[..., Difference]) -> None:
    found = difference(lambda values: values.update({WEIGHT: values[WEIGHT].double()}))
    assert not found.values
    assert not found.equal


def test_the_optimizer_counts_only_if_asked(difference: Callable[..., Difference]) -> None:
    def change(values: Values) -> None:
        values[MOMENT] += 1
        values["optimizer.state.fp32_param.x"] = torch.zeros(2)

    assert difference(change).equal
    found = difference(change, optimizer=True)
    assert found.unexpected == ["optimizer.state.fp32_param.x"]
    assert found.values == {MOMENT: pytest.approx(1.0)}


def test_as_json_has_no_infinity(difference: Callable[..., Difference]) -> None:
    found = difference(lambda values: values[NORM].fill_(math.nan)).as_json()
    assert found["equal"] is False
    assert found["max_abs_difference"] is None
    assert found["different"] == {NORM: None}
    assert found["missing"] == found["unexpected"] == []


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([math.nan, math.inf, -math.inf], [math.nan, math.inf, -math.inf], 0.0),
        ([math.nan, 0.0], [0.0, 0.0], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([math.inf], [1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_largest_difference(a: list[float], b: list[float], expected: float) -> None:
    assert largest_difference(torch.tensor(a), torch.tensor(b)) == expected


def test_large_integers_are_not_rounded_together() -> None:
    # Neighbours above 2**53, which are one number in double precision.
    assert largest_difference(torch.tensor([2**60]), torch.tensor([2**60 + 1])) > 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write(tmp_path_factory.mktemp("save") / "iter", tensors()))


WANTED: dict[str, tuple[int | None, ...]] = {WEIGHT: (4, 6, 5), NORM: (7,), MOMENT: (4, 6, 5)}


class TestMisfits:
    def test_none(self, checkpoint: Checkpoint) -> None:
        assert misfits(WANTED, checkpoint) == []

    def test_the_optimizer_need_not_be_loaded(self, checkpoint: Checkpoint) -> None:
        assert misfits({WEIGHT: (4, 6, 5), NORM: (7,)}, checkpoint) == []

    def test_a_size_that_may_differ(self, checkpoint: Checkpoint) -> None:
        assert misfits({**WANTED, WEIGHT: (None, 6, 5)}, checkpoint) == []

    def test_every_fault_is_named(self, checkpoint: Checkpoint) -> None:
        wanted: dict[str, tuple[int | None, ...]] = {WEIGHT: (None, 6, 9), "decoder.new": (1,)}
        assert misfits(wanted, checkpoint) == [
            "weights of the model that it lacks: decoder.new",
            f"weights in it that the model has no place for: {NORM}",
            f"another shape: {WEIGHT} is 4x6x5 there and anyx6x9 here",
            "give the flags of the model that was saved",
        ]

    def test_a_number_of_dimensions(self, checkpoint: Checkpoint) -> None:
        assert "another shape" in misfits({**WANTED, NORM: (7, 1)}, checkpoint)[0]

    def test_state_of_the_optimizer_has_its_own_remedy(self, checkpoint: Checkpoint) -> None:
        [message] = misfits({**WANTED, "optimizer.state.momentum_buffer.x": (1,)}, checkpoint)
        assert message == "state of the optimizer that it lacks: optimizer.state.momentum_buffer.x; add --no-load-optim"

    def test_long_lists_are_cut(self, checkpoint: Checkpoint) -> None:
        wanted = {**WANTED, **{f"w{number:02}": (1,) for number in range(11)}}
        assert misfits(wanted, checkpoint)[0].endswith("w07 and 3 more")
