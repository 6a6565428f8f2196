"""The models that are in memory: loaded when they are first asked, the longest unused let go of."""

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

from luthier.cancellation import cancellable
from luthier.engine.machine import available_memory, release_workers
from luthier.errors import LuthierError, UnknownModel
from luthier.files import waits_for_disk, without_home
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
)
from luthier.inference.memory import CacheBudget
from luthier.inference.prefix_cache import PrefixCache
from luthier.inference.scheduler import FairScheduler, in_background
from luthier.inference.sequential import Embedding, ImageSamples, ModelInput, SerialModel
from luthier.limits import ModelLimits
from luthier.models.speculation import Speculation

if TYPE_CHECKING:
    from luthier.data.inputs import Media
    from luthier.inference.decoder import Decoder
    from luthier.inference.latency import LatencyTable
    from luthier.library.models import StoredModel
    from luthier.media.image_generation import Reconstruction
    from luthier.models.sampling import Constraint

LOADING_SECONDS = 300.0
"""How long a request waits for its model to be loaded."""
RECENT = timedelta(minutes=1)
"""A model that was asked so lately stays where another one is loaded that nobody has asked yet."""
_LOADED_TWICE = 2.5
"""Of the weights' bytes: they are kept a second time in the kernels' order."""
_STACKED = 2.0
"""Memory of an adapter next to its base, as a multiple of its file: weights and a slot of a
stack."""


@dataclass(eq=False)
class _Entry:
    """A model that is loaded, or about to be."""

    id: str
    bytes: int
    ready: threading.Event = field(default_factory=threading.Event)
    model: Any = None
    base: _Entry | None = None
    """The entry of the model whose network it shares, which it uses as long as it has a place."""
    error: Exception | None = None
    uses: int = 0
    """Requests that it answers, and adapters on it."""
    loaded: datetime | None = None
    last_used: datetime = field(default_factory=lambda: datetime.now(UTC))

    def close(self) -> None:
        """End its work, as far as it was loaded; once, whoever asks for it."""
        model, self.model = self.model, None
        if model is not None:
            model.close()


@dataclass(frozen=True)
class LoadedModel:
    """A model that is in memory."""

    id: str
    bytes: int
    """Estimated memory of its weights in bytes, without the weights of its base."""
    base: str | None
    """Id of the model whose network it shares."""
    loaded: datetime
    last_used: datetime
    """When it was loaded or asked last, or ended an answer."""
    requests: int
    """Those that it answers now."""
    speculation: Speculation | None = None
    """What was guessed for its answers that have ended; ``None`` of one that only reads."""


class ModelPool:
    """Answers for every model of the store, by its stored id. Safe to share between threads."""

    def __init__(
        self,
        budget: int | None = None,
        cache: int | None = None,
        limits: ModelLimits | None = None,
        latencies: LatencyTable | None = None,
        deterministic: bool = False,
    ) -> None:
        """``budget`` bytes for the weights of all models together, ``cache`` for what they keep of
        sequences; by default shares of the free memory. ``limits`` hold for each model. How soon
        models write is counted in ``latencies``. Models run one sequence or row at a time if
        ``deterministic``.
        """
        self._latencies, self._deterministic = latencies, deterministic
        self.limits = limits or ModelLimits()
        free = available_memory()
        self.budget = int(self.limits.weights_share * free) if budget is None else budget
        cache = int(self.limits.cache_share * free) if cache is None else cache
        self.memory = CacheBudget(cache, self.limits.share_of(cache))
        # Behind a beginning that was read earlier, a prompt is cut into other chunks.
        self._prefixes = None if deterministic else PrefixCache(self.memory)
        self._scheduler = FairScheduler()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._leaving: list[_Entry] = []
        """What has no place any more, and answers still: its memory counts until it is closed."""
        self._lock = threading.Lock()
        # While transformers builds a network it changes what holds for the whole process, such as the
        # type of new tensors: a second one beside it would lack weights, or have others.
        self._loading = threading.Lock()
        # Networks that run while the interpreter ends would take it down.
        self._finally = weakref.finalize(self, _close_all, self._entries, self._leaving)

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
        return cancellable(metered_stream(stream, model_id))

    def encode(self, model_id: str, prompt: Prompt) -> list[int]:
        """Tokens of ``prompt`` as the model reads it; ``TooLong`` for twice its context and
        more."""
        with self._borrow(model_id) as entry:
            return [int(token) for token in _writer(entry).encode(prompt)]

    def count(self, model_id: str, prompt: Prompt) -> int:
        """How many those are."""
        return len(self.encode(model_id, prompt))

    def token_bytes(self, model_id: str, ids: Sequence[int]) -> list[bytes]:
        """What tokens of a model stand for; ``TooLong`` for more than a prompt may have."""
        with self._borrow(model_id) as entry:
            ids_T = _writer(entry).encode(ids).tolist()
            return [_writer(entry).constraints.token_bytes(i) for i in ids_T]

    def check_constraint(self, constraint: Constraint) -> None:
        """Refuse what no model's answers can be kept to, without asking any.

        Raises:
            InferenceRefused: with the reason.
        """
        from luthier.inference.constraints import check_constraint

        check_constraint(constraint, self.limits.schema_characters)

    def writes(self, model_id: str) -> bool:
        """Whether it writes text, and does not read it only."""
        from luthier.library import models as store

        return store.find(model_id).writes

    def embed(self, model_id: str, texts: Sequence[str | Sequence[int]]) -> list[Embedding]:
        """Vectors of texts, or of texts as tokens.

        Texts of concurrent requests are read together.

        Raises:
            UnknownModel, InferenceRefused, InferenceFailed: as :meth:`submit`.
        """
        with self._borrow(model_id) as entry:
            encoder = _serial(
                entry, "gives no embeddings: ask a model that does, such as an encoder"
            )
            examples = encoder.texts(texts)
            found = encoder.embed(examples, self._work(math.inf))
        count_tokens(model_id, sum(each.tokens for each in found))
        return found

    def predict(
        self, model_id: str, inputs: Sequence[ModelInput], top: int | None = None
    ) -> list[dict[str, Any]]:
        """What a model that reads says of each input: ``label`` and ``scores``, ``score``, ….

        ``top`` leaves so many classes in ``scores``, the likeliest first. An image or a sound
        counts as one token that was read. Inputs of all who ask at once are read together, as by
        :meth:`embed`.

        Raises:
            UnknownModel, InferenceRefused, InferenceFailed: as :meth:`submit`; ``ModelTimeout``
            where
                it takes more than ``image_seconds``.
        """
        self._check_count(len(inputs), "inputs")
        with self._borrow(model_id) as entry:
            examples, tokens = _serial(entry).inputs(inputs)
            answers: list[dict[str, Any]] = entry.model.predict(examples, top, self._work())
        count_tokens(model_id, tokens)
        return answers

    def reconstruct(self, model_id: str, images: Sequence[Media]) -> list[Reconstruction]:
        """Each image as the model gives it back; read and made, it counts as two tokens."""
        self._check_count(len(images), "images")
        with self._borrow(model_id) as entry:
            model = _serial(entry)
            found = model.reconstruct(images, self._work())
        count_tokens(model_id, len(found), len(found))
        return found

    def sample(self, model_id: str, request: ImageRequest) -> ImageSamples:
        """New images of a model that makes them; each counts as one token that was written.

        Raises:
            UnknownModel, InferenceRefused, InferenceFailed: as :meth:`predict`.
        """
        self._check_count(request.count, "count")
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        with self._borrow(model_id) as entry:
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

    def _work(self, seconds: float | None = None) -> Work:
        """What a model reads or draws for one request, for ``image_seconds`` where none are
        given."""
        queue_seconds = math.inf if in_background() else self.limits.queue_seconds
        return Work(self.limits.image_seconds if seconds is None else seconds, queue_seconds)

    def load(self, model_id: str) -> None:
        """Have a model in memory before it is asked.

        Models that nobody has asked for :data:`RECENT` make room for it, those in use do not.

        Raises:
            UnknownModel: where there is no such model.
            InferenceFailed: ``ModelNotReady`` where there is no room now, ``ModelError`` where it
                cannot be loaded.
        """
        with self._borrow(model_id, unasked=True):
            pass

    def unload(self, model_id: str) -> None:
        """Let go of a model, and of adapters on it, as soon as their last answers have ended."""
        with self._lock:
            gone = self._take_out(model_id)
        for entry in gone:
            self._release(entry)

    def _take_out(self, model_id: str) -> list[_Entry]:
        """Give up the places of a model and its adapters; called with the lock. Release them
        after."""
        first = self._entries.get(model_id)
        gone = [each for each in self._entries.values() if first and first in (each, each.base)]
        for entry in gone:
            del self._entries[entry.id]
            entry.uses += 1
        self._leaving += gone
        return gone

    def close(self) -> None:
        """End all work and let go of everything."""
        _close_all(self._entries, self._leaving)

    def loaded_ids(self) -> list[str]:
        """Ids of the models in memory, the longest unused first."""
        with self._lock:
            return [name for name, entry in self._entries.items() if entry.model is not None]

    def loaded_models(self) -> list[LoadedModel]:
        """The models in memory, the longest unused first."""
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
        """Memory that the weights of the loaded models are reckoned to take."""
        with self._lock:
            return self._used_bytes()

    def _used_bytes(self) -> int:
        """Of all models that have a place, or answer still. Called with the lock."""
        return sum(entry.bytes for entry in (*self._entries.values(), *self._leaving))

    @contextmanager
    def _borrow(self, model_id: str, unasked: bool = False) -> Iterator[_Entry]:
        entry = self._acquire(model_id, unasked)
        try:
            yield entry
        finally:
            self._release(entry)

    def _acquire(self, model_id: str, unasked: bool = False) -> _Entry:
        """The loaded model, not to be let go of until it is released; see :meth:`_reserve`."""
        with self._lock:
            entry = self._use(model_id)
        first = entry is None
        if entry is None:
            from luthier.library import models as store

            # It may have to be downloaded first, which no other model waits for.
            stored = store.find(model_id)
            base = None
            if store.shares_base(stored):
                assert stored.parent is not None
                base = self._acquire(stored.parent.id, unasked)
            try:
                size = _weights(stored, base is not None)
                entry, first = self._reserve(model_id, size, base, unasked)
            except BaseException:
                if base is not None:
                    self._release(base)
                raise
            if base is not None and not first:  # the use of the base goes with the first one's
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
        """The model where it has a place, with one use more. Called with the lock."""
        entry = self._entries.get(model_id)
        if entry is not None:
            entry.uses += 1
            self._move_to_end(entry)
        return entry

    def _move_to_end(self, entry: _Entry) -> None:
        """It is the latest in use; its base comes behind it, which has to stay for longer."""
        for each in (entry, entry.base):
            if each is not None and self._entries.get(each.id) is each:
                each.last_used = datetime.now(UTC)
                self._entries.move_to_end(each.id)

    def _reserve(
        self, model_id: str, size: int, base: _Entry | None, unasked: bool
    ) -> tuple[_Entry, bool]:
        """A place for the model, made free where needed, and whether it has to be loaded.

        With it goes the use of its ``base``, unless there is a place already. Where it is
        ``unasked`` models that were asked lately keep their places.
        """
        recent = datetime.now(UTC) - RECENT
        with self._lock:
            entry = self._use(model_id)
            if entry is not None:
                return entry, False
            if size > self.budget:
                text = f"{size >> 20} MiB of memory, and {self.budget >> 20} MiB are there."
                raise InferenceFailed("ModelNotReady", f"The model needs {text}")
            # What is being loaded is not taken yet, and jobs may have taken what was free at the start.
            loading = sum(each.bytes for each in self._entries.values() if not each.ready.is_set())
            free = available_memory() - loading
            excess = size - min(self.budget - self._used_bytes(), free)
            evicted: list[_Entry] = []
            for other in self._entries.values():
                adapters = sum(each.base is other for each in evicted)
                stays = unasked and other.last_used > recent
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
                    f"The model needs {size >> 20} MiB of memory, {excess >> 20} MiB more than is left "
                    "beside models at work or asked lately. Try again soon.",
                )
            for other in evicted:
                del self._entries[other.id]
            self._entries[model_id] = entry = _Entry(model_id, size, base=base, uses=1)
            self._move_to_end(entry)
        for other in evicted:
            self._close(other)  # waits for its threads
        return entry, True

    def _load(self, model_id: str, entry: _Entry) -> None:
        """Load it once for all who wait; a failure is told to them, and not remembered."""
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
                    # Takes off the truncation that a tokenizer's file may name: later no two threads
                    # may do so at once.
                    entry.model.chat.encode_whole("")
                else:
                    entry.model = SerialModel.open(
                        stored, self.limits, self._scheduler, self.memory, self._deterministic
                    )
            if entry.base is None:
                # A full collection looks at the 300,000 objects of libraries and base, for 0.2 s.
                gc.collect()
                gc.freeze()
        except LuthierError as error:
            entry.error = _failure(error)
        except Exception as error:
            # What has no room now may have some later.
            short = isinstance(error, MemoryError) or waits_for_disk(error)
            entry.error = InferenceFailed(
                "ModelNotReady" if short else "ModelError",
                f"The model cannot be loaded: {type(error).__name__}.",
            )
            entry.error.__cause__ = error
        release_workers()  # of the thread that asked: a decoder has its own
        if entry.error is not None:
            with self._lock:
                if self._entries.get(model_id) is entry:
                    del self._entries[model_id]
            self._close(entry)
        else:
            entry.loaded = datetime.now(UTC)
        entry.ready.set()

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.uses -= 1
            entry.last_used = datetime.now(UTC)
            # Else it was closed with the pool.
            last = not entry.uses and entry in self._leaving
        if last:
            try:
                self._close(entry)
            finally:
                with self._lock:
                    if entry in self._leaving:
                        self._leaving.remove(entry)

    def _close(self, entry: _Entry) -> None:
        """End the work of what has no place any more, and its use of a base."""
        entry.close()
        base, entry.base = entry.base, None
        if base is not None:
            self._release(base)
        else:
            gc.unfreeze()  # else cycles of the network would stay for ever


def _close_all(entries: OrderedDict[str, _Entry], leaving: list[_Entry]) -> None:
    while entries or leaving:
        entry = leaving.pop() if leaving else entries.popitem()[1]
        entry.close()
    gc.unfreeze()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection while a model is loaded: to make an adapter's 14,000 objects sets off a
    full one in each eighth load, which takes three times as long as the load."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _failure(error: LuthierError) -> InferenceFailed:
    """Why a model cannot be loaded, without the places of this machine."""
    return InferenceFailed("ModelError", f"The model cannot be loaded: {without_home(str(error))}")


def _decoder(entry: _Entry) -> Decoder | None:
    """What writes with a model in memory; ``None`` of one that only reads."""
    from luthier.inference.decoder import Decoder

    return entry.model if isinstance(entry.model, Decoder) else None


def _writer(entry: _Entry) -> Decoder:
    decoder = _decoder(entry)
    if decoder is None:
        raise entry.model.refusal(f"This model {entry.model.purpose} and writes no text.")
    return decoder


def _serial(entry: _Entry, lack: str = "gives no labels, and makes no images") -> SerialModel:
    """What does one thing at a time; of what writes the refusal says its ``lack``."""
    if not isinstance(entry.model, SerialModel):
        raise InferenceRefused(f"This model writes text: it {lack}.", "model")
    return entry.model


def _weights(stored: StoredModel, shares_base: bool) -> int:
    """Bytes that a model takes in memory, without what its sequences keep; those of the network
    that it shares are its base's."""
    from luthier.engine.machine import choose_machine
    from luthier.models.save import ADAPTER
    from luthier.models.tensors import tensor_headers

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
