"""What runs a network token by token: prompts are prefilled, sequences step, fork, and are freed.

A :class:`Backend` is all that decoding knows of a network (:mod:`luthier.models.decoding`, and the
server above it), so that another engine can stand in its place. :data:`BACKENDS` is the table; the
environment variable ``LUTHIER_BACKEND`` chooses from it, for the server, the commands and evaluation
alike. Where that is one that runs files, a network in memory, whose weights may change with the next
step, runs by torch: rollouts do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from luthier.errors import RecipeError
from luthier.plugins import PluginTable

if TYPE_CHECKING:
    from torch import Tensor, device

    from luthier.models.kv_cache import KeyValues
    from luthier.models.network import Network
    from luthier.models.speculation import Speculation
    from luthier.types import IntArray

SETTING = "LUTHIER_BACKEND"
ADAPTERS_SETTING = "LUTHIER_ADAPTERS"
LLAMA_CPP, LLAMA_CPP_VERSION = "xllamacpp", "2026.10.11549"
"""The wheel whose library :mod:`luthier.models.llama_cpp` knows."""


def llama_cpp_library() -> Path | None:
    """The shared library of the wheel, of whatever version; ``None`` where it is not installed."""
    spec = find_spec(LLAMA_CPP)
    folder = next(iter((spec and spec.submodule_search_locations) or ()), None)
    return None if folder is None else next(Path(folder).glob(f"{LLAMA_CPP}.*so"), None)


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

    @property
    def device(self) -> device:
        """Where its logits are."""
        ...

    @property
    def rows(self) -> int:
        """Sequences that step together at most; further ones step after them."""
        ...

    @property
    def sequences(self) -> int:
        """Sequences that may be open at once."""
        ...

    def bytes_of(self, tokens: int) -> int:
        """Memory that a sequence of ``tokens`` takes at most."""
        ...

    def open(self, ids_T: IntArray) -> State:
        """A sequence with nothing read of its prompt yet."""
        ...

    def prefill(self, states: Sequence[State]) -> list[Tensor | None]:
        """Read on in each prompt; at its end, logits ``[V]`` of the first token to write."""
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
        """Let go of all sequences, and of what it opened itself; a network that it was given stays."""
        ...


FEWEST_SHARED = 32
"""Tokens that a prompt has to have in common with an earlier one, as fewer are read as fast."""


@runtime_checkable
class ReusesKeyValues(Protocol):
    """A backend that can continue from the keys and values of a prompt with the same beginning."""

    @property
    def reuses(self) -> bool:
        """Whether this network can; a prefix of keys and values rules it out."""
        ...

    def open(self, ids_T: IntArray, start: KeyValues | None = None) -> State:
        """A sequence whose prompt is read from behind ``start`` on."""
        ...

    def key_values(self, state: State, start: int, end: int) -> KeyValues:
        """A copy of those of a prompt that was read, for tokens from ``start`` to ``end``."""
        ...


@runtime_checkable
class Speculates(Protocol):
    """A backend whose steps check guesses of what their sequences write next."""

    def speculation(self, state: State) -> Speculation:
        """What was guessed for a sequence so far."""
        ...


@runtime_checkable
class ReopenableBackend(Backend, Protocol):
    """A backend of a network in memory that can be used again after :meth:`Backend.close`."""

    def reopen(self) -> None:
        """Allow new sequences, which use the weights that the network has now."""
        ...


@runtime_checkable
class AdapterBackend(Backend, Protocol):
    """A backend whose steps have rows of several adapters on its network."""

    def with_adapter(self, network: Network, context: int) -> Backend:
        """A backend for ``network``, which is this one's with an adapter (``network.base``).

        Sequences of both are of one kind, and step together. To close it leaves this one open.
        """
        ...


def common_length(ids_T: IntArray, other_T: IntArray) -> int:
    """How many tokens both begin with."""
    size = min(len(ids_T), len(other_T))
    differ = ids_T[:size] != other_T[:size]
    return int(differ.argmax()) if differ.any() else size


def reply_room(prompt: int, context: int, beside: bool) -> int:
    """Tokens that a reply to a prompt of so many may have; below 1 where the prompt does not fit.

    ``beside`` where an encoder reads the prompt, which takes no room of the reply then.
    """
    return context if beside and prompt <= context else context - prompt


def read_prompts(
    backend: Backend, prompts: Sequence[IntArray], copies: int
) -> tuple[list[State], Tensor]:
    """Read prompts in chunks; returns what :meth:`Backend.prefill_batch` does.

    A beginning that an earlier prompt has, too, is read once if the backend can continue from there.
    Short prompts are read together. After an error nothing stays open.
    """
    import torch

    from luthier.models.kv_cache import CHUNK

    reuse = backend if isinstance(backend, ReusesKeyValues) and backend.reuses else None
    states: list[State] = []
    logits: list[Tensor] = []

    def begin(ids_T: IntArray) -> State:
        earlier = len(states) // copies
        if reuse is None or not earlier:
            return backend.open(ids_T)
        shared = [common_length(ids_T[:-1], other_T) for other_T in prompts[:earlier]]
        nearest = max(range(earlier), key=shared.__getitem__)
        count = shared[nearest]
        if count < FEWEST_SHARED:
            return backend.open(ids_T)
        return reuse.open(ids_T, reuse.key_values(states[nearest * copies], 0, count))

    reading: list[State] = []
    try:
        for ids_T in prompts:
            reading.append(begin(ids_T))
            is_last = len(states) // copies + len(reading) == len(prompts)
            if not is_last and sum(state.unread for state in reading) < CHUNK:
                continue
            ends: list[Tensor | None] = [None] * len(reading)
            while left := [place for place, end in enumerate(ends) if end is None]:
                found = backend.prefill([reading[place] for place in left])
                for place, logits_V in zip(left, found, strict=True):
                    ends[place] = logits_V
            while reading:
                states += backend.fork(reading[0], copies)
                del reading[0]
            logits += [logits_V for logits_V in ends if logits_V is not None for _ in range(copies)]
    except BaseException:
        for state in (*states, *reading):
            backend.free(state)
        raise
    return states, torch.stack(logits)


OpenBackend = Callable[["Network", int], Backend]
"""Opens a network in eval mode for sequences of at most the given number of tokens."""


OpenFile = Callable[[Path, int, int], Backend]
"""Runs a GGUF file of a network, with sequences of so many tokens at most and so many tokens in its
vocabulary."""


@dataclass(frozen=True)
class BackendEntry:
    """A backend by name."""

    id: str
    open: OpenBackend
    open_file: OpenFile | None = None
    """For one that runs files; ``open`` is then for what is in memory alone."""
    check: Callable[[], None] = lambda: None
    """Raises :class:`RecipeError` where what it needs is not installed; loads nothing."""
    batches_adapters: bool = False
    """Whether ``open`` gives an :class:`AdapterBackend` for networks on the flat layout, and takes
    networks that share the layers of their base."""


def _open_torch(network: Network, context: int) -> Backend:
    from luthier.models.torch_backend import torch_backend  # torch is not needed to list backends

    return torch_backend(network, context)


def _check_llama_cpp() -> None:
    """Refuse a version of the library that is not the known one."""
    try:
        found = version(LLAMA_CPP)
    except PackageNotFoundError:
        found = ""
    if found != LLAMA_CPP_VERSION:
        there = f"{found} is" if found else "it is not"
        raise RecipeError(
            f"llama.cpp needs {LLAMA_CPP} {LLAMA_CPP_VERSION}, and {there} installed: "
            "pip install 'luthier[llama-cpp]'",
            rule="backend.version",
        )


def _open_llama_cpp(file: Path, context: int, vocabulary: int) -> Backend:
    from luthier.models.llama_cpp import LlamaCppBackend

    return LlamaCppBackend(file, context, vocabulary)


BACKENDS: PluginTable[BackendEntry] = PluginTable(
    "backends",
    BackendEntry,
    {
        "torch": BackendEntry("torch", _open_torch, batches_adapters=True),
        "llama.cpp": BackendEntry("llama.cpp", _open_torch, _open_llama_cpp, _check_llama_cpp),
    },
)


def chosen_backend() -> BackendEntry:
    """The backend that ``LUTHIER_BACKEND`` names; torch where it is not set.

    Raises:
        RecipeError: for a backend that is not there, or whose package cannot be used.
    """
    name = os.environ.get(SETTING) or "torch"
    if name not in BACKENDS:
        text = f"{SETTING} is {name!r}; the backends are {', '.join(BACKENDS)}"
        raise RecipeError(text, setting=SETTING, value=name)
    BACKENDS[name].check()
    return BACKENDS[name]


def merges_adapters() -> bool:
    """Whether ``LUTHIER_ADAPTERS`` has adapters merged to answer, each a network of its own.

    Otherwise they stand beside their base, and share its network and its batches.

    Raises:
        RecipeError: for another value than ``merged`` or ``beside``.
    """
    value = os.environ.get(ADAPTERS_SETTING) or "beside"
    if value not in ("beside", "merged"):
        raise RecipeError(f"{ADAPTERS_SETTING} is {value!r}, and may be beside or merged")
    return value == "merged"


def backend_of(network: Network, context: int) -> Backend:
    """Open ``network`` in the chosen backend.

    Raises:
        RecipeError: as :func:`chosen_backend` does.
    """
    return chosen_backend().open(network, context)
