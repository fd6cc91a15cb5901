"""The table of roles printed once the model is built."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_disagmoe import arguments, parallel_state

_COLUMNS = ("rank", "host", "role", "group", "replica", "layers", "parameters")


def announcing(original: Callable[..., Any]) -> Callable[..., Any]:
    """``setup_model_and_optimizer`` that prints the table of roles when it is done."""

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        print_roles(unwrap_model(result[0][0]))
        return result

    return setup_model_and_optimizer


def print_roles(model: Any) -> None:
    """Gather every rank's row on rank 0 and print them; collective over the world."""
    state = parallel_state.state()
    layout = arguments.layout(get_args())
    layers = (layout.attention_layers if state.is_attention else layout.ffn_layers)(
        state.topology.placement, state.role.group.index
    )
    extras = [name for name, here in (("embedding", state.is_first), ("loss", state.is_tail)) if here]
    row = (
        str(dist.get_rank()),
        socket.gethostname(),
        ", ".join(["attention" if state.is_attention else "FFN", *(extras if state.is_attention else [])]),
        f"{state.role.group}[{state.role.index}]",
        str(state.role.replica),
        ",".join(map(str, layers)),
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
    )
    rows: list[Any] | None = [None] * state.world_size if dist.get_rank() == 0 else None
    dist.gather_object(row, rows, dst=0)
    if rows is not None:
        print(f"AF-pipe: {get_args().af_schedule}, dispatch {get_args().af_dispatch}", flush=True)
        for line in format_table([_COLUMNS, *rows]):
            print(line, flush=True)


def format_table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their widest cell, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
