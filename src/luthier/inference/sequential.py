"""Models in memory that do one thing at a time: they read texts, images or sounds, or make images.

Whose turn it is, :mod:`luthier.inference.scheduler` says. What is to be read goes through the
network together with the rows of others who wait (:mod:`luthier.inference.batcher`); images are
made for one request after the other, and its place is given away between parts of a long one. The
network is asked through the same objects as by the command line
(:mod:`luthier.inference.prediction`, :mod:`luthier.media.image_generation`).
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

from luthier.data.chat import NoTokenizer
from luthier.data.inputs import PLURAL, Media
from luthier.data.shapes.media import BARE_MEDIA, MediaRow
from luthier.data.shapes.texts import RawText
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
from luthier.inference.scheduler import Cancelled, FairScheduler, current_client
from luthier.limits import ModelLimits
from luthier.media.objectives.diffusion import DenoisingSettings
from luthier.media.objectives.generative import Generative
from luthier.media.objectives.vae import VAE
from luthier.objectives.base import predicts

if TYPE_CHECKING:
    from luthier.inference.prediction import Predictor
    from luthier.library.models import StoredModel
    from luthier.media.image_generation import ImageGenerator, Reconstruction, SampledImage
    from luthier.models.network import Network
    from luthier.types import Example

COPIED_AT_ONCE = 8
"""Images that go through an autoencoder in one turn: large ones take longer to decode than that."""
THIS_MODEL = "This model"
"""What refusals call it, as clients do not know its id in the store."""

ModelInput = str | Media
"""A text, an image, a sound or a window of a time series that a model is to read."""


@dataclass(frozen=True)
class Embedding:
    """A text as a vector."""

    vector: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class ImageSamples:
    """New images, and the seed that gives the same ones again."""

    images: Sequence[SampledImage]
    seed: int


class SerialModel:
    """One model in memory that does one thing at a time, for one request or for several."""

    def __init__(
        self,
        predictor: Predictor | None,
        generator: ImageGenerator | None = None,
        limits: ModelLimits | None = None,
        scheduler: FairScheduler | None = None,
        memory: CacheBudget | None = None,
        deterministic: bool = False,
    ) -> None:
        """``predictor`` reads, ``generator`` makes images; both have the same network.

        What passes keep is taken from ``memory``. A pass has one row if ``deterministic``.
        """
        opened = predictor or generator
        assert opened is not None
        self._predictor, self._generator, self._chat = predictor, generator, opened.chat
        self._network: Network = opened.network
        self._scheduler, self._limits = scheduler or FairScheduler(), limits or ModelLimits()
        self._prompt_limit: PromptLimit | None = None
        if predictor is not None and not isinstance(opened.chat.tokenizer, NoTokenizer):
            self._prompt_limit = PromptLimit(
                predictor.chat, predictor.context, self._limits, "input"
            )
            # Takes off the truncation that a tokenizer's file may name: no two threads may do so at
            # once.
            predictor.chat.encode_whole("")
        self._lock, self._closed = threading.Lock(), False
        self._open = ExitStack()
        if predictor is not None:
            memory = memory or CacheBudget(sys.maxsize)
            self._batcher = RowBatcher(
                predictor, self._limits, self._scheduler, memory, deterministic
            )
            from luthier.models.packing import PackedLinears

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
        from luthier.media.image_generation import ImageGenerator

        objective = stored.objective
        makes = isinstance(objective, Generative)
        if not predicts(objective) and makes:
            return SerialModel(None, ImageGenerator.open(stored, THIS_MODEL), limits, scheduler)
        predictor = Predictor.open(stored)
        generator = None
        if makes and predictor.chat.reads == "image":
            generator = ImageGenerator(
                predictor.network, predictor.objective, predictor.chat, THIS_MODEL
            )
        return SerialModel(predictor, generator, limits, scheduler, memory, deterministic)

    @property
    def purpose(self) -> str:
        """What it does, behind "This model"."""
        does = []
        if self._predictor is not None:
            does.append(f"reads {PLURAL[self._chat.reads]}")
        if self.makes_images:
            does.append("makes images")
        return " and ".join(does)

    def refusal(self, text: str) -> InferenceRefused:
        """``text`` says what it does not do; where it reads, the answer says what to ask it for."""
        if self._predictor is None:
            return InferenceRefused(text, "model")
        if gives_embeddings(self._predictor.objective):
            return InferenceRefused(f"{text} Ask it for embeddings.", "model")
        return PredictionsOnly(text, "model")

    @property
    def makes_images(self) -> bool:
        """Whether it makes new images."""
        return isinstance(self._generator and self._generator.objective, Generative)

    @property
    def reads(self) -> str:
        """What it reads: ``text``, ``image``, ``audio`` or ``window``."""
        return self._chat.reads

    def texts(self, given: Sequence[str | Sequence[int]]) -> list[Example]:
        """Texts, or those that ids stand for, as tokens to :meth:`embed`.

        Raises:
            InferenceRefused: for a text without tokens, or with more than the model reads.
        """
        predictor = self._reader()
        if not gives_embeddings(predictor.objective):
            raise self.refusal("This model gives labels and no embeddings.")
        limit, vocabulary = self._text_limit(), int(self._network.model.config.vocab_size)
        examples: list[Example] = []
        for each in given:
            if not isinstance(each, str):
                limit.check_ids(each, vocabulary)
                each = predictor.chat.decode(list(each))
            examples.append(self._encode_text(each, len(examples)))
        return examples

    def embed(self, examples: Sequence[Example], work: Work | None = None) -> list[Embedding]:
        """The vectors of ``examples``, as :meth:`texts` made them.

        Raises:
            InferenceFailed: where too many requests wait, its client hung up before its turn has
            come,
                or after :meth:`close`.
        """
        answers = self._read(examples, work or Work())
        vectors = [np.asarray(answer["embedding"], dtype=np.float32) for answer in answers]
        return [
            Embedding(tuple(vector.tolist()), len(example))
            for vector, example in zip(vectors, examples, strict=True)
        ]

    def inputs(self, given: Sequence[ModelInput]) -> tuple[list[Example], int]:
        """What is to be read, and the tokens that it has: 1 of each image or sound.

        Raises:
            InferenceRefused: for what the model does not read.
        """
        predictor = self._reader()
        examples: list[Example] = []
        for index, each in enumerate(given):
            try:
                if isinstance(each, Media):
                    examples.append(predictor.encode(self._media_row(each, index), index))
                else:
                    examples.append(self._encode_text(each, index))
            except (InferenceRefused, RowRefused) as refused:
                message = (
                    refused.problem.message if isinstance(refused, RowRefused) else str(refused)
                )
                raise _refusal_of(index, each, message) from None
        return examples, sum(1 if each.media is not None else len(each) for each in examples)

    def predict(
        self, examples: Sequence[Example], top: int | None, work: Work
    ) -> list[dict[str, Any]]:
        """What the model says of each of ``examples``, as :meth:`inputs` made them.

        Raises:
            InferenceRefused: for an image or a sound that cannot be decoded. InferenceFailed: where
            it takes too long, too many requests wait, or nobody waits for it.
        """
        from luthier.inference.prediction import keep_likeliest

        answers = self._read(examples, work)
        keep_likeliest(answers, top)
        return answers

    def reconstruct(self, images: Sequence[Media], work: Work) -> list[Reconstruction]:
        """Each image after the way through the network.

        Raises:
            InferenceRefused: where the model gives no images back, or for one that cannot be
            decoded. InferenceFailed: as :meth:`predict`.
        """
        generator = self._generator
        if generator is None or not isinstance(generator.objective, VAE):
            raise InferenceRefused(
                f"This model {self.purpose}, and gives none back. A vae does.", "model"
            )
        rows: list[MediaRow] = []
        for index, each in enumerate(images):
            try:
                rows.append(self._media_row(each, index))
            except InferenceRefused as refused:
                raise _refusal_of(index, each, str(refused)) from None
        found: list[Reconstruction] = []
        for start in range(0, len(rows), COPIED_AT_ONCE):
            part = rows[start : start + COPIED_AT_ONCE]
            with self._turn(work):
                try:
                    found += generator.reconstruct(part)
                except RowRefused as refused:
                    raise self._undecodable(part, refused) from refused
        return found

    def sample(
        self, request: ImageRequest, seed: int, work: Work, done: Callable[[int], None]
    ) -> list[SampledImage]:
        """New images of ``seed``.

        Raises:
            InferenceRefused: where the model makes none, or not such ones.
            InferenceFailed: where it takes too long, or nobody waits for it.
        """
        generator = self._generator
        if generator is None or not isinstance(generator.objective, Generative):
            raise InferenceRefused(f"This model {self.purpose} and makes no images.", "model")
        objective = generator.objective
        label, prompt = request.label or None, None
        if objective.reads_prompts:
            label, prompt = None, label
        size = generator.processor.height, generator.processor.width
        if request.size is not None and request.size != size:
            height, width = size
            raise InferenceRefused(
                f"This model makes images of {width}x{height} (width x height), and no others.",
                "size",
            )
        settings = DenoisingSettings(
            request.steps,
            request.guidance_scale,
            negative_prompt=request.negative_prompt or None,
        )
        try:
            return generator.sample(
                request.count, seed, label, done, lambda: self._turn(work), settings, prompt
            )
        except RecipeError as refused:
            parameter = "label" if refused.setting == "prompt" else refused.setting
            raise InferenceRefused(f"{refused}.", parameter) from refused

    def close(self) -> None:
        """Let go of the network."""
        with self._lock:
            self._closed = True
            self._open.close()
            self._network.close()

    def _reader(self) -> Predictor:
        if self._predictor is None:
            raise InferenceRefused(f"This model {self.purpose} and reads none.", "model")
        return self._predictor

    def _text_limit(self) -> PromptLimit:
        if self._prompt_limit is None:
            raise InferenceRefused(f"This model {self.purpose}, and no texts.", "model")
        return self._prompt_limit

    def _encode_text(self, text: str, index: int) -> Example:
        """A text that the model can read whole."""
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

    def _media_row(self, given: Media, index: int) -> MediaRow:
        if given.kind != self._chat.reads:
            raise InferenceRefused(
                f"This model {self.purpose}, and no {PLURAL[given.kind]}.", "input"
            )
        most = {"image": self._limits.image_pixels, "audio": self._limits.sound_samples}
        media = replace(given, most=most.get(given.kind))
        return BARE_MEDIA[given.kind]("", index + 1, media)

    def _undecodable(self, part: Sequence[MediaRow], refused: RowRefused) -> InferenceRefused:
        """Return the refusal of the row of ``part`` that cannot be decoded."""
        for row in part:
            media = self._chat.media_input(row)
            try:
                media.array()
            except RowRefused as bad:
                return _refusal_of(row.line - 1, media.media, bad.problem.message)
        return InferenceRefused(refused.problem.message, "inputs")

    def _read(self, examples: Sequence[Example], work: Work) -> list[dict[str, Any]]:
        """Answers to ``examples``; whoever has its turn reads those of others who wait as well."""
        request = ReadRequest(examples, work)
        self._batcher.add(request)
        try:
            with suppress(Cancelled):  # others may have read it while it waited for its turn
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
                raise _refusal_of(failed.place, media.media, error.problem.message) from error
            raise error from None
        except Cancelled:
            raise _unloaded_failure() from None
        finally:
            self._batcher.remove(request)

    def _read_pass(self, request: ReadRequest) -> None:
        """Read some of the rows that wait, those of ``request`` first, when it is its turn."""
        with (
            self._network_turn(lambda: request.is_done or _is_over(request.work)) as parts,
            self._batcher.next_pass(request) as rows,
        ):
            for row in rows:
                parts[row.request.client] += row.cost
            if rows:
                self._batcher.read(rows)
        if not rows:  # other models have the memory; they do not tell when they give it back
            time.sleep(RETRY_SECONDS)

    @contextmanager
    def _turn(self, work: Work) -> Iterator[None]:
        """The network for one request, for as long as the block takes."""
        try:
            with self._network_turn(lambda: _is_over(work)), work.count_time():
                # A model that takes many passes for an image is ended between two of them; the passes
                # of other turns are not those of this work.
                hook = self._network.model.register_forward_pre_hook(lambda *_: work.check())
                try:
                    yield
                finally:
                    hook.remove()
        except Cancelled:
            raise _failure_of(work) from None

    @contextmanager
    def _network_turn(self, is_over: Callable[[], bool]) -> Iterator[Counter[str]]:
        """The network, when it is the turn of the thread's client: see
        :meth:`FairScheduler.work`."""
        with self._scheduler.work(current_client(), self, is_over) as parts, self._lock:
            if self._closed:
                raise _unloaded_failure()
            try:
                yield parts
            finally:
                release_workers()


def _is_over(work: Work) -> bool:
    """Whether there is no use in waiting for a turn."""
    return work.is_cancelled or work.is_late


def _failure_of(work: Work) -> InferenceFailed:
    """Why work was given up before it was done."""
    return InferenceFailed.busy(work.queue_seconds) if work.is_late else _unloaded_failure()


def _unloaded_failure() -> InferenceFailed:
    return InferenceFailed("ServiceUnavailable", "The model is being unloaded.")


def _refusal_of(index: int, given: ModelInput, message: str) -> InferenceRefused:
    member = given.kind if isinstance(given, Media) else "text"
    return InferenceRefused(
        f"inputs.{index}.{member}: {message[:1].lower()}{message[1:]}", f"inputs.{index}.{member}"
    )
