"""The stand-ins for torch.cuda answer as Megatron needs, and go away without a trace."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron_disagmoe import megatron_seams
from megatron_disagmoe.cpu import megatron_patches, torch_stand_ins

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without CUDA")


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """The stand-ins in place for one test."""
    symbols = [stand_in.symbol for stand_in in torch_stand_ins.stand_ins()]
    torch_stand_ins.install()
    yield
    for symbol in reversed(symbols):
        megatron_seams.restore(symbol)


def attributes() -> dict[str, object]:
    owners = {"torch": torch, "cuda": torch.cuda, "nvtx": torch.cuda.nvtx, "Tensor": torch.Tensor}
    return {f"{name}.{key}": value for name, owner in owners.items() for key, value in vars(owner).items()}


def test_installed_and_restored_torch_is_as_it_was() -> None:
    # Loaded only when first asked for.
    before = attributes()
    torch_stand_ins.install()
    assert attributes() != before
    for stand_in in reversed(torch_stand_ins.stand_ins()):
        megatron_seams.restore(stand_in.symbol)
    assert attributes() == before


def test_every_name_has_an_object_of_its_own() -> None:
    functions = [stand_in.value for stand_in in torch_stand_ins.stand_ins()]
    assert len({id(function) for function in functions}) == len(functions)


def test_a_name_that_torch_has_dropped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "current_device")
    with pytest.raises(megatron_seams.SeamGone, match=r"torch 2\..* has no usable torch\.cuda:current_device"):
        torch_stand_ins.install()


@pytest.mark.usefixtures("on_cpu")
class TestInPlace:
    def test_there_is_one_device_but_no_cuda(self) -> None:
        assert torch.cuda.device_count() == 1
        assert torch.device(torch.cuda.current_device()) == torch.device("cpu")
        assert not torch.cuda.is_available()

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: torch.zeros(1, device=torch.device("cuda", 0)),
            lambda: torch.full((1,), 2.0, device="cuda:0"),
            lambda: torch.empty_like(torch.ones(1), device="cuda"),
            lambda: torch.ones(1).cuda(non_blocking=True),
            lambda: torch.ones(1).to("cuda", torch.float64),
            lambda: torch.ones(1).to(device="cuda"),
            lambda: torch.nn.Linear(1, 1).cuda().weight,
            lambda: torch.nn.Linear(1, 1).to("cuda").weight,
            lambda: torch.ones(1).pin_memory(),
        ],
    )
    def test_tensors_meant_for_cuda_lie_on_the_cpu(self, make: object) -> None:
        assert make().device == torch.device("cpu")  # type: ignore[operator]

    def test_to_still_converts(self) -> None:
        assert torch.ones(1).to("cuda", torch.float64).dtype == torch.float64
        assert torch.ones(1).to(torch.bfloat16).dtype == torch.bfloat16
        assert torch.ones(1).to(torch.ones(1, dtype=torch.int64)).dtype == torch.int64

    @pytest.mark.parametrize(
        "dtype, name",
        [
            (torch.float32, "torch.cuda.FloatTensor"),
            (torch.float16, "torch.cuda.HalfTensor"),
            (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
            (torch.int64, "torch.LongTensor"),
        ],
    )
    def test_type_names_are_those_that_optimizers_compare_with(self, dtype: torch.dtype, name: str) -> None:
        assert torch.ones(1, dtype=dtype).type() == name
        assert torch.ones(1, dtype=dtype).type(torch.float64).dtype == torch.float64

    def test_the_cuda_generator_is_the_cpus(self) -> None:
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(3)
        torch.manual_seed(7)
        assert torch.equal(torch.rand(3), drawn)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), drawn)

    def test_a_data_loader_draws_nothing_from_the_models_generator(self) -> None:
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        list(torch.utils.data.DataLoader(range(3)))  # type: ignore[arg-type]
        assert torch.equal(torch.rand(3), expected)

    def test_shuffling_still_follows_the_seed(self) -> None:
        def order(seed: int) -> list[int]:
            torch.manual_seed(seed)
            return [int(item) for item in torch.utils.data.DataLoader(range(50), shuffle=True)]  # type: ignore[arg-type]

        assert order(1) == order(1) != order(2)

    def test_streams_are_one_and_events_tell_time(self) -> None:
        stream, event = torch.cuda.Stream(device="cuda"), torch.cuda.Event(enable_timing=True)
        assert stream == torch.cuda.current_stream()
        event.record()
        later = stream.record_event()
        assert later.query()
        assert event.elapsed_time(later) >= 0.0
        with torch.cuda.stream(stream):
            torch.cuda.synchronize()

    def test_compile_gives_the_function_back(self) -> None:
        def function() -> None: ...

        assert torch.compile(function) is function
        assert torch.compile(dynamic=True)(function) is function

    def test_memory_statistics_are_zeros(self) -> None:
        assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0
        assert torch.cuda.memory_allocated() == torch.cuda.max_memory_reserved() == torch.cuda.device_memory_used() == 0


def test_megatrons_tracker_keeps_states_apart(on_cpu: None) -> None:
    """What a fork draws depends on its own seed alone, and the default state goes on as if nothing had been."""
    random = "megatron.core.tensor_parallel.random"
    with (
        megatron_seams.patched(f"{random}:_get_cuda_rng_state", megatron_patches._get_rng_state),
        megatron_seams.patched(f"{random}:_set_cuda_rng_state", megatron_patches._set_rng_state),
    ):
        tracker = megatron_seams.resolve(f"{random}:CudaRNGStatesTracker")()
        tracker.add("a", 11)
        torch.manual_seed(5)
        before = torch.rand(2)
        with tracker.fork("a"):
            first = torch.rand(2)
        after = torch.rand(2)
        with tracker.fork("a"):
            second = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4), torch.cat([before, after]))
    torch.manual_seed(11)
    assert torch.equal(torch.rand(4), torch.cat([first, second]))


def test_splits_asked_for_in_numpy_are(on_cpu: None) -> None:
    move = megatron_patches._with_numpy_splits(lambda tensor, **_: tensor)
    splits = move(torch.tensor([3, 0, 5]), as_numpy=True)
    assert isinstance(splits, np.ndarray)
    assert splits.tolist() == [3, 0, 5]
    assert move(None, as_numpy=True) is None
    assert torch.is_tensor(move(torch.tensor(2)))


def test_checkpoint_results_come_through_a_forked_manager() -> None:
    asked: list[str] = []
    megatron_patches._by_fork(asked.append)()
    megatron_patches._by_fork(asked.append)("spawn")
    assert asked == ["fork", "fork"]
