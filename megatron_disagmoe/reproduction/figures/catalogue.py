"""Every figure by its name."""

from __future__ import annotations

from megatron_disagmoe.reproduction.figures import allocation, breakdown, end_to_end
from megatron_disagmoe.reproduction.figures.base import Figure

FIGURES: dict[str, Figure] = {
    figure.name: figure for figure in (*breakdown.FIGURES, *end_to_end.FIGURES, *allocation.FIGURES)
}


def figures(name: str) -> tuple[Figure, ...]:
    """One figure, or all; ``fig6`` is ``fig6a``.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "all":
        return tuple(FIGURES.values())
    name = "fig6a" if name == "fig6" else name
    if name not in FIGURES:
        raise ValueError(f"there is no figure {name!r}; choose among {', '.join(FIGURES)}, all, beyond")
    return (FIGURES[name],)
