"""Stand-ins for the parts of ``torch.cuda`` that Megatron uses without asking whether there is a device.

One function object per name: dynamo refuses two names for one object ("Duplicate torch object").
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.data

from megatron_disagmoe import megatron_seams

CPU = torch.device("cpu")

FACTORIES = (
    "arange empty empty_like eye full full_like linspace ones ones_like rand rand_like randint randn randn_like "
    "tensor zeros zeros_like"
).split()
"""Tensor makers that are called with a literal ``device="cuda"``."""

CUDA_TYPE_NAMES = {f"torch.{kind}": f"torch.cuda.{kind}" for kind in ("FloatTensor", "HalfTensor", "BFloat16Tensor")}


class Stream:
    """The one stream of a CPU: work is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *_args: object, **_options: object) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority."""
        return (0, 0)

    def record_event(self, event: Event | None = None) -> Event:
        """An event that has happened."""
        event = event or Event()
        event.record(self)
        return event

    def wait_stream(self, stream: Stream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def __eq__(self, other: object) -> bool:
        """All streams are the same one, so "am I on a side stream?" is answered with no."""
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """A point in host time."""

    def __init__(self, *_args: object, **_options: object) -> None:
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Remember now."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from here to ``end``."""
        return (end._seconds - self._seconds) * 1e3

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True


@dataclass(frozen=True)
class StandIn:
    """One name of torch and what takes its place here, with the reason."""

    symbol: str
    value: Any
    reason: str


def install() -> None:
    """Put every stand-in in its place; ``SeamGone`` where torch no longer has the name."""
    for stand_in in stand_ins():
        megatron_seams.patch(stand_in.symbol, stand_in.value)


def stand_ins() -> list[StandIn]:
    """The whole list, in order."""
    return [*_device(), *_streams(), *_memory(), *_random_numbers(), *_tensors(), *_compilation()]


def _device() -> Iterator[StandIn]:
    properties = SimpleNamespace(name="CPU", major=10, minor=0, total_memory=0, multi_processor_count=1)
    identity = "Megatron passes it on as device="
    yield StandIn("torch.cuda:current_device", lambda: CPU, identity)
    yield StandIn(
        "torch.cuda:device_count",
        lambda: 1,
        "initialize.py makes the parallel groups and the expert seeds only where it is > 0",
    )
    yield StandIn("torch.cuda:set_device", lambda device: None, "called with LOCAL_RANK at start")
    yield StandIn(
        "torch.cuda:get_device_properties",
        lambda device=None: properties,
        "validate_args asks for the architecture; 10 keeps it from demanding CUDA_DEVICE_MAX_CONNECTIONS=1",
    )
    yield StandIn(
        "torch.cuda:get_device_capability",
        lambda device=None: (properties.major, properties.minor),
        "validate_args demands >= 8 for --moe-grouped-gemm",
    )
    yield StandIn("torch.cuda:get_device_name", lambda device=None: properties.name, "printed in reports")


def _streams() -> Iterator[StandIn]:
    reason = "a CPU has one stream and never waits for it"

    @contextmanager
    def stream(stream: Stream | None) -> Iterator[Stream | None]:
        yield stream

    yield StandIn("torch.cuda:Stream", Stream, reason)
    yield StandIn("torch.cuda:Event", Event, reason)
    yield StandIn("torch.cuda:stream", stream, reason)
    yield StandIn("torch.cuda:current_stream", lambda device=None: Stream(), reason)
    yield StandIn("torch.cuda:default_stream", lambda device=None: Stream(), reason)
    yield StandIn("torch.cuda:set_stream", lambda stream: None, reason)
    yield StandIn("torch.cuda:synchronize", lambda device=None: None, reason)
    yield StandIn("torch.cuda.nvtx:range_push", lambda message: 0, "profiler ranges need libnvToolsExt")
    yield StandIn("torch.cuda.nvtx:range_pop", lambda: 0, "profiler ranges need libnvToolsExt")


def _memory() -> Iterator[StandIn]:
    yield StandIn(
        "torch.cuda:memory_stats", lambda device=None: defaultdict(int), "indexed by name for TensorBoard: zeros"
    )
    yield StandIn("torch.cuda:device_memory_used", lambda device=None: 0, "--log-device-memory-used asks the driver")


def _random_numbers() -> Iterator[StandIn]:
    reason = "tensors live on the CPU, so its generator is the one Megatron's trackers must save and seed"

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    yield StandIn("torch.cuda:get_rng_state", lambda device="cuda": torch.get_rng_state(), reason)
    yield StandIn("torch.cuda:set_rng_state", lambda state, device="cuda": torch.set_rng_state(state), reason)
    yield StandIn("torch.cuda:manual_seed", manual_seed, reason)
    yield StandIn(
        "torch.utils.data:DataLoader.__init__",
        _with_own_generator(torch.utils.data.DataLoader.__init__),
        "a new iterator draws a seed from the CPU's generator, which dropout uses here: a resumed run would diverge",
    )


def _tensors() -> Iterator[StandIn]:
    yield StandIn("torch:Tensor.cuda", lambda self, *args, **options: self, "moves batches and the model to the device")
    yield StandIn("torch:Tensor.pin_memory", lambda self, *args, **options: self, "needs a CUDA context")
    yield StandIn("torch:Tensor.record_stream", lambda self, stream: None, "there is no caching allocator to tell")
    yield StandIn("torch:Tensor.to", _to(torch.Tensor.to), "called with a literal 'cuda'")
    yield StandIn(
        "torch:Tensor.type",
        _type(torch.Tensor.type),
        "optimizers and clip_grads compare it with 'torch.cuda.FloatTensor' and the like",
    )
    for name in FACTORIES:
        yield StandIn(f"torch:{name}", _on_cpu(getattr(torch, name)), "called with a literal device='cuda'")


def _compilation() -> Iterator[StandIn]:
    def compile(model: Callable[..., Any] | None = None, **options: object) -> Callable[..., Any]:
        return model if model is not None else lambda function: function

    yield StandIn(
        "torch:compile",
        compile,
        "Megatron compiles small fusions for GPUs; on a CPU that costs 4 s at start and gains nothing",
    )


def _with_own_generator(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        if options.get("generator") is None:
            options["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        original(self, *args, **options)

    return init


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **options: Any) -> torch.Tensor:
        if "device" in options and _is_cuda(options["device"]):
            options["device"] = CPU
        return factory(*args, **options)

    return make


def _to(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if "device" in options and _is_cuda(options["device"]):
            options["device"] = CPU
        return original(self, *args, **options)

    return to


def _type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        return CUDA_TYPE_NAMES.get(result, result) if isinstance(result, str) else result

    return type
