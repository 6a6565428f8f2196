"""A stored model that is open to write: the backend that was chosen, and what stands before prompts.

A backend that runs files (llama.cpp) gets the model's own (:mod:`luthier.serving.derived_gguf`), and
its network is not loaded in torch until something asks for it, such as a draft model. A model that it
cannot run is run by torch, and the log says why, once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from luthier.errors import RecipeError, RefusedInput, UnknownModel
from luthier.models.backends import AdapterBackend, Speculates, backend_of, chosen_backend
from luthier.models.speculation import NGRAM, OFF

if TYPE_CHECKING:
    from luthier.models.backends import Backend
    from luthier.models.draft_model import DraftModel
    from luthier.models.network import Network
    from luthier.store.models import StoredModel
    from luthier.types import IntArray

_log = logging.getLogger("luthier.serving")
_fallen_back: set[str] = set()
"""Ids of models of which the log has said that torch runs them."""


class OpenedModel:
    """A model whose answers a backend writes. Safe to share between threads."""

    def __init__(
        self,
        backend: Backend,
        vocabulary: int,
        open_network: Callable[[], Network],
        soft_T: IntArray | None = None,
    ) -> None:
        """``open_network`` gives the network in torch; it is called once, when first asked for."""
        self.backend, self.vocabulary = backend, vocabulary
        self.soft_T = np.zeros(0, dtype=np.int64) if soft_T is None else soft_T
        """A soft prompt that stands before every prompt; the backend reads it with it."""
        self.draft_model: str | None = None
        """Id of the draft model that guesses what it writes."""
        self._open_network = open_network
        self._network: Network | None = None
        self._lock = threading.Lock()

    @staticmethod
    def of(network: Network, exact: bool = False, base: OpenedModel | None = None) -> OpenedModel:
        """A network in memory; see :data:`luthier.models.backends.OpenBackend`.

        Where that is the one of ``base`` with an adapter, both are written together.
        """
        from luthier.models.heads import prompt_ids
        from luthier.models.prefix import prefix_tokens

        soft_T = np.array(prompt_ids(network.model), dtype=np.int64)
        # A prefix takes room that no token has.
        context = network.context - prefix_tokens(network.model)
        if base is None:
            backend = backend_of(network, context, exact)
        else:
            assert isinstance(base.backend, AdapterBackend)
            backend = base.backend.with_adapter(network, context)
        vocabulary = int(network.model.config.vocab_size)
        opened = OpenedModel(backend, vocabulary, lambda: network, soft_T)
        opened._network = network
        opened.draft_model = None if base is None else base.draft_model
        return opened

    @property
    def network(self) -> Network:
        """The network in torch, loaded where it was not."""
        with self._lock:
            if self._network is None:
                self._network = self._open_network()
            return self._network

    def set_speculation(self, stored: StoredModel, speculation: str) -> None:
        """Before it writes: have its tokens guessed as ``speculation`` says; it is ``stored``.

        That is one of :mod:`luthier.models.speculation`. A draft model is closed with this.

        Raises:
            UnknownModel, RecipeError: for a draft model that is not there, or cannot be one.
        """
        if speculation in (NGRAM, OFF):
            if isinstance(self.backend, Speculates):
                self.backend.set_speculation(speculation == NGRAM)
            self.draft_model = None
            return
        draft = find_draft(stored, speculation)
        assert isinstance(self.backend, Speculates)  # what was just looked at runs by torch
        model = _open_draft(draft, self.network)
        if self.backend.set_speculation(True, model):
            self.draft_model = draft.id
            return
        model.close()
        _log.warning(
            "%s is written without its draft model %s: on this machine a step of more rows rounds "
            "otherwise, and texts would follow from what is guessed", stored.id, draft.id,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the backend and of the network."""
        self.backend.close()
        with self._lock:
            if self._network is not None:
                self._network.close()


def find_draft(target: StoredModel, draft_id: str) -> StoredModel:
    """The model that is to guess what ``target`` writes, by its id.

    Raises:
        UnknownModel: where there is none.
        RecipeError: where it cannot be the draft of ``target``, such as one of other tokens.
    """
    from luthier.models.description import described_network
    from luthier.models.tokenizer import tokenizer_difference
    from luthier.store.models import chat_format, check_active, check_writes, find

    draft = check_active(find(draft_id))
    refused = f"{draft.id} cannot be the draft model of {target.id}:"
    entry = chosen_backend()
    if entry.id != "torch":
        raise RecipeError(
            f"{refused} {entry.id} runs models without draft models here. Unset LUTHIER_BACKEND, which "
            "names it, or leave the draft model out."
        )
    for each in (target, draft):
        check_writes(each, f"so {refused} a draft model guesses what another model writes")
        if not described_network(each.network_folder).flat:
            raise RecipeError(
                f"{refused} the network of {each.id} runs by a forward pass of its own, which reads "
                "one sequence at a time. Both have to be of Llama's family, GPT-2 or another network "
                "with one stack of attention layers."
            )
    difference = tokenizer_difference(chat_format(target), chat_format(draft))
    if difference is not None:
        raise RecipeError(
            f"{refused} they have different tokenizers, so its tokens mean something else there "
            f"({difference}). Take a smaller model of the same family, or make one: "
            f"`luthier student --from {target.id}`."
        )
    return draft


def resolve_speculation(settings: Mapping[str, str]) -> dict[str, str]:
    """``settings`` of models by their stored ids; draft models are looked at, and not loaded.

    A model that is not there is passed over with a warning: whoever owns it may have deleted it, and
    the server starts all the same.

    Raises:
        RecipeError: as :func:`find_draft`.
    """
    from luthier.store.models import find

    found = {}
    for model_id, speculation in settings.items():
        try:
            target = find(model_id)
            is_draft = speculation not in (NGRAM, OFF)
            found[target.id] = find_draft(target, speculation).id if is_draft else speculation
        except UnknownModel as error:
            _log.warning("%s is written without %s: %s", model_id, speculation, error)
    return found


def _open_draft(stored: StoredModel, target: Network) -> DraftModel:
    """``stored`` as the draft of ``target``."""
    from luthier.engine.machine import open_network
    from luthier.models.draft_model import DraftModel
    from luthier.models.prefix import prefix_tokens
    from luthier.models.torch_backend import FlatBackend

    network = open_network(stored)
    backend = FlatBackend(network, network.context - prefix_tokens(network.model))
    return DraftModel(stored.id, backend, target, network.close)


def open_model(
    stored: StoredModel, exact: bool = False, base: OpenedModel | None = None
) -> OpenedModel:
    """``stored``, which writes text, on the best device of this machine.

    An adapter that can share its base with others stands beside it, as it was trained; others are
    merged. ``base`` is its parent, where that is open. With ``exact`` each sequence has the same bits
    whatever steps beside it, where the backend can.
    """
    entry = chosen_backend()
    if entry.open_file is not None:
        from luthier.engine.machine import open_network
        from luthier.models.description import check_folder
        from luthier.serving.derived_gguf import gguf_of, gguf_type
        from luthier.store.models import room_of

        kind = gguf_type()
        try:
            vocabulary = int(check_folder(stored.network_folder)["vocab_size"])
            file = gguf_of(stored, kind, entry.open_file)
            backend = entry.open_file(file, room_of(stored), vocabulary)
        except RefusedInput as error:
            if stored.id not in _fallen_back:
                _fallen_back.add(stored.id)
                _log.warning("%s is run by torch, not by %s: %s", stored.id, entry.id, error)
        else:
            return OpenedModel(backend, vocabulary, lambda: open_network(stored))
    return open_by_torch(stored, exact, base)


def open_by_torch(
    stored: StoredModel,
    exact: bool = False,
    base: OpenedModel | None = None,
    beside: bool | None = None,
) -> OpenedModel:
    """As :func:`open_model`, whatever backend runs files.

    ``beside`` says whether an adapter stands beside its base; what the environment says, if not given.
    """
    from luthier.engine.machine import open_network
    from luthier.store.models import attach_adapter, objective_of, shares_base

    if not (shares_base(stored) if beside is None else beside):
        return OpenedModel.of(open_network(stored), exact)
    assert stored.parent is not None
    if base is not None:
        parent = base.network
    else:
        parent = open_network(stored.parent, objective_of(stored).head())
    network = parent.with_adapter(lambda model: attach_adapter(model, stored, shared=True))
    return OpenedModel.of(network, exact, base)
