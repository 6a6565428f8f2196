"""What runs a network token by token: prompts are prefilled, sequences step, fork, and are freed.

A :class:`Backend` is all that decoding knows of a network (:mod:`luthier.models.decoding`, and the
server above it), so that another engine can stand in its place. :data:`BACKENDS` is the table; the
environment variable ``LUTHIER_BACKEND`` chooses from it, for the server, the commands, evaluation and
rollouts alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from luthier.errors import RecipeError
from luthier.plugins import PluginTable

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.models.network import Network
    from luthier.types import IntArray

SETTING = "LUTHIER_BACKEND"


class State(Protocol):
    """What a network keeps of one sequence."""

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be read."""
        ...


class Backend(Protocol):
    """Runs one network. Prompts are token ids, a soft prompt included."""

    context: int
    """Tokens of prompt and answer together at most."""
    network: Network
    """What it runs."""

    @property
    def rows(self) -> int:
        """Sequences that step together at most; further ones step after them."""
        ...

    def bytes_of(self, tokens: int) -> int:
        """Memory that a sequence of ``tokens`` takes at most."""
        ...

    def open(self, ids_T: IntArray) -> State:
        """A sequence with nothing read of its prompt yet."""
        ...

    def prefill(self, state: State) -> Tensor | None:
        """Read the next chunk; with the last one, logits ``[V]`` of the first token to write."""
        ...

    def prefill_batch(self, prompts: Sequence[IntArray], copies: int) -> tuple[list[State], Tensor]:
        """Read whole prompts together: ``copies`` sequences of each side by side, logits ``[R, V]``.

        Faster than one after the other, and the same up to rounding.
        """
        ...

    def fork(self, state: State, copies: int) -> list[State]:
        """``copies`` sequences that go on from a prompt that was read; ``state`` is used up."""
        ...

    def step(self, states: Sequence[State], tokens: Sequence[int]) -> Tensor:
        """Append a token to each sequence; logits ``[R, V]`` of the next ones."""
        ...

    def free(self, state: State) -> None:
        """Give the memory of a sequence back."""
        ...

    def close(self) -> None:
        """Let go of all sequences; the network stays."""
        ...


OpenBackend = Callable[["Network", int, bool], Backend]
"""Runs a network in eval mode whose sequences are of so many tokens at most. Where the last is true,
each sequence has the same bits whatever steps beside it, however slow that may be."""


@dataclass(frozen=True)
class BackendEntry:
    """A backend by name."""

    id: str
    open: OpenBackend


def _open_torch(network: Network, context: int, exact: bool) -> Backend:
    from luthier.models.torch_backend import torch_backend  # torch is not needed to list backends

    return torch_backend(network, context, exact)


BACKENDS: PluginTable[BackendEntry] = PluginTable(
    "backends", BackendEntry, {"torch": BackendEntry("torch", _open_torch)}
)


def chosen_backend() -> BackendEntry:
    """The backend that ``LUTHIER_BACKEND`` names; torch where it is not set.

    Raises:
        RecipeError: for a backend that is not there, or whose package cannot be used.
    """
    name = os.environ.get(SETTING) or "torch"
    if name not in BACKENDS:
        names = list(BACKENDS)
        there = "there is only" if len(names) == 1 else "there are"
        raise RecipeError(f"{SETTING} is {name!r}, and {there} {', '.join(names)}")
    return BACKENDS[name]


def backend_of(network: Network, context: int, exact: bool = False) -> Backend:
    """The way to run ``network`` that was chosen; see :data:`OpenBackend`.

    Raises:
        RecipeError: as :func:`chosen_backend` does.
    """
    return chosen_backend().open(network, context, exact)
