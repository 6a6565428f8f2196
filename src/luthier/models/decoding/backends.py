"""Backends run a network token by token: prefill, step, fork and free sequences.

Decoding (:mod:`luthier.models.decoding.sampler`) and the server depend on the :class:`Backend` protocol
only, so another engine can replace PyTorch. The environment variable ``LUTHIER_BACKEND`` selects an
entry of :data:`BACKENDS` for the server, the CLI and evaluation. Networks in memory, for example in
rollouts, always run in PyTorch because their weights change.
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

    from luthier.models.decoding.kv_cache import KeyValues
    from luthier.models.decoding.speculation import Speculation
    from luthier.models.networks.network import Network
    from luthier.types import IntArray

SETTING = "LUTHIER_BACKEND"
ADAPTERS_SETTING = "LUTHIER_ADAPTERS"
LLAMA_CPP, LLAMA_CPP_VERSION = "xllamacpp", "2026.10.11549"
"""Name and version of the llama.cpp wheel that :mod:`luthier.models.decoding.llama_cpp` supports."""


def llama_cpp_library() -> Path | None:
    """Return the path of the wheel's shared library, or ``None`` if the wheel is not installed."""
    spec = find_spec(LLAMA_CPP)
    folder = next(iter((spec and spec.submodule_search_locations) or ()), None)
    return None if folder is None else next(Path(folder).glob(f"{LLAMA_CPP}.*so"), None)


class State(Protocol):
    """Decoding state of one sequence."""

    @property
    def unread(self) -> int:
        """Number of prompt tokens to prefill."""
        ...


class Backend(Protocol):
    """Token-by-token execution of one network. Prompts are token ids, soft prompts included."""

    context: int
    """Maximum number of tokens of prompt and completion."""

    @property
    def device(self) -> device:
        """Device of the logits."""
        ...

    @property
    def rows(self) -> int:
        """Maximum number of sequences per batched step. More sequences run in additional steps."""
        ...

    @property
    def sequences(self) -> int:
        """Maximum number of open sequences."""
        ...

    def bytes_of(self, tokens: int) -> int:
        """Return the maximum memory of a sequence of ``tokens`` tokens, in bytes."""
        ...

    def open(self, ids_T: IntArray) -> State:
        """Open a sequence. :meth:`prefill` processes the prompt."""
        ...

    def prefill(self, states: Sequence[State]) -> list[Tensor | None]:
        """Process the next chunk of each prompt.

        Returns:
            For each prompt the logits ``[V]`` of the next token at the prompt's end, else ``None``.
        """
        ...

    def prefill_batch(self, prompts: Sequence[IntArray], copies: int) -> tuple[list[State], Tensor]:
        """Prefill whole prompts as one batch. Returns ``copies`` sequences per prompt and logits
        ``[R, V]``.

        Faster than separate prefills, and equal up to rounding.
        """
        ...

    def fork(self, state: State, copies: int) -> list[State]:
        """Return ``copies`` sequences that continue from the prefilled ``state``, which becomes
        invalid."""
        ...

    def step(self, states: Sequence[State], tokens: Sequence[int]) -> Tensor:
        """Append one token to each sequence and return the next logits ``[R, V]``."""
        ...

    def free(self, state: State) -> None:
        """Free the memory of a sequence."""
        ...

    def close(self) -> None:
        """Free all sequences and resources that the backend opened. The caller's network stays
        open."""
        ...


FEWEST_SHARED = 32
"""Minimum length of a shared prompt prefix, in tokens. Recomputing a shorter prefix is as fast."""


@runtime_checkable
class ReusesKeyValues(Protocol):
    """A backend that can continue from the cached keys and values of a prompt prefix."""

    @property
    def reuses(self) -> bool:
        """True if the network supports cached prefixes. Networks with prefix tuning do not."""
        ...

    def open(self, ids_T: IntArray, start: KeyValues | None = None) -> State:
        """Open a sequence. :meth:`Backend.prefill` starts after the cached prefix ``start``."""
        ...

    def key_values(self, state: State, start: int, end: int) -> KeyValues:
        """Return a copy of the prompt's keys and values for tokens ``start`` to ``end``."""
        ...


@runtime_checkable
class Speculates(Protocol):
    """A backend with speculative decoding."""

    def speculation(self, state: State) -> Speculation:
        """Return the speculation statistics of a sequence."""
        ...


@runtime_checkable
class AdapterBackend(Backend, Protocol):
    """A backend that batches rows of several LoRA adapters on one base network."""

    def with_adapter(self, network: Network, context: int) -> Backend:
        """Return a backend for ``network``, an adapter on this backend's base (``network.base``).

        Sequences of both backends can share a step. Closing the new backend leaves this backend
        open.
        """
        ...


def common_length(ids_T: IntArray, other_T: IntArray) -> int:
    """Return the length of the common prefix, in tokens."""
    size = min(len(ids_T), len(other_T))
    differ = ids_T[:size] != other_T[:size]
    return int(differ.argmax()) if differ.any() else size


def completion_limit(prompt: int, context: int, beside: bool) -> int:
    """Return the maximum number of completion tokens, below 1 if the prompt is too long.

    Args:
        prompt: Length of the prompt, in tokens.
        context: Context length, in tokens.
        beside: True for an encoder-decoder, whose prompt does not count towards the decoder's
            context.
    """
    return context if beside and prompt <= context else context - prompt


def read_prompts(
    backend: Backend, prompts: Sequence[IntArray], copies: int
) -> tuple[list[State], Tensor]:
    """Prefill prompts in chunks; arguments and result as :meth:`Backend.prefill_batch`.

    A common prefix of several prompts is processed once if the backend supports cached prefixes.
    Short prompts form one batch. After an error all sequences are closed.
    """
    import torch

    from luthier.models.decoding.kv_cache import CHUNK

    reuse = backend if isinstance(backend, ReusesKeyValues) and backend.reuses else None
    states: list[State] = []
    logits: list[Tensor] = []

    def begin(ids_T: IntArray) -> State:
        # Only prompts that are completely prefilled have cached keys and values.
        earlier = len(states) // copies
        if reuse is None or not earlier:
            return backend.open(ids_T)
        # At least one token stays to prefill: the logits after it choose the next token.
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
                # Sequences move from `reading` to `states` one by one, so an error frees each once.
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
"""Open a GGUF file. The arguments are the path, the maximum number of tokens per sequence, and the
vocabulary size."""


@dataclass(frozen=True)
class BackendEntry:
    """A backend by name."""

    id: str
    open: OpenBackend
    open_file: OpenFile | None = None
    """Opens GGUF files. ``open`` then serves networks in memory only."""
    check: Callable[[], None] = lambda: None
    """Raises :class:`RecipeError` if a required package is missing. Loads nothing."""
    batches_adapters: bool = False
    """True if ``open`` returns an :class:`AdapterBackend` for networks with the flat layout."""


def _open_torch(network: Network, context: int) -> Backend:
    # Listing backends must not import torch.
    from luthier.models.decoding.torch_backend import torch_backend

    return torch_backend(network, context)


def _check_llama_cpp() -> None:
    """Reject other versions of the llama.cpp wheel."""
    try:
        installed = version(LLAMA_CPP)
    except PackageNotFoundError:
        installed = ""
    # The layout of llama.h's structures, which are passed by value, changes between versions.
    if installed != LLAMA_CPP_VERSION:
        raise RecipeError(
            f"llama.cpp requires {LLAMA_CPP} {LLAMA_CPP_VERSION}, installed is "
            f"{installed or 'no version'}. Run `pip install 'luthier[llama-cpp]'`.",
            rule="backend.version",
        )


def _open_llama_cpp(file: Path, context: int, vocabulary: int) -> Backend:
    from luthier.models.decoding.llama_cpp import LlamaCppBackend

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
    """Return the backend that ``LUTHIER_BACKEND`` names; PyTorch by default.

    Raises:
        RecipeError: for an unknown backend or a missing package.
    """
    name = os.environ.get(SETTING) or "torch"
    if name not in BACKENDS:
        text = f"{SETTING} is {name!r}. Choose one of {', '.join(BACKENDS)}."
        raise RecipeError(text, setting=SETTING, value=name)
    BACKENDS[name].check()
    return BACKENDS[name]


def merges_adapters() -> bool:
    """Return True if ``LUTHIER_ADAPTERS`` is ``merged``: adapters are merged for inference.

    With ``beside``, the default, adapters share the network and the batches of their base model.

    Raises:
        RecipeError: for other values.
    """
    value = os.environ.get(ADAPTERS_SETTING) or "beside"
    if value not in ("beside", "merged"):
        raise RecipeError(f"{ADAPTERS_SETTING} is {value!r}. Use beside or merged.")
    return value == "merged"


def backend_of(network: Network, context: int) -> Backend:
    """Open ``network`` in the chosen backend.

    Raises:
        RecipeError: as :func:`chosen_backend` does.
    """
    return chosen_backend().open(network, context)
