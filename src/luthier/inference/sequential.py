"""Models in memory with one turn at a time: models that predict, and image generators.

:mod:`luthier.inference.scheduler` selects the client of the next turn. Rows of waiting requests are
read together (:mod:`luthier.inference.batcher`). Images are generated for one request at a time,
with a new turn for each part of a long request.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.conversations.chat import NoTokenizer
from luthier.data.inputs import PLURAL, Media
from luthier.data.shapes.media import BARE_MEDIA, MediaRow
from luthier.data.shapes.texts import QueryDocument, RawText
from luthier.engine.machine import release_workers
from luthier.errors import RecipeError, RowRefused
from luthier.inference.batcher import ReadRequest, RowBatcher, RowFailed, Work
from luthier.inference.embeddings import gives_embeddings
from luthier.inference.inference import (
    ImageRequest,
    InferenceFailed,
    InferenceRefused,
    PredictionsOnly,
)
from luthier.inference.memory import RETRY_SECONDS, CacheBudget
from luthier.inference.prompt_limits import PromptLimit
from luthier.inference.scheduler import FairScheduler, current_client
from luthier.limits import ModelLimits
from luthier.objectives.base import predicts
from luthier.plugins import bundled_extensions
from luthier.processes import Cancelled

if TYPE_CHECKING:
    from luthier.inference.prediction import Predictor
    from luthier.library.models import StoredModel
    from luthier.media.image_generation import ImageGenerator, Reconstruction, SampledImage
    from luthier.models.networks.network import Network
    from luthier.types import Example, FloatArray

RECONSTRUCTED_PER_TURN = 8
"""Images per turn of an autoencoder, because large images take long to decode."""
THIS_MODEL = "This model"
"""Name of the model in errors; clients do not know the id in the library."""

ModelInput = str | Media | QueryDocument
"""A text, image, audio clip or window of a time series."""


@dataclass(frozen=True)
class Embedding:
    """The embedding of a text."""

    vector: tuple[float, ...]
    """Values of a vector of length 1."""
    tokens: int

    def shortened(self, dimensions: int | None, normalize: bool = True) -> FloatArray:
        """Return the first ``dimensions`` values, by default normalized to length 1.

        Raises:
            InferenceRefused: the vector has fewer dimensions.
        """
        vector_D = np.asarray(self.vector, dtype=np.float32)
        if dimensions is None or dimensions == len(vector_D):
            return vector_D
        if dimensions > len(vector_D):
            text = f"The model's vectors have {len(vector_D)} dimensions."
            raise InferenceRefused(text, "dimensions")
        cut_D = vector_D[:dimensions]
        norm = float(np.linalg.norm(cut_D)) if normalize else 0.0
        return cut_D / np.float32(norm) if norm else cut_D


@dataclass(frozen=True)
class ImageSamples:
    """Generated images with the seed."""

    images: Sequence[SampledImage]
    seed: int


class SerialModel:
    """A model in memory with turns."""

    def __init__(
        self,
        predictor: Predictor | None,
        generator: ImageGenerator | None = None,
        limits: ModelLimits | None = None,
        scheduler: FairScheduler | None = None,
        memory: CacheBudget | None = None,
        deterministic: bool = False,
    ) -> None:
        """Serve ``predictor``, ``generator``, or both on the same network.

        Activations are taken from ``memory``. A ``deterministic`` model reads one row at a time.
        """
        opened = predictor or generator
        assert opened is not None
        self._predictor, self._generator, self._chat = predictor, generator, opened.chat
        self._network: Network = opened.network
        self._scheduler, self._limits = scheduler or FairScheduler(), limits or ModelLimits()
        self._prompt_limit: PromptLimit | None = None
        if predictor is not None and not isinstance(opened.chat.tokenizer, NoTokenizer):
            self._prompt_limit = PromptLimit(
                predictor.chat.text_tokenizer, predictor.context, self._limits, "input"
            )
            # The first call removes the truncation of a tokenizer's file from the shared tokenizer,
            # which is not safe in two threads.
            predictor.chat.text_tokenizer.encode_whole("")
        self._lock, self._closed = threading.Lock(), False
        self._open = ExitStack()
        if predictor is not None:
            memory = memory or CacheBudget(sys.maxsize)
            self._batcher = RowBatcher(
                predictor, self._limits, self._scheduler, memory, deterministic
            )
            from luthier.models.decoding.packing import PackedLinears

            # Packed once, because oneDNN would reorder bfloat16 weights in each product.
            self._open.enter_context(PackedLinears(self._network.model))

    @staticmethod
    def open(
        stored: StoredModel,
        limits: ModelLimits | None = None,
        scheduler: FairScheduler | None = None,
        memory: CacheBudget | None = None,
        deterministic: bool = False,
    ) -> SerialModel:
        """Load ``stored`` on the best device of this machine."""
        from luthier.inference.prediction import Predictor

        objective = stored.objective
        (images,) = bundled_extensions("image_generators").values()
        if not predicts(objective) and objective.task.draws:
            generator = images.load().open(stored, THIS_MODEL)
            return SerialModel(None, generator, limits, scheduler)
        predictor = Predictor.open(stored)
        generator = None
        makes_images = objective.task.draws or objective.task.reconstructs
        if makes_images and predictor.chat.reads == "image":
            generator = images.load()(
                predictor.network, predictor.objective, predictor.chat, THIS_MODEL
            )
        return SerialModel(predictor, generator, limits, scheduler, memory, deterministic)

    @property
    def purpose(self) -> str:
        """Ability of the model, to follow "This model" in a sentence."""
        reads = [] if self._predictor is None else [f"takes {PLURAL[self._chat.reads]}"]
        return " and ".join([*reads, *(["generates images"] if self.makes_images else [])])

    def refusal(self, text: str) -> InferenceRefused:
        """Return an error of ``text`` and the supported request."""
        if self._predictor is None:
            return InferenceRefused(text, "model")
        if gives_embeddings(self._predictor.objective):
            return InferenceRefused(f"{text} Request embeddings.", "model")
        refused = PredictionsOnly(text, "model")
        refused.reads = self._chat.reads
        return refused

    @property
    def makes_images(self) -> bool:
        """True if the model generates images."""
        return self._generator is not None and self._generator.objective.task.draws

    @property
    def reads(self) -> str:
        """Kind of input: ``text``, ``image``, ``audio`` or ``window``."""
        return self._chat.reads

    def texts(self, inputs: Sequence[str | Sequence[int]]) -> list[Example]:
        """Encode texts, or token ids, for :meth:`embed`.

        Raises:
            InferenceRefused: for an empty or too long text, or a model without embeddings.
        """
        predictor = self._reader()
        if not gives_embeddings(predictor.objective):
            raise self.refusal("This model predicts labels and has no embeddings.")
        limit, vocabulary = self._text_limit(), int(self._network.model.config.vocab_size)
        examples: list[Example] = []
        for each in inputs:
            if not isinstance(each, str):
                limit.check_ids(each, vocabulary)
                each = predictor.chat.replies.decode(list(each))
            examples.append(self._encode_text(each, len(examples)))
        return examples

    def embed(self, examples: Sequence[Example], work: Work | None = None) -> list[Embedding]:
        """Return the embeddings of examples from :meth:`texts`.

        Raises:
            InferenceFailed: if too many requests wait, the client hung up, or the model is closed.
        """
        answers = self._read(examples, work or Work())
        vectors = [np.asarray(answer["embedding"], dtype=np.float32) for answer in answers]
        return [
            Embedding(tuple(vector.tolist()), len(example))
            for vector, example in zip(vectors, examples, strict=True)
        ]

    def inputs(self, inputs: Sequence[ModelInput]) -> tuple[list[Example], int]:
        """Encode inputs and count their tokens: 1 per image or audio clip.

        Raises:
            InferenceRefused: for an unsupported input.
        """
        predictor = self._reader()
        examples: list[Example] = []
        for index, each in enumerate(inputs):
            try:
                if isinstance(each, Media):
                    examples.append(predictor.encode(self._media_row(each, index), index))
                elif isinstance(each, QueryDocument):
                    self._text_limit().check_text(each.plain_text())
                    examples.append(predictor.encode_pair(each, index))
                else:
                    examples.append(self._encode_text(each, index))
            except (InferenceRefused, RowRefused) as error:
                raise _input_refusal(index, each, error.problem.message) from None
            except RecipeError as error:
                raise InferenceRefused(f"{error}.", "model") from None
        return examples, sum(1 if each.media is not None else len(each) for each in examples)

    def predict(
        self, examples: Sequence[Example], top: int | None, work: Work
    ) -> list[dict[str, Any]]:
        """Return the predictions for examples from :meth:`inputs`.

        Raises:
            InferenceRefused: for an undecodable image or audio clip.
            InferenceFailed: if the work takes too long, or too many requests wait.
        """
        from luthier.inference.prediction import keep_likeliest

        answers = self._read(examples, work)
        keep_likeliest(answers, top)
        return answers

    def reconstruct(self, images: Sequence[Media], work: Work) -> list[Reconstruction]:
        """Return each image after a pass through the autoencoder, or restored.

        Raises:
            InferenceRefused: for a model that reconstructs no images, or an undecodable image.
            InferenceFailed: as :meth:`predict`.
        """
        generator = self._generator
        if generator is None or not generator.can_reconstruct:
            text = f"This model {self.purpose} and reconstructs no images. Use a vae."
            raise InferenceRefused(text, "model")
        rows: list[MediaRow] = []
        for index, each in enumerate(images):
            try:
                rows.append(self._media_row(each, index))
            except InferenceRefused as refused:
                raise _input_refusal(index, each, refused.problem.message) from None
        reconstructions: list[Reconstruction] = []
        for start in range(0, len(rows), RECONSTRUCTED_PER_TURN):
            part = rows[start : start + RECONSTRUCTED_PER_TURN]
            with self._turn(work):
                try:
                    reconstructions += generator.reconstruct(part)
                except RowRefused as refused:
                    raise self._undecodable(part, refused) from refused
        return reconstructions

    def sample(
        self, request: ImageRequest, seed: int, work: Work, done: Callable[[int], None]
    ) -> list[SampledImage]:
        """Generate images.

        Raises:
            InferenceRefused: for a model that generates no images, or does not support the request.
            InferenceFailed: as :meth:`predict`.
        """
        generator = self._generator
        if generator is None or not self.makes_images:
            raise InferenceRefused(f"This model {self.purpose} and generates no images.", "model")
        try:
            return generator.generate(request, seed, done, lambda: self._turn(work))
        except RecipeError as refused:
            raise InferenceRefused(f"{refused}.", refused.setting) from refused

    def close(self) -> None:
        """Free the network."""
        with self._lock:
            # The lock waits for the running turn, which uses the network.
            self._closed = True
            self._open.close()
            self._network.close()

    def _reader(self) -> Predictor:
        if self._predictor is None:
            raise InferenceRefused(f"This model {self.purpose} and takes no input.", "model")
        return self._predictor

    def _text_limit(self) -> PromptLimit:
        if self._prompt_limit is None:
            raise InferenceRefused(f"This model {self.purpose} and takes no text.", "model")
        return self._prompt_limit

    def _encode_text(self, text: str, index: int) -> Example:
        """Encode a text; raise :class:`InferenceRefused` if longer than the context."""
        limit, predictor = self._text_limit(), self._reader()
        limit.check_text(text)
        try:
            example = predictor.encode(RawText("", index + 1, text), index)
        except RowRefused as refused:
            if refused.rule == "row.empty":
                raise InferenceRefused("The input has no tokens.", "input") from None
            raise
        if len(example) > predictor.context:
            raise limit.too_long()
        return example

    def _media_row(self, media: Media, index: int) -> MediaRow:
        if media.kind != self._chat.reads:
            text = f"This model {self.purpose} and takes no {PLURAL[media.kind]}."
            raise InferenceRefused(text, "input")
        limits = {"image": self._limits.image_pixels, "audio": self._limits.sound_samples}
        limited = replace(media, most=limits.get(media.kind))
        return BARE_MEDIA[media.kind]("", index + 1, limited)

    def _undecodable(self, part: Sequence[MediaRow], refused: RowRefused) -> InferenceRefused:
        # The error names no image, so each image of the turn is decoded again.
        for row in part:
            media = self._chat.media_input(row)
            try:
                media.array()
            except RowRefused as bad:
                return _input_refusal(row.line - 1, media.media, bad.problem.message)
        return InferenceRefused(refused.problem.message, "inputs")

    def _read(self, examples: Sequence[Example], work: Work) -> list[dict[str, Any]]:
        """Return the predictions for ``examples``, read together with rows of concurrent requests."""
        request = ReadRequest(examples, work)
        self._batcher.add(request)
        try:
            with suppress(Cancelled):  # another request's turn may have read the rows
                while not request.is_done:
                    self._read_pass(request)
            if not request.is_done:
                raise _failure_of(work)
            return request.answers()
        except RowFailed as failed:
            error = failed.__cause__
            assert isinstance(error, Exception)
            media = examples[failed.place].media
            if isinstance(error, RowRefused) and media is not None:
                raise _input_refusal(failed.place, media.media, error.problem.message) from error
            raise error from None
        except Cancelled:
            raise _unloaded_failure() from None
        finally:
            self._batcher.remove(request)

    def _read_pass(self, request: ReadRequest) -> None:
        """Wait for the turn of ``request`` and read the next pass."""
        with (
            self._network_turn(lambda: request.is_done or _is_over(request.work)) as parts,
            self._batcher.next_pass(request) as rows,
        ):
            for row in rows:
                parts[row.request.client] += row.cost
            if rows:
                self._batcher.read(rows)
        if not rows:  # other models use the memory, and do not notify when they free it
            # After the turn, so that other clients can run meanwhile.
            time.sleep(RETRY_SECONDS)

    @contextmanager
    def _turn(self, work: Work) -> Iterator[None]:
        """Run the block as a turn of ``work``."""
        try:
            with self._network_turn(lambda: _is_over(work)), work.count_time():
                # Ends overdue work between two passes of the network. Removed after the turn, because
                # passes of other turns are not part of this work.
                hook = self._network.model.register_forward_pre_hook(lambda *_: work.check())
                try:
                    yield
                finally:
                    hook.remove()
        except Cancelled:
            raise _failure_of(work) from None

    @contextmanager
    def _network_turn(self, is_over: Callable[[], bool]) -> Iterator[Counter[str]]:
        """Run the block as a turn of the thread's client (:meth:`FairScheduler.work`)."""
        with self._scheduler.work(current_client(), self, is_over) as parts, self._lock:
            if self._closed:
                raise _unloaded_failure()
            try:
                yield parts
            finally:
                # Idle OpenMP workers of this thread would slow the products of other threads: 77
                # instead of 54 ms per step.
                release_workers()


def _is_over(work: Work) -> bool:
    return work.is_cancelled or work.is_late


def _failure_of(work: Work) -> InferenceFailed:
    return InferenceFailed.busy(work.queue_seconds) if work.is_late else _unloaded_failure()


def _unloaded_failure() -> InferenceFailed:
    return InferenceFailed("ServiceUnavailable", "The model is being unloaded.")


def _input_refusal(index: int, content: ModelInput, message: str) -> InferenceRefused:
    member = content.kind if isinstance(content, Media) else "text"
    field = f"inputs.{index}.{member}"
    return InferenceRefused(f"{field}: {message[:1].lower()}{message[1:]}", field)
