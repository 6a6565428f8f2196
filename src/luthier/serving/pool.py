"""The models that are in memory: loaded when they are first asked, the longest unused let go of."""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.cancellation import cancellable
from luthier.engine.machine import available_memory
from luthier.errors import LuthierError, UnknownModel
from luthier.limits import ModelLimits
from luthier.serving.inference import (
    GenerationRequest,
    ImageRequest,
    InferenceFailed,
    InferenceRefused,
    Prompt,
    Stream,
    count_tokens,
    metered_stream,
)
from luthier.serving.memory import CacheBudget
from luthier.serving.prompts import prompt_tokenized
from luthier.serving.scheduler import FairScheduler
from luthier.serving.serial import Embedding, ImageSamples, ModelInput, SerialModel, Work

if TYPE_CHECKING:
    from luthier.data.media import Media
    from luthier.serving.constraints import SchemaTrials
    from luthier.serving.decoder import Decoder
    from luthier.serving.images import Reconstruction
    from luthier.store.models import StoredModel

LOADING_SECONDS = 300.0
"""How long a request waits for its model to be loaded."""
_LOADED_TWICE = 2.5
"""Bytes in memory for each stored one: weights are kept a second time in the kernels' order."""


@dataclass(eq=False)
class _Entry:
    """A model that is loaded, or about to be."""

    bytes: int
    ready: threading.Event = field(default_factory=threading.Event)
    model: Any = None
    reader: Any = None
    """The :class:`SerialModel` over its network; what does not write is one itself."""
    error: Exception | None = None
    uses: int = 0
    gone: bool = False
    """Whether it is let go of once nothing is asked of it."""

    def close(self) -> None:
        """End its work, as far as it was loaded."""
        if self.model is not None:
            self.model.close()
        if self.reader is not None and self.reader is not self.model:
            self.reader.close()


class ModelPool:
    """Answers for every model of the store, by its stored id. Safe to share between threads."""

    def __init__(
        self,
        budget: int | None = None,
        cache: int | None = None,
        schemas: SchemaTrials | None = None,
        limits: ModelLimits | None = None,
    ) -> None:
        """``budget`` bytes for the weights of all models together, ``cache`` for what they keep of
        sequences; by default shares of the free memory. ``schemas`` tries those of unknown clients,
        and ``limits`` hold for each model.
        """
        self._schemas, self.limits = schemas, limits or ModelLimits()
        free = available_memory()
        self.budget = int(self.limits.weights_share * free) if budget is None else budget
        cache = int(self.limits.cache_share * free) if cache is None else cache
        self.memory = CacheBudget(cache, self.limits.share_of(cache))
        self._scheduler = FairScheduler()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        # While transformers builds a network it changes what holds for the whole process, such as the
        # type of new tensors: a second one beside it would lack weights, or have others.
        self._loading = threading.Lock()
        # Networks that run while the interpreter ends would take it down.
        self._finally = weakref.finalize(self, _close_all, self._entries)

    def submit(self, model_id: str, request: GenerationRequest) -> Stream:
        """Begin to answer ``request`` with a model that writes.

        Raises:
            UnknownModel: where there is no such model.
            InferenceRefused: for a request that is wrong.
            InferenceFailed: where the model cannot be loaded, or too many requests wait.
        """
        entry = self._acquire(model_id)
        try:
            stream = _writer(entry).submit(request)
        except BaseException:
            self._release(entry)
            raise
        stream.at_end(lambda: self._release(entry))
        prompt_tokenized()
        return cancellable(metered_stream(stream, model_id))

    def count(self, model_id: str, prompt: Prompt) -> int:
        """Tokens of ``prompt`` as the model reads it; ``TooLong`` for twice its context and more."""
        with self._borrow(model_id) as entry:
            return len(_writer(entry).encode(prompt))

    def token_bytes(self, model_id: str, ids: Sequence[int]) -> list[bytes]:
        """What tokens of a model stand for; ``TooLong`` for more than a prompt may have."""
        with self._borrow(model_id) as entry:
            ids_T = _writer(entry).encode(ids).tolist()
            return [_writer(entry).constraints.token_bytes(i) for i in ids_T]

    def check_schema(self, schema: Mapping[str, Any] | bool) -> None:
        """Refuse a schema to which no model's answers can be kept, without asking any.

        Raises:
            InferenceRefused: with the reason.
            InferenceFailed: where it could not be tried now.
        """
        if self._schemas is not None:
            self._schemas.check_schema(schema)

    def writes(self, model_id: str) -> bool:
        """Whether it writes text, and does not read it only."""
        from luthier.store import models as store

        return store.writes(store.find(model_id))

    def embed(self, model_id: str, texts: Sequence[str | Sequence[int]]) -> list[Embedding]:
        """Vectors of texts, or of texts as tokens.

        That of a model that writes is the mean of its last hidden states, with length 1. Each is
        computed alone, so that it does not depend on what stands beside it.
        """
        with self._borrow(model_id) as entry:
            read = [entry.reader.read(text) for text in texts]
            prompt_tokenized()
            work = Work()
            found: list[Embedding] = [
                entry.reader.embed(text, tokens, work) for text, tokens in read
            ]
        count_tokens(model_id, sum(each.tokens for each in found))
        return found

    def predict(
        self, model_id: str, inputs: Sequence[ModelInput], top: int | None = None
    ) -> list[dict[str, Any]]:
        """What a model that reads says of each input: ``label`` and ``scores``, ``score``, ….

        ``top`` leaves so many classes in ``scores``, the likeliest first. An image or a sound counts
        as one token that was read.

        Raises:
            UnknownModel, InferenceRefused, InferenceFailed: as :meth:`submit`; ``ModelTimeout`` where
                it takes more than ``image_seconds``.
        """
        self._check_count(len(inputs), "inputs")
        with self._borrow(model_id) as entry:
            rows, tokens = _serial(entry).rows(inputs)
            prompt_tokenized()
            answers: list[dict[str, Any]] = entry.model.predict(rows, top, self._work())
        count_tokens(model_id, tokens)
        return answers

    def reconstruct(self, model_id: str, images: Sequence[Media]) -> list[Reconstruction]:
        """Each image as the model gives it back; read and made, it counts as two tokens."""
        self._check_count(len(images), "images")
        with self._borrow(model_id) as entry:
            rows, tokens = _serial(entry).rows(images)
            prompt_tokenized()
            found: list[Reconstruction] = entry.model.reconstruct(rows, self._work())
        count_tokens(model_id, tokens, len(found))
        return found

    def sample(self, model_id: str, request: ImageRequest) -> ImageSamples:
        """New images of a model that makes them; each counts as one token that was written.

        Raises:
            UnknownModel, InferenceRefused, InferenceFailed: as :meth:`predict`.
        """
        self._check_count(request.count, "count")
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        with self._borrow(model_id) as entry:
            prompt_tokenized()
            made = [0]
            try:
                images = _serial(entry).sample(request, seed, self._work(), made.append)
            finally:
                count_tokens(model_id, 0, made[-1])
        return ImageSamples(images, seed)

    def _check_count(self, count: int, parameter: str) -> None:
        most = self.limits.inputs
        if not 1 <= count <= most:
            text = f"One request has from 1 to {most} of {parameter}, and this one {count:,}."
            raise InferenceRefused(text, parameter)

    def _work(self) -> Work:
        return Work(self.limits.image_seconds)

    def forget(self, model_id: str) -> None:
        """Let go of a model that was deleted, as soon as nothing is asked of it."""
        with self._lock:
            entry = self._entries.pop(model_id, None)
            if entry is not None:
                entry.uses += 1
                entry.gone = True
        if entry is not None:
            self._release(entry)

    def close(self) -> None:
        """End all work and let go of everything."""
        _close_all(self._entries)

    def loaded_ids(self) -> list[str]:
        """Ids of the models in memory, the longest unused first."""
        with self._lock:
            return [name for name, entry in self._entries.items() if entry.model is not None]

    def weight_bytes(self) -> int:
        """Memory that the weights of the loaded models are reckoned to take."""
        with self._lock:
            return sum(entry.bytes for entry in self._entries.values())

    @contextmanager
    def _borrow(self, model_id: str) -> Iterator[_Entry]:
        entry = self._acquire(model_id)
        try:
            yield entry
        finally:
            self._release(entry)

    def _acquire(self, model_id: str) -> _Entry:
        """The loaded model, not to be let go of until it is released."""
        with self._lock:
            entry = self._use(model_id)
        first = entry is None
        if entry is None:
            from luthier.store import models as store

            # It may have to be downloaded first, which no other model waits for.
            size = _weights(store.find(model_id))
            entry, first = self._reserve(model_id, size)
        if first:
            self._load(model_id, entry)
        elif not entry.ready.wait(LOADING_SECONDS):
            self._release(entry)
            raise InferenceFailed(
                "ModelNotReady", "The model is still being loaded. Try again soon."
            )
        if entry.error is not None:
            self._release(entry)
            raise entry.error
        return entry

    def _use(self, model_id: str) -> _Entry | None:
        """The model where it has a place, with one use more. Called with the lock."""
        entry = self._entries.get(model_id)
        if entry is not None:
            entry.uses += 1
            self._entries.move_to_end(model_id)
        return entry

    def _reserve(self, model_id: str, size: int) -> tuple[_Entry, bool]:
        """A place for the model, made free where needed, and whether it has to be loaded."""
        with self._lock:
            entry = self._use(model_id)
            if entry is not None:
                return entry, False
            if size > self.budget:
                text = f"{size >> 20} MiB of memory, and {self.budget >> 20} MiB are there."
                raise InferenceFailed("ModelNotReady", f"The model needs {text}")
            excess = sum(entry.bytes for entry in self._entries.values()) + size - self.budget
            evicted = []
            for name, other in self._entries.items():
                if excess > 0 and not other.uses:
                    evicted.append(name)
                    excess -= other.bytes
            if excess > 0:
                raise InferenceFailed(
                    "ModelNotReady", "Other models are at work in all memory. Try again soon."
                )
            closing = [self._entries.pop(name) for name in evicted]
            self._entries[model_id] = entry = _Entry(size, uses=1)
        for other in closing:
            other.close()  # waits for its threads
        return entry, True

    def _load(self, model_id: str, entry: _Entry) -> None:
        """Load it once for all who wait; a failure is told to them, and not remembered."""
        from luthier.store import models as store

        try:
            stored = store.check_active(store.find(model_id))
            with self._loading:
                if store.writes(stored):
                    from luthier.serving.decoder import Decoder

                    entry.model = Decoder.open(
                        stored, self.memory, self._schemas, self.limits, self._scheduler
                    )
                    entry.reader = SerialModel.of(entry.model, self._scheduler)
                else:
                    entry.model = SerialModel.open(stored, self.limits, self._scheduler)
                    entry.reader = entry.model
        except LuthierError as error:
            entry.error = InferenceFailed("ModelError", f"The model cannot be loaded: {error}")
        except Exception as error:
            entry.error = InferenceFailed(
                "ModelError", f"The model cannot be loaded: {type(error).__name__}."
            )
            entry.error.__cause__ = error
        if entry.error is not None:
            with self._lock:
                if self._entries.get(model_id) is entry:
                    del self._entries[model_id]
            entry.close()
        entry.ready.set()

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.uses -= 1
            last = entry.gone and not entry.uses
        if last:
            entry.close()


def _close_all(entries: OrderedDict[str, _Entry]) -> None:
    while entries:
        _, entry = entries.popitem()
        entry.close()


def _writer(entry: _Entry) -> Decoder:
    from luthier.serving.decoder import Decoder

    if not isinstance(entry.model, Decoder):
        raise InferenceRefused(f"This model {entry.model.purpose} and writes no text.", "model")
    return entry.model


def _serial(entry: _Entry) -> SerialModel:
    if not isinstance(entry.model, SerialModel):
        text = "This model writes text: it gives no labels, and makes no images."
        raise InferenceRefused(text, "model")
    return entry.model


def _weights(stored: StoredModel) -> int:
    """Bytes that a model takes in memory without what its sequences keep."""
    files = list(stored.network_folder.rglob("*.safetensors"))
    if not files:
        raise UnknownModel(f"{stored.id} has no weights")
    return int(_LOADED_TWICE * sum(path.stat().st_size for path in files))
