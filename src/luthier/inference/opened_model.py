"""A stored model opened for generation, with the chosen backend and its soft prompt.

A backend of files (llama.cpp) opens a derived GGUF file (:mod:`luthier.inference.derived_gguf`).
The network is loaded in torch only on demand. If the backend does not support a model, torch runs
the model and one warning is logged.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from luthier.errors import RefusedInput
from luthier.models.decoding.backends import (
    BACKENDS,
    SETTING,
    AdapterBackend,
    BackendEntry,
    backend_of,
    chosen_backend,
)

if TYPE_CHECKING:
    from luthier.library.models import StoredModel
    from luthier.models.decoding.backends import Backend
    from luthier.models.networks.network import Network
    from luthier.types import IntArray

_log = logging.getLogger("luthier.inference")
_fallen_back: set[str] = set()
"""Ids of models with a logged warning."""


class OpenedModel:
    """A model with its backend. Safe to share between threads."""

    def __init__(
        self,
        backend: Backend,
        vocabulary: int,
        open_network: Callable[[], Network],
        soft_T: IntArray | None = None,
    ) -> None:
        """``open_network`` loads the network in torch and is called at most once."""
        self.backend, self.vocabulary = backend, vocabulary
        self.soft_T = np.zeros(0, dtype=np.int64) if soft_T is None else soft_T
        """Ids of a soft prompt that precedes every prompt."""
        self._open_network = open_network
        self._network: Network | None = None
        self._lock = threading.Lock()

    @staticmethod
    def of(network: Network, base: OpenedModel | None = None) -> OpenedModel:
        """Open a network in memory; with ``base``, an adapter on the network of ``base``."""
        from luthier.models.networks.heads import prompt_ids
        from luthier.models.networks.prefix import prefix_tokens

        soft_T = np.array(prompt_ids(network.model), dtype=np.int64)
        # A prefix takes positions of the context.
        context = network.context - prefix_tokens(network.model)
        if base is None:
            backend = backend_of(network, context)
        else:
            assert isinstance(base.backend, AdapterBackend)
            backend = base.backend.with_adapter(network, context)
        vocabulary = int(network.model.config.vocab_size)
        opened = OpenedModel(backend, vocabulary, lambda: network, soft_T)
        opened._network = network
        return opened

    @property
    def network(self) -> Network:
        """The network in torch, loaded on first use."""
        with self._lock:
            if self._network is None:
                self._network = self._open_network()
            return self._network

    def close(self) -> None:
        """Free the backend and the network."""
        # The backend first, because its sequences use the network.
        self.backend.close()
        with self._lock:
            if self._network is not None:
                self._network.close()


def backend_for_one(stored: StoredModel, write: bool) -> tuple[BackendEntry, str]:
    """Return the faster backend for one reply at a time, and the reason.

    llama.cpp, on a CPU, if the package is installed. ``write`` includes models without a file in
    the cache: writing and comparing a file takes 15 s for 135 M weights.
    """
    import torch

    if os.environ.get(SETTING):
        return chosen_backend(), f"{SETTING} is set"
    entry = BACKENDS["torch"]
    if torch.cuda.is_available():
        return entry, "this machine has a GPU"
    from luthier.inference.derived_gguf import check_derivable, gguf_type, has_gguf

    try:
        check_derivable(stored)
        BACKENDS["llama.cpp"].check()
        is_here = has_gguf(stored, gguf_type())
    except RefusedInput as error:
        return entry, str(error)
    if is_here:
        return BACKENDS["llama.cpp"], "the faster one; its file of the model has torch's results"
    if write:
        return BACKENDS["llama.cpp"], "the faster one; a file of the model is written once"
    return entry, "`luthier chat` writes the file for llama.cpp, which is faster"


def open_model(
    stored: StoredModel, base: OpenedModel | None = None, entry: BackendEntry | None = None
) -> OpenedModel:
    """Open ``stored``, a model that generates text, on the best device of this machine.

    A LoRA adapter that can share its base is not merged. Other adapters are merged. ``base`` is the
    opened parent. ``entry`` is the backend, by default :func:`chosen_backend`.
    """
    from luthier.engine.machine import open_network
    from luthier.library.models import attach_adapter, shares_base

    entry = entry or chosen_backend()
    if entry.open_file is not None:
        from luthier.inference.derived_gguf import gguf_of, gguf_type

        kind = gguf_type()
        try:
            file = gguf_of(stored, kind, entry.open_file)
            # From the record, so that the network in torch is not loaded.
            vocabulary = int(stored.network.fields["vocab_size"])
            backend = entry.open_file(file, stored.room, vocabulary)
        except RefusedInput as error:
            # One warning per model, not one per load.
            if stored.id not in _fallen_back:
                _fallen_back.add(stored.id)
                _log.warning("%s is run by torch, not by %s: %s", stored.id, entry.id, error)
        else:
            return OpenedModel(backend, vocabulary, lambda: open_network(stored))
    if not shares_base(stored):
        return OpenedModel.of(open_network(stored))
    assert stored.parent is not None
    if base is not None:
        parent = base.network
    else:
        parent = open_network(stored.parent, stored.objective.head())
    network = parent.with_adapter(lambda model: attach_adapter(model, stored))
    return OpenedModel.of(network, base)
