"""Whether a job fits into the memory there is, and what would make it fit where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from luthier.adaptations import ADAPTATIONS, Adaptation
from luthier.engine.estimate import (
    PROCESS,
    MemoryEstimate,
    estimate_memory,
    trained_numbers,
    weight_bytes,
)
from luthier.errors import DoesNotFit, RefusedInput
from luthier.models.catalog import CATALOG
from luthier.models.heads import Head
from luthier.models.load import catalogue_config, sketch_of
from luthier.objectives import Objective
from luthier.recipe import Recipe

SHOWN = 3
"""Ways out that are named."""


@dataclass(frozen=True)
class Sketched:
    """A network without its numbers, as it will train, and the memory that takes."""

    model: nn.Module
    memory: MemoryEstimate


def sketched(
    config: Any, objective: Objective, adaptation: Adaptation, size: int, head: Head | None = None
) -> Sketched:
    """The network of ``config`` with the head of ``objective`` and ``adaptation`` attached.

    ``size`` is the bytes of a number in the working type. ``head`` stands in where the objective has
    seen no rows yet.

    Raises:
        RefusedInput: where network, objective and adaptation do not go together.
    """
    model = sketch_of(config, head or objective.head())
    plain = weight_bytes(model, size)
    with torch.device("meta"):
        adaptation.attach(model)
        objective.extend(model)
    memory = estimate_memory(model, size, plain, adaptation.calibration_bytes(model))
    start = trained_numbers(model) * size if objective.refers else 0
    return Sketched(model, memory.beside(start))


@dataclass(frozen=True)
class Asked:
    """What a job is to hold in memory."""

    config: Any
    """transformers' configuration of the network."""
    objective: Objective
    adaptation: Adaptation
    size: int
    """Bytes of a number in the working type."""
    beside: int
    """Bytes of the further networks it holds."""
    tokens: int
    """Distinct tokens in a micro-batch."""
    longest: int
    """Tokens of the longest row: no micro-batch can be smaller."""


def check_memory(asked: Asked, memory: MemoryEstimate, available: int) -> None:
    """Refuse a run whose estimated peak is more than what is free, and name what would fit.

    Raises:
        DoesNotFit: each way out it names was estimated too, and fits.
    """
    peak = memory.peak(asked.tokens)
    if _fits(peak, available):
        return
    ways = [way for _, way in zip(range(SHOWN), _ways(asked, memory, available), strict=False)]
    advice = "\n".join(f"  {way}" for way in ways)
    raise DoesNotFit(
        f"this run needs about {peak / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are "
        f"free ({max(memory.fixed, memory.least) / 1e9:.1f} GB whatever the batch, "
        f"{memory.per_token * asked.tokens / 1e9:.1f} GB for micro-batches of {asked.tokens} tokens). "
        + (
            f"What would fit:\n{advice}"
            if ways
            else "Nothing that is known here would fit: free some memory, or use a larger machine."
        )
    )


def _fits(peak: int, available: int) -> bool:
    # What the process holds already is part of the estimate, not of what it may still take.
    return peak - PROCESS <= available


def _ways(asked: Asked, memory: MemoryEstimate, available: int) -> Iterator[str]:
    """Changes that make it fit, the smallest first; each is estimated as the job itself is."""
    if (tokens := _tokens(memory, asked, available)) is not None:
        yield f"`training.micro_batch_tokens={tokens}` ({memory.peak(tokens) / 1e9:.1f} GB)"
    elif (room := _room(memory, available)) >= 32:
        yield f"rows of at most {room:,} tokens (the longest has {asked.longest:,})"
    usual = Recipe.model_fields["adaptation"].get_default(call_default_factory=True).method
    for name in dict.fromkeys([usual, *ADAPTATIONS]):
        if name != asked.adaptation.method:
            other = ADAPTATIONS[name].model_validate({})
            yield from _changed(
                f"`adaptation.method={name}`", asked, asked.config, other, available
            )
    for entry in CATALOG.values():
        config = catalogue_config(entry, asked.objective.head())
        change = f"`base={entry.id}`"
        if config.hidden_size < asked.config.hidden_size:
            yield from _changed(change, asked, config, asked.adaptation, available)


def _changed(
    change: str, asked: Asked, config: Any, adaptation: Adaptation, available: int
) -> Iterator[str]:
    """The change, where the job fits with it."""
    try:
        memory = sketched(config, asked.objective, adaptation, asked.size).memory
    except RefusedInput:
        return
    memory = memory.beside(asked.beside)
    tokens = _tokens(memory, asked, available)
    if tokens is not None:
        smaller = f" `training.micro_batch_tokens={tokens}`" * (tokens < asked.tokens)
        yield f"{change}{smaller} ({memory.peak(tokens) / 1e9:.1f} GB)"


def _room(memory: MemoryEstimate, available: int) -> int:
    """Tokens of a micro-batch that fit beside what is held whatever the batch."""
    if not _fits(memory.least, available):
        return 0
    return max(0, (available + PROCESS - memory.fixed) // max(1, memory.per_token))


def _tokens(memory: MemoryEstimate, asked: Asked, available: int) -> int | None:
    """The largest micro-batch that fits, at most what was asked for; ``None`` where none does."""
    tokens = min(asked.tokens, _room(memory, available))
    return tokens if tokens >= min(asked.longest, asked.tokens) else None
