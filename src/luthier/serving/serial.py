"""Models in memory that do one thing at a time: they read texts, images or sounds, or make images.

A model that writes answers many requests in each of its steps (:mod:`luthier.serving.decoder`). What is
here answers one after the other, and gives its place away between parts of a long request: whose turn
it is, :mod:`luthier.serving.scheduler` says. The network is asked through the same objects as by the
command line (:mod:`luthier.serving.prediction`, :mod:`luthier.serving.images`).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.cancellation import KillHandle, cancellable
from luthier.data.chat import NoTokenizer
from luthier.data.media import PLURAL, Media
from luthier.data.shapes import BARE_MEDIA, RawText
from luthier.errors import RecipeError, RowRefused
from luthier.limits import ModelLimits
from luthier.objectives.capabilities import (
    DenoisingSettings,
    SupportsPrediction,
    SupportsPrompts,
    SupportsReconstruction,
    SupportsSampling,
)
from luthier.serving.inference import ImageRequest, InferenceFailed, InferenceRefused
from luthier.serving.prompts import PromptLimit
from luthier.serving.scheduler import Cancelled, FairScheduler, current_client

if TYPE_CHECKING:
    from luthier.models.network import Network
    from luthier.serving.decoder import Decoder
    from luthier.serving.images import ImageGenerator, Reconstruction, SampledImage
    from luthier.serving.prediction import Predictor
    from luthier.store.models import StoredModel
    from luthier.types import Row

READ_AT_ONCE = 8
"""Inputs that are read in one turn: large images take longer to decode than to be read."""
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


class Work:
    """What a model does for one request: in turns, and for so many seconds in all."""

    def __init__(self, seconds: float = math.inf) -> None:
        """It is given up when the client of the thread hangs up."""
        self._seconds, self._used, self._began = seconds, 0.0, 0.0
        self._gone = threading.Event()
        cancellable(KillHandle(self._gone.set))

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._gone.is_set()

    @contextmanager
    def count_time(self) -> Iterator[None]:
        """Count the time of the block, unless all is used up.

        Raises:
            InferenceFailed: where it is.
        """
        self._began = time.monotonic()
        self.check()
        try:
            yield
        finally:
            self._used += time.monotonic() - self._began

    def check(self) -> None:
        """End it within a turn where it has taken too long, or nobody waits for it."""
        if self.is_cancelled:
            raise Cancelled
        if self._used + time.monotonic() - self._began > self._seconds:
            raise InferenceFailed(
                "ModelTimeout",
                f"The model has worked on this request for {self._seconds:g} seconds, which is what "
                "one has. Ask for less at once.",
            )


class SerialModel:
    """One model in memory that answers one request after the other."""

    def __init__(
        self,
        predictor: Predictor | None,
        generator: ImageGenerator | None = None,
        limits: ModelLimits | None = None,
        scheduler: FairScheduler | None = None,
    ) -> None:
        """``predictor`` reads, ``generator`` makes images; both have the same network."""
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

    @staticmethod
    def open(
        stored: StoredModel,
        limits: ModelLimits | None = None,
        scheduler: FairScheduler | None = None,
    ) -> SerialModel:
        """Load ``stored`` on the best device of this machine."""
        from luthier.serving.confined import serving_format
        from luthier.serving.images import ImageGenerator
        from luthier.serving.prediction import Predictor
        from luthier.store.models import objective_of

        objective = objective_of(stored)
        makes = isinstance(objective, SupportsSampling | SupportsReconstruction)
        if not isinstance(objective, SupportsPrediction) and makes:
            return SerialModel(None, ImageGenerator.open(stored, THIS_MODEL), limits, scheduler)
        predictor = Predictor.open(stored, serving_format(stored))
        generator = None
        if makes and predictor.chat.reads == "image":
            generator = ImageGenerator(
                predictor.network, predictor.objective, predictor.chat, THIS_MODEL
            )
        return SerialModel(predictor, generator, limits, scheduler)

    @staticmethod
    def of(writer: Decoder, scheduler: FairScheduler) -> SerialModel:
        """The mean over the network of a model that writes, in the same memory."""
        from luthier.objectives.contrastive import Contrastive
        from luthier.serving.prediction import Predictor

        mean = Contrastive(pooling="mean")
        predictor = Predictor(writer.network, mean, writer.chat, writer.context)
        return SerialModel(predictor, None, writer.limits, scheduler)

    @property
    def purpose(self) -> str:
        """What it does, behind "This model"."""
        does = []
        if self._predictor is not None:
            does.append(f"reads {PLURAL[self._chat.reads]}")
        if isinstance(self._generator and self._generator.objective, SupportsSampling):
            does.append("makes images")
        return " and ".join(does)

    def read(self, given: str | Sequence[int]) -> tuple[str, int]:
        """A text, or the one that ids stand for, and the number of its tokens.

        Raises:
            InferenceRefused: for a text without tokens, or with more than the model reads.
        """
        predictor = self._reader()
        if predictor.objective.task != "embedding":
            raise InferenceRefused("This model gives labels and no embeddings.", "model")
        limit = self._text_limit()
        if isinstance(given, str):
            return given, self._count_tokens(given)
        limit.check_ids(given, int(self._network.model.config.vocab_size))
        text = predictor.chat.decode(list(given))
        return text, self._count_tokens(text)

    def embed(self, text: str, tokens: int, work: Work | None = None) -> Embedding:
        """The vector of a text of so many tokens, as :meth:`read` gave them.

        Raises:
            InferenceFailed: where its client hung up before its turn has come, or after
                :meth:`close`.
        """
        with self._turn(work or Work()):
            answer = self._reader().answers([RawText("", 1, text)])[0]
        vector = np.asarray(answer["embedding"], dtype=np.float32)
        return Embedding(tuple(vector.tolist()), tokens)

    def rows(self, inputs: Sequence[ModelInput]) -> tuple[list[Row], int]:
        """Rows of what is to be read, and the tokens that they are: 1 of each image or sound.

        Raises:
            InferenceRefused: for what the model does not read.
        """
        rows: list[Row] = []
        tokens = 0
        for index, given in enumerate(inputs):
            try:
                rows.append(self._row(given, index + 1))
                tokens += 1 if isinstance(given, Media) else self._count_tokens(given)
            except InferenceRefused as refused:
                raise _refusal_of(index, given, str(refused)) from None
        return rows, tokens

    def predict(self, rows: Sequence[Row], top: int | None, work: Work) -> list[dict[str, Any]]:
        """What the model says of each of ``rows``, as :meth:`rows` made them.

        Raises:
            InferenceRefused: for an image or a sound that cannot be decoded.
            InferenceFailed: where it takes too long, or nobody waits for it.
        """
        predictor = self._reader()
        return self._in_parts(rows, lambda part: predictor.answers(part, top=top), work)

    def reconstruct(self, rows: Sequence[Row], work: Work) -> list[Reconstruction]:
        """Each image after the way through the network; see :meth:`predict`.

        Raises:
            InferenceRefused: where the model gives no images back.
        """
        generator = self._generator
        if generator is None or not isinstance(generator.objective, SupportsReconstruction):
            raise InferenceRefused(
                f"This model {self.purpose}, and gives none back. A vae does.", "model"
            )
        return self._in_parts(rows, generator.reconstruct, work)

    def sample(
        self, request: ImageRequest, seed: int, work: Work, done: Callable[[int], None]
    ) -> list[SampledImage]:
        """New images of ``seed``.

        Raises:
            InferenceRefused: where the model makes none, or not such ones.
            InferenceFailed: where it takes too long, or nobody waits for it.
        """
        generator = self._generator
        if generator is None or not isinstance(generator.objective, SupportsSampling):
            raise InferenceRefused(f"This model {self.purpose} and makes no images.", "model")
        objective = generator.objective
        label, prompt = request.label or None, None
        if isinstance(objective, SupportsPrompts) and objective.reads_prompts:
            label, prompt = None, label
        size = generator.processor.height, generator.processor.width
        if request.size is not None and request.size != size:
            height, width = size
            raise InferenceRefused(
                f"This model makes images of {width}x{height} (width x height), and no others.",
                "size",
            )
        settings = DenoisingSettings(request.steps, request.guidance_scale)
        try:
            return generator.sample(
                request.count, seed, label, done, lambda: self._turn(work), settings, prompt
            )
        except RecipeError as refused:
            parameter = "label" if refused.field == "prompt" else refused.field
            raise InferenceRefused(f"{refused}.", parameter) from refused

    def close(self) -> None:
        """Let go of the network."""
        with self._lock:
            self._closed = True
            self._network.close()
            self._chat.close()

    def _reader(self) -> Predictor:
        if self._predictor is None:
            raise InferenceRefused(f"This model {self.purpose} and reads none.", "model")
        return self._predictor

    def _text_limit(self) -> PromptLimit:
        if self._prompt_limit is None:
            raise InferenceRefused(f"This model {self.purpose}, and no texts.", "model")
        return self._prompt_limit

    def _count_tokens(self, text: str) -> int:
        """Tokens of a text that the model can read whole."""
        limit, predictor = self._text_limit(), self._reader()
        limit.check_text(text)
        tokens = len(predictor.chat.encode_whole(text))
        if not tokens:
            raise InferenceRefused("The input has no tokens.", "input")
        if tokens > predictor.context:
            raise limit.too_long()
        return tokens

    def _row(self, given: ModelInput, line: int) -> Row:
        if isinstance(given, str):
            return RawText("", line, given)
        if given.kind != self._chat.reads:
            raise InferenceRefused(
                f"This model {self.purpose}, and no {PLURAL[given.kind]}.", "input"
            )
        most = {"image": self._limits.image_pixels, "audio": self._limits.sound_samples}
        return BARE_MEDIA[given.kind]("", line, replace(given, most=most.get(given.kind)))

    def _in_parts(
        self, rows: Sequence[Row], answer: Callable[[Sequence[Row]], list[Any]], work: Work
    ) -> list[Any]:
        """Answers to ``rows``, some in each turn."""
        answers: list[Any] = []
        for start in range(0, len(rows), READ_AT_ONCE):
            part = rows[start : start + READ_AT_ONCE]
            with self._turn(work):
                try:
                    answers += answer(part)
                except RowRefused as refused:
                    raise _undecodable(part, refused) from refused
        return answers

    @contextmanager
    def _turn(self, work: Work) -> Iterator[None]:
        """The network, for as long as the block takes."""
        gone = InferenceFailed("ServiceUnavailable", "The model is being unloaded.")
        try:
            with (
                self._scheduler.work(current_client(), self, lambda: work.is_cancelled),
                self._lock,
                work.count_time(),
            ):
                if self._closed:
                    raise gone
                # A model that takes many passes for an image is ended between two of them; the passes
                # of other turns are not those of this work.
                hook = self._network.model.register_forward_pre_hook(lambda *_: work.check())
                try:
                    yield
                finally:
                    hook.remove()
        except Cancelled:
            raise gone from None


def _undecodable(part: Sequence[Row], refused: RowRefused) -> InferenceRefused:
    """What is told of the one of ``part`` that a reader ``refused``: it is read again to know which."""
    for row in part:
        media: Media = row.media  # type: ignore[attr-defined]
        try:
            media.pixels() if media.kind == "image" else media.samples()
        except RowRefused as bad:
            return _refusal_of(row.line - 1, media, bad.message)
    return InferenceRefused(refused.message, "inputs")


def _refusal_of(index: int, given: ModelInput, message: str) -> InferenceRefused:
    member = given.kind if isinstance(given, Media) else "text"
    return InferenceRefused(
        f"inputs.{index}.{member}: {message[:1].lower()}{message[1:]}", f"inputs.{index}.{member}"
    )
