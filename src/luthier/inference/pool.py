"""The models in memory: loaded on the first request, and evicted by the longest time unused."""

from __future__ import annotations

import gc
import math
import secrets
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from luthier.engine.machine import available_memory, release_workers
from luthier.errors import LuthierError, UnknownModel, is_out_of_memory
from luthier.files import is_disk_error, without_home
from luthier.inference.batcher import Work
from luthier.inference.inference import (
    GenerationRequest,
    ImageRequest,
    InferenceFailed,
    InferenceRefused,
    Prompt,
    Stream,
    count_tokens,
    metered_stream,
    report_model,
)
from luthier.inference.memory import CacheBudget
from luthier.inference.prefix_cache import PrefixCache
from luthier.inference.scheduler import FairScheduler, in_background
from luthier.inference.sequential import Embedding, ImageSamples, ModelInput, SerialModel
from luthier.limits import ModelLimits
from luthier.models.decoding.speculation import Speculation
from luthier.processes import cancellable

if TYPE_CHECKING:
    from luthier.data.inputs import Media
    from luthier.inference.decoder import Decoder
    from luthier.inference.latency import LatencyTable
    from luthier.library.models import StoredModel
    from luthier.media.image_generation import Reconstruction
    from luthier.models.decoding.sampling import Constraint

LOADING_SECONDS = 300.0
"""Maximum seconds for loading a model while a request waits."""
RECENT = timedelta(minutes=1)
"""Period after a request in which a model is not evicted for a model loaded in advance."""
_LOADED_TWICE = 2.5
"""Memory of a model per byte of weights: the kernels copy weights into their own layout."""
_STACKED = 2.0
"""Memory of an adapter on a shared base per byte of its file: weights and a slot of a stack."""


@dataclass(eq=False)
class _Entry:
    id: str
    bytes: int
    ready: threading.Event = field(default_factory=threading.Event)
    model: Any = None
    base: _Entry | None = None
    """Entry of the base model if the adapter shares the base's network."""
    error: Exception | None = None
    uses: int = 0
    """Number of running requests, and of adapters on the model."""
    loaded: datetime | None = None
    last_used: datetime = field(default_factory=lambda: datetime.now(UTC))

    def close(self) -> None:
        """Close the model once."""
        model, self.model = self.model, None
        if model is not None:
            model.close()


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory."""

    id: str
    bytes: int
    """Estimated memory of the weights in bytes, without the weights of the base."""
    base: str | None
    """Id of the model with the shared network."""
    loaded: datetime
    last_used: datetime
    """Time of the last load, request or finished reply."""
    requests: int
    """Number of running requests."""
    speculation: Speculation | None = None
    """Guessed tokens of finished replies; None for a model that predicts."""


class ModelPool:
    """Runs requests to the models of the library, by id. Safe to share between threads."""

    def __init__(
        self,
        budget: int | None = None,
        cache: int | None = None,
        limits: ModelLimits | None = None,
        latencies: LatencyTable | None = None,
        deterministic: bool = False,
    ) -> None:
        """Create an empty pool.

        Args:
            budget: bytes for the weights of all models; by default a share of the free memory.
            cache: bytes for keys, values and activations; by default a share of the free memory.
            limits: limits of each model.
            latencies: metrics of the models.
            deterministic: run one sequence or row at a time.
        """
        self._latencies, self._deterministic = latencies, deterministic
        self.limits = limits or ModelLimits()
        free = available_memory()
        self.budget = int(self.limits.weights_share * free) if budget is None else budget
        cache = int(self.limits.cache_share * free) if cache is None else cache
        self.memory = CacheBudget(cache, self.limits.share_of(cache))
        # A cached beginning changes the chunks of a prompt, and with them the last bits.
        self._prefixes = None if deterministic else PrefixCache(self.memory)
        self._scheduler = FairScheduler()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._leaving: list[_Entry] = []
        """Evicted models with running requests, which still use memory."""
        self._lock = threading.Lock()
        # transformers changes global state, such as the type of new tensors, while it builds a network.
        # A second network at the same time would lack weights.
        self._loading = threading.Lock()
        # Networks that run while the interpreter ends would crash the process.
        # The callback gets the collections: a reference to the pool would keep the pool alive.
        self._finally = weakref.finalize(self, _close_all, self._entries, self._leaving)

    def submit(self, model_id: str, request: GenerationRequest) -> Stream:
        """Queue ``request`` at a generative model and return the stream of events.

        Raises:
            UnknownModel: if the model does not exist.
            InferenceRefused: for an invalid request.
            InferenceFailed: if the model cannot be loaded, or too many requests wait.
        """
        entry = self._acquire(model_id)
        try:
            stream = _writer(entry).submit(request)
        except BaseException:
            self._release(entry)
            raise
        stream.at_end(lambda: self._release(entry))
        return cancellable(metered_stream(stream, model_id))

    def encode(self, model_id: str, prompt: Prompt) -> list[int]:
        """Return the token ids of ``prompt``; raise ``TooLong`` for more than twice the context."""
        with self._borrow(model_id) as entry:
            return [int(token) for token in _writer(entry).encode(prompt)]

    def count(self, model_id: str, prompt: Prompt) -> int:
        """Return the number of tokens of ``prompt``."""
        return len(self.encode(model_id, prompt))

    def check_constraint(self, constraint: Constraint) -> None:
        """Raise :class:`InferenceRefused` for a constraint that no reply can satisfy."""
        from luthier.inference.constraints import check_constraint

        check_constraint(constraint, self.limits.schema_characters)

    def writes(self, model_id: str) -> bool:
        """Return whether the model generates text."""
        from luthier.library import models as store

        return store.find(model_id).writes

    def embed(self, model_id: str, texts: Sequence[str | Sequence[int]]) -> list[Embedding]:
        """Return embeddings of texts or token ids.

        Raises:
            UnknownModel, InferenceRefused, InferenceFailed: as :meth:`submit`.
        """
        with self._borrow(model_id) as entry:
            encoder = _serial(entry, "has no embeddings. Use an encoder")
            examples = encoder.texts(texts)
            embeddings = encoder.embed(examples, self._work(math.inf))
        count_tokens(model_id, sum(each.tokens for each in embeddings))
        return embeddings

    def predict(
        self, model_id: str, inputs: Sequence[ModelInput], top: int | None = None
    ) -> list[dict[str, Any]]:
        """Return the prediction for each input: ``label`` and ``scores``, ``score``, ….

        ``top`` keeps the likeliest classes in ``scores``. An image or audio clip counts as one token.

        Raises:
            UnknownModel, InferenceRefused, InferenceFailed: as :meth:`submit`, and ``ModelTimeout``
                after ``image_seconds``.
        """
        self._check_count(len(inputs), "inputs")
        with self._borrow(model_id) as entry:
            examples, tokens = _serial(entry).inputs(inputs)
            answers: list[dict[str, Any]] = entry.model.predict(examples, top, self._work())
        count_tokens(model_id, tokens)
        return answers

    def reconstruct(self, model_id: str, images: Sequence[Media]) -> list[Reconstruction]:
        """Reconstruct images; each image counts as one input and one output token."""
        self._check_count(len(images), "images")
        with self._borrow(model_id) as entry:
            model = _serial(entry)
            reconstructions = model.reconstruct(images, self._work())
        count_tokens(model_id, len(reconstructions), len(reconstructions))
        return reconstructions

    def sample(self, model_id: str, request: ImageRequest) -> ImageSamples:
        """Generate images; each image counts as one output token.

        Raises:
            UnknownModel, InferenceRefused, InferenceFailed: as :meth:`predict`.
        """
        self._check_count(request.count, "count")
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        with self._borrow(model_id) as entry:
            counts = [0]
            try:
                images = _serial(entry).sample(request, seed, self._work(), counts.append)
            finally:
                count_tokens(model_id, 0, counts[-1])
        return ImageSamples(images, seed)

    def _check_count(self, count: int, parameter: str) -> None:
        most = self.limits.inputs
        if not 1 <= count <= most:
            text = f"`{parameter}` must be 1 to {most} per request, not {count:,}."
            raise InferenceRefused(text, parameter)

    def _work(self, seconds: float | None = None) -> Work:
        """Return the time limits of one request, by default ``image_seconds``."""
        queue_seconds = math.inf if in_background() else self.limits.queue_seconds
        return Work(self.limits.image_seconds if seconds is None else seconds, queue_seconds)

    def load(self, model_id: str) -> None:
        """Load a model in advance, without evicting models in use or with recent requests.

        Raises:
            UnknownModel: if the model does not exist.
            InferenceFailed: ``ModelNotReady`` without room, ``ModelError`` if loading fails.
        """
        with self._borrow(model_id, preload=True):
            pass

    def unload(self, model_id: str) -> None:
        """Unload a model and its adapters as soon as the running replies end."""
        with self._lock:
            entries = self._remove_entries(model_id)
        for entry in entries:
            self._release(entry)

    def _remove_entries(self, model_id: str) -> list[_Entry]:
        """Move a model and its adapters to ``_leaving``. The caller has acquired the lock."""
        first = self._entries.get(model_id)
        entries = [each for each in self._entries.values() if first and first in (each, each.base)]
        for entry in entries:
            del self._entries[entry.id]
            # A use of the caller, whose release closes the model after the last request.
            entry.uses += 1
        self._leaving += entries
        return entries

    def close(self) -> None:
        """Close all models."""
        _close_all(self._entries, self._leaving)

    def loaded_ids(self) -> list[str]:
        """Return the ids of the models in memory, the longest unused first."""
        with self._lock:
            return [name for name, entry in self._entries.items() if entry.model is not None]

    def loaded_models(self) -> list[LoadedModel]:
        """Return the models in memory, the longest unused first."""
        with self._lock:
            adapters = Counter(each.base.id for each in self._entries.values() if each.base)
            return [
                LoadedModel(
                    id=entry.id,
                    bytes=entry.bytes,
                    base=None if entry.base is None else entry.base.id,
                    loaded=entry.loaded,
                    last_used=entry.last_used,
                    requests=max(0, entry.uses - adapters[entry.id]),
                    speculation=decoder.speculation if decoder else None,
                )
                for entry in self._entries.values()
                if entry.loaded is not None
                for decoder in (_decoder(entry),)
            ]

    def weight_bytes(self) -> int:
        """Return the estimated memory of the weights of all loaded models."""
        with self._lock:
            return self._used_bytes()

    def _used_bytes(self) -> int:
        # Unloaded models count until their last reply; otherwise loading a model again and again
        # would exceed the budget.
        return sum(entry.bytes for entry in (*self._entries.values(), *self._leaving))

    @contextmanager
    def _borrow(self, model_id: str, preload: bool = False) -> Iterator[_Entry]:
        entry = self._acquire(model_id, preload)
        try:
            yield entry
        finally:
            self._release(entry)

    def _acquire(self, model_id: str, preload: bool = False) -> _Entry:
        """Return the loaded model, which stays in memory until :meth:`_release`."""
        report_model(model_id)
        with self._lock:
            entry = self._use(model_id)
        first = entry is None
        if entry is None:
            from luthier.library import models as store

            # Outside the lock: a download must not hold up other models.
            stored = store.find(model_id)
            base = None
            if store.shares_base(stored):
                assert stored.parent is not None
                # The base first: a base in use is not evicted while the adapter loads.
                base = self._acquire(stored.parent.id, preload)
            try:
                size = _weights(stored, base is not None)
                entry, first = self._reserve(model_id, size, base, preload)
            except BaseException:
                if base is not None:
                    self._release(base)
                raise
            if base is not None and not first:  # the other thread's entry has its own use
                self._release(base)
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
        """Return the entry of a model with one more use. The caller has acquired the lock."""
        entry = self._entries.get(model_id)
        if entry is not None:
            entry.uses += 1
            self._move_to_end(entry)
        return entry

    def _move_to_end(self, entry: _Entry) -> None:
        """Mark the entry as just used, and the base as used after the entry."""
        for each in (entry, entry.base):
            if each is not None and self._entries.get(each.id) is each:
                each.last_used = datetime.now(UTC)
                self._entries.move_to_end(each.id)

    def _reserve(
        self, model_id: str, size: int, base: _Entry | None, preload: bool
    ) -> tuple[_Entry, bool]:
        """Return the entry of the model, and whether the caller must load the model.

        Evicts models if necessary. An ``preload`` load evicts no model with a recent request. A new
        entry owns the use of ``base``.
        """
        recent = datetime.now(UTC) - RECENT
        with self._lock:
            # Another thread may have added the entry since the first look.
            entry = self._use(model_id)
            if entry is not None:
                return entry, False
            if size > self.budget:
                text = f"{size >> 20} MiB of memory, and the limit is {self.budget >> 20} MiB."
                raise InferenceFailed("ModelNotReady", f"The model needs {text}")
            # Loading models have not taken their memory yet, and jobs may have taken some.
            loading = sum(each.bytes for each in self._entries.values() if not each.ready.is_set())
            free = available_memory() - loading
            excess = size - min(self.budget - self._used_bytes(), free)
            evicted: list[_Entry] = []
            for other in self._entries.values():
                # `_move_to_end` keeps a base behind its adapters, so these are decided already.
                adapters = sum(each.base is other for each in evicted)
                stays = preload and other.last_used > recent
                if excess > 0 and other.uses == adapters and not stays:
                    evicted.append(other)
                    excess -= other.bytes
            free += sum(each.bytes for each in evicted)
            if excess > 0 and size > free:
                text = f"{size >> 20} MiB of memory, and {max(free, 0) >> 20} MiB are free now."
                raise InferenceFailed("ModelNotReady", f"The model needs {text} Try again later.")
            if excess > 0:
                raise InferenceFailed(
                    "ModelNotReady",
                    f"The model needs {size >> 20} MiB of memory, {excess >> 20} MiB more than the "
                    "models in use leave free. Try again soon.",
                )
            # After all checks, so that a rejected load evicts nothing.
            for other in evicted:
                del self._entries[other.id]
            self._entries[model_id] = entry = _Entry(model_id, size, base=base, uses=1)
            self._move_to_end(entry)
        for other in evicted:
            self._close(other)  # outside the lock: waits for threads
        return entry, True

    def _load(self, model_id: str, entry: _Entry) -> None:
        """Load the model for all waiting requests; the next request retries after a failure."""
        from luthier.library import models as store

        try:
            stored = store.check_active(store.find(model_id))
            with self._loading, nullcontext() if entry.base is None else _collector_paused():
                if stored.writes:
                    from luthier.inference.decoder import Decoder

                    entry.model = Decoder.open(
                        stored,
                        self.memory,
                        self.limits,
                        self._scheduler,
                        self._prefixes,
                        None if entry.base is None else _writer(entry.base),
                        None if self._latencies is None else self._latencies.of(stored),
                        self._deterministic,
                    )
                    # Removes the truncation of a tokenizer's file; no two threads may do so at once.
                    entry.model.chat.text_tokenizer.encode_whole("")
                else:
                    entry.model = SerialModel.open(
                        stored, self.limits, self._scheduler, self.memory, self._deterministic
                    )
            if entry.base is None:
                # Later full collections skip the 300,000 objects of libraries and base: 0.2 s each.
                gc.collect()
                gc.freeze()
        except LuthierError as error:
            entry.error = _failure(error)
        except Exception as error:
            # Memory or disk space may be available later.
            is_temporary = is_out_of_memory(error) or is_disk_error(error)
            entry.error = InferenceFailed(
                "ModelNotReady" if is_temporary else "ModelError",
                f"The model cannot be loaded: {type(error).__name__}.",
            )
            entry.error.__cause__ = error
        release_workers()  # of this thread: a decoder has its own thread
        if entry.error is not None:
            with self._lock:
                # After an `unload` while loading, the id may have another request's entry.
                if self._entries.get(model_id) is entry:
                    del self._entries[model_id]
            self._close(entry)
        else:
            entry.loaded = datetime.now(UTC)
        # Last: waiting requests read `model` and `error` after this event.
        entry.ready.set()

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.uses -= 1
            entry.last_used = datetime.now(UTC)
            # An entry without uses stays loaded for the next request, unless evicted or unloaded.
            last = not entry.uses and entry in self._leaving
        if last:
            try:
                self._close(entry)
            finally:
                with self._lock:
                    if entry in self._leaving:
                        self._leaving.remove(entry)

    def _close(self, entry: _Entry) -> None:
        """Close an evicted entry and release the base."""
        entry.close()
        base, entry.base = entry.base, None
        if base is not None:
            self._release(base)
        else:
            gc.unfreeze()  # or cycles of the network would never be freed


def _close_all(entries: OrderedDict[str, _Entry], leaving: list[_Entry]) -> None:
    while entries or leaving:
        entry = leaving.pop() if leaving else entries.popitem()[1]
        entry.close()
    gc.unfreeze()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause garbage collection in the block.

    The 14,000 objects of an adapter cause a full collection in each eighth load, which takes three
    times as long as the load.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _failure(error: LuthierError) -> InferenceFailed:
    """Return the error of a failed load, without paths of this machine."""
    return InferenceFailed("ModelError", f"The model cannot be loaded: {without_home(str(error))}")


def _decoder(entry: _Entry) -> Decoder | None:
    from luthier.inference.decoder import Decoder

    return entry.model if isinstance(entry.model, Decoder) else None


def _writer(entry: _Entry) -> Decoder:
    decoder = _decoder(entry)
    if decoder is None:
        raise entry.model.refusal(f"This model {entry.model.purpose} and generates no text.")
    return decoder


def _serial(
    entry: _Entry, lack: str = "predicts no labels, and generates no images"
) -> SerialModel:
    """Return a model with turns; the error for a generative model includes ``lack``."""
    if not isinstance(entry.model, SerialModel):
        raise InferenceRefused(f"This model generates text and {lack}.", "model")
    return entry.model


def _weights(stored: StoredModel, shares_base: bool) -> int:
    """Return the bytes of a model's weights in memory, without the base of an adapter."""
    from luthier.engine.machine import choose_machine
    from luthier.models.formats.save import ADAPTER
    from luthier.models.formats.tensors import tensor_headers

    if not shares_base:
        files = list(stored.network_folder.rglob("*.safetensors"))
    else:
        files = [stored.folder / ADAPTER]
    if not files:
        raise UnknownModel(f"{stored.id} has no weights")
    numbers = 0
    for path in files:
        try:
            numbers += sum(math.prod(shape) for _, shape in tensor_headers(path).values())
        except LuthierError as error:
            raise _failure(error) from error
    times = _STACKED if shares_base else _LOADED_TWICE
    return int(times * choose_machine().dtype.itemsize * numbers)
