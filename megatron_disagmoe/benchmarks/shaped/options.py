"""What the command line says, checked before anything starts."""

from __future__ import annotations

from megatron_disagmoe.arguments.flags import DISPATCH, TRANSPORTS
from megatron_disagmoe.benchmarks.shaped.cases import MODELS, Model, Variant, af_variants
from megatron_disagmoe.schedule_choice import NAMES


def model(name: str) -> Model:
    """A model by name; ``ValueError`` for another."""
    if name not in MODELS:
        raise ValueError(f"--model {name!r}: choose from {', '.join(MODELS)}")
    return MODELS[name]


def counts(text: str) -> list[int]:
    """Numbers of hosts; ``ValueError`` where one is none."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--hosts {text!r}: whole numbers with commas between, such as 2,4") from None


def links(text: str) -> list[float | None]:
    """Limits in Gbit/s; ``ValueError`` where one is neither a number nor none."""
    try:
        return [None if word == "none" else float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--links {text!r}: Gbit/s or none, with commas between: none,1,0.5") from None


def variants(transports: str, dispatch: str, schedules: str) -> list[Variant]:
    """Every combination; ``ValueError`` for a name that does not exist."""
    lists = []
    for flag, text, known in (
        ("--transports", transports, TRANSPORTS),
        ("--dispatch", dispatch, DISPATCH),
        ("--schedules", schedules, NAMES),
    ):
        words = tuple(text.split(","))
        wrong = [word for word in words if word not in known]
        if wrong or len(set(words)) != len(words):
            raise ValueError(f"{flag} {text!r}: choose from {', '.join(known)}, each once, with commas between")
        lists.append(words)
    return af_variants(*lists)
