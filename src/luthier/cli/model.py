"""Models in memory: :func:`load` and the methods of a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from luthier.errors import DataError, Problem, RecipeError, check_at_least_one

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from luthier.inference.generation import GeneratedReply, Generator
    from luthier.inference.nearest import Neighbour
    from luthier.library.models import StoredModel
    from luthier.media.image_generation import ImageGenerator, Reconstruction, SampledImage
    from luthier.types import Message, Row

    Conversation = Sequence[Message | Mapping[str, str]]
    Values = Any
    """An array, a series or a frame; their classes have no common type."""


class Model:
    """Model in memory for prompts, conversations, texts and images."""

    def __init__(self, model_id: str | StoredModel) -> None:
        """Open a base or custom model by id; see :func:`load`."""
        from luthier.inference.generation import Generator
        from luthier.inference.prediction import Predictor
        from luthier.library.models import check_active, find
        from luthier.objectives.base import predicts

        self.stored = check_active(find(model_id)) if isinstance(model_id, str) else model_id
        objective = self.stored.objective
        self.reads = predicts(objective)
        """Whether the model predicts (:meth:`predict`) or generates (:meth:`generate`)."""
        self.opened: Predictor | ImageGenerator | Generator
        if self.reads:
            self.opened = Predictor.open(self.stored)
        elif objective.task.draws:
            from luthier.media.image_generation import ImageGenerator

            self.opened = ImageGenerator.open(self.stored)
        else:
            self.opened = Generator.open(self.stored)

    def __repr__(self) -> str:
        """Return the id and the objective of the model."""
        return f"<luthier.Model {self.stored.id}, {self.stored.objective.method}>"

    @property
    def generator(self) -> Generator:
        """Generator of text; raises for models that generate no text."""
        from luthier.inference.generation import Generator

        if self.stored.objective.task.draws:
            raise RecipeError(f"{self.stored.id} generates images. Call sample()")
        if not isinstance(self.opened, Generator):
            embeds = self.stored.objective.task.embeds
            use = "embeddings. Call embed()" if embeds else "labels. Call predict()"
            raise RecipeError(f"{self.stored.id} returns {use}")
        return self.opened

    @property
    def image_generator(self) -> ImageGenerator:
        """Generator of images; raises for models that generate no images."""
        from luthier.inference.prediction import Predictor
        from luthier.media.image_generation import ImageGenerator

        opened = self.opened
        if isinstance(opened, Predictor):
            opened = ImageGenerator(opened.network, opened.objective, opened.chat, self.stored.id)
        if not isinstance(opened, ImageGenerator):
            raise RecipeError(f"{self.stored.id} generates text. Call generate()")
        return opened

    def sample(
        self,
        count: int = 1,
        *,
        seed: int = 0,
        label: str | None = None,
        prompt: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        negative_prompt: str | None = None,
    ) -> list[SampledImage]:
        """Return new images, each with ``pixels`` ``[H, W, 3]`` and a ``label``.

        The same ``seed`` gives the same images.

        Args:
            count: number of images.
            seed: random seed.
            label: class of the images. By default, a model with classes samples all classes in
                turn.
            prompt: description of the images, for a model trained on captions.
            steps: denoising steps of a diffusion model.
            guidance_scale: scale of classifier-free guidance of a diffusion model.
            eta: noise of DDIM sampling of a diffusion model, from 0 to 1.
            negative_prompt: description to avoid, for a model trained on captions.
        """
        from luthier.media.objectives.diffusion import DenoisingSettings

        settings = DenoisingSettings(steps, guidance_scale, eta, negative_prompt)
        return self.image_generator.sample(count, seed, label, settings=settings, prompt=prompt)

    def reconstruct(self, images: Sequence[str]) -> list[Reconstruction]:
        """Return the reconstruction and error of each image, given by path."""
        from luthier.data.in_memory import texts_of
        from luthier.data.prompts import input_row

        paths = texts_of(images, "images")
        rows = [input_row(path, "images[]", n) for n, path in enumerate(paths, 1)]
        return self.image_generator.reconstruct(rows)

    @overload
    def generate(self, prompts: str | Conversation, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str | Conversation], **sampling: Any) -> list[str]: ...
    def generate(
        self, prompts: str | Conversation | Sequence[str | Conversation], **sampling: Any
    ) -> str | list[str]:
        """Return the reply to one prompt or conversation, or a list for several.

        A conversation is a list of messages, each ``{"role": ..., "content": ...}`` or a
        :class:`~luthier.types.Message`. Keywords are fields of
        :class:`luthier.models.decoding.sampling.Sampling`. The text excludes reasoning; :meth:`reply`
        returns both.
        """
        replies = self.reply(prompts, **sampling)
        if isinstance(replies, list):
            return [reply.text for reply in replies]
        return replies.text

    @overload
    def reply(self, prompts: str | Conversation, **sampling: Any) -> GeneratedReply: ...
    @overload
    def reply(
        self, prompts: Sequence[str | Conversation], **sampling: Any
    ) -> list[GeneratedReply]: ...
    def reply(
        self, prompts: str | Conversation | Sequence[str | Conversation], **sampling: Any
    ) -> GeneratedReply | list[GeneratedReply]:
        """Return replies as :meth:`generate` does, with reasoning and token counts.

        ``reasoning`` is empty unless the chat template supports reasoning. ``finished`` is False
        for a reply that reached a limit.
        """
        from luthier.models.decoding.sampling import Sampling

        chosen = Sampling(**sampling)
        if isinstance(prompts, str) or _is_conversation(prompts):
            return self.generator.answers([_prompt(prompts)], chosen)[0]
        return self.generator.answers([_prompt(each) for each in prompts], chosen)

    def stream(
        self,
        prompt: str | Conversation,
        *,
        on_reasoning: Callable[[str], None] = lambda piece: None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield the reply to one prompt or conversation in pieces during generation.

        ``on_reasoning`` receives the pieces of the reasoning.
        """
        from luthier.models.decoding.sampling import Sampling

        return self.generator.stream(_prompt(prompt), Sampling(**sampling), on_reasoning)

    # For a type checker, a str is also a Sequence[str]: the overloads overlap.
    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        texts: str | Mapping[str, Any],
        *,
        top: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> dict[str, Any]: ...
    @overload
    def predict(
        self,
        texts: Sequence[str | Sequence[str] | Mapping[str, Any]] | Values,
        *,
        top: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]: ...
    def predict(
        self,
        texts: str | Mapping[str, Any] | Sequence[str | Sequence[str] | Mapping[str, Any]] | Values,
        *,
        top: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Return ``label`` and ``scores``, ``rating``, or ``tags`` of one text, or a list for
        several.

        ``entities`` accompany ``tags``, each with ``label``, ``text``, ``start`` and exclusive
        ``end``: in characters of a text, or in positions of a list of words.

        For a model of images or audio, a text is the path of a file; bytes of a file and images of
        Pillow are read, too. A model that transcribes images returns ``text`` and ``probability``.

        In a list, an entry may also be a list of words, or a row such as ``{"id": 7, "text":
        "..."}``. A row is returned with all its fields and the result under ``predicted``.

        Args:
            texts: one text, or several in a list, an array, a series or a frame of rows.
            top: number of classes in ``scores``, the most likely classes first.
            columns: column names of rows by luthier's keys, such as ``{"text": "question"}``.
        """
        from luthier.cli.python import python_settings
        from luthier.data.in_memory import values_of, wrong_value

        if isinstance(texts, str | bytes | Path | Mapping) or _is_picture(texts):
            return self.predict([texts], top=top, columns=columns)[0]
        texts = values_of(texts)
        from luthier.data.prompts import PREDICTED, InputChecker, input_row
        from luthier.data.shapes.texts import TaggedWords
        from luthier.inference.prediction import Predictor

        if not isinstance(self.opened, Predictor):
            does = "generates text. Call generate()"
            if self.stored.objective.task.draws:
                does = "generates images. Call sample()"
            raise RecipeError(f"{self.stored.id} {does}")
        if not isinstance(texts, Sequence):
            raise RecipeError(
                f"`texts` must be a text or a list of texts, not {type(texts).__name__}"
            )
        check_at_least_one(top=top)
        if not texts:
            return []
        problems: list[Problem] = []
        checker = InputChecker("texts[]", problems, columns, PREDICTED)
        rows: list[Row | None] = []
        for index, text in enumerate(texts, 1):
            if isinstance(text, str | Path):
                rows.append(input_row(str(text), "texts[]", index))
            elif isinstance(text, bytes) or _is_picture(text):
                rows.append(checker.row(index, {self.stored.chat.reads: _encode_picture(text)}))
            elif isinstance(text, Mapping):
                rows.append(checker.row(index, dict(text)))
            else:
                words = values_of(text)
                if isinstance(words, Sequence) and all(isinstance(each, str) for each in words):
                    rows.append(TaggedWords("texts[]", index, tuple(words), None))
                else:
                    problems.append(wrong_value(text, "a text", "texts[]", index))
        if problems:
            with python_settings():
                raise DataError(problems)
        answers = self.opened.answers([row for row in rows if row], top=top)
        return [
            {**text, PREDICTED: answer} if isinstance(text, Mapping) else answer
            for text, answer in zip(texts, answers, strict=True)
        ]

    @overload
    def rewards(  # type: ignore[overload-overlap]
        self, prompts: str, completions: str
    ) -> float: ...
    @overload
    def rewards(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]: ...
    def rewards(
        self, prompts: str | Sequence[str], completions: str | Sequence[str]
    ) -> float | list[float]:
        """Return the reward of each completion, from a model of objective ``reward_model``."""
        if isinstance(prompts, str) and isinstance(completions, str):
            return self.rewards([prompts], [completions])[0]
        # Two sequences of characters would be rewarded pair by pair.
        if isinstance(prompts, str) or isinstance(completions, str):
            raise RecipeError("`prompts` and `completions` must be two texts or two lists")
        from luthier.data.in_memory import texts_of
        from luthier.data.shapes.conversations import PromptCompletion
        from luthier.inference.prediction import Predictor
        from luthier.tasks import REWARD

        opened = self.opened
        if not isinstance(opened, Predictor) or opened.objective.task is not REWARD:
            raise RecipeError(f"{self.stored.id} is not a reward model")
        sides = texts_of(prompts, "prompts"), texts_of(completions, "completions")
        pairs = enumerate(zip(*sides, strict=True), 1)
        rows = [PromptCompletion("completions[]", n, p, c) for n, (p, c) in pairs]
        return [answer["reward"] for answer in opened.answers(rows)]

    def rank(self, query: str, documents: Sequence[str]) -> list[dict[str, Any]]:
        """Return ``index`` and ``score`` of each document, the most relevant first.

        The model is of objective ``reranker``. Documents are truncated to the context.
        """
        from luthier.data.in_memory import texts_of
        from luthier.inference.prediction import Predictor

        if not isinstance(self.opened, Predictor):
            raise RecipeError(
                f"{self.stored.id} is no reranker. Train one with `--objective reranker`"
            )
        scores = self.opened.rank(query, texts_of(documents, "documents"))
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        return [{"index": index, "score": scores[index]} for index in order]

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels of a classifier, in the order of :meth:`predict_proba`."""
        labels = getattr(self.stored.objective, "labels", None)
        if not labels:
            raise RecipeError(f"{self.stored.id} is no classifier of labels")
        return tuple(labels)

    def predict_proba(self, texts: Sequence[str] | Values) -> NDArray[np.float64]:
        """Return the probability of each class ``[R, L]``, in the order of :attr:`classes`."""
        import numpy as np

        classes = self.classes
        answers = [each.get("predicted", each) for each in self.predict(texts)]
        if any("scores" not in each for each in answers):
            raise RecipeError(f"{self.stored.id} has no probability of each class. Call predict()")
        scores = [each["scores"] for each in answers]
        found = np.array([[each[name] for name in classes] for each in scores], dtype=np.float64)
        # Without texts, the shape is `[0, L]`.
        return found.reshape(-1, len(classes))

    def embed_documents(self, texts: Sequence[str]) -> list[list[float]]:
        """Return embeddings as lists, as LangChain's ``Embeddings`` does."""
        found: list[list[float]] = self.embed(texts).tolist()
        return found

    def embed_query(self, text: str) -> list[float]:
        """Return the embedding of a query as a list, as LangChain's ``Embeddings`` does."""
        found: list[float] = self.embed(text).tolist()
        return found

    def __call__(self, input: Sequence[str]) -> list[NDArray[np.float32]]:
        """Return embeddings as a list of arrays, as Chroma's ``EmbeddingFunction`` does."""
        return list(self.embed(input))

    def embed(self, texts: str | Sequence[str] | Values) -> NDArray[np.float32]:
        """Return embeddings ``[R, H]`` of length 1, or ``[H]`` for one text."""
        import numpy as np

        if isinstance(texts, str):
            return np.asarray(self.embed([texts])[0], dtype=np.float32)
        answers = [each.get("predicted", each) for each in self.predict(texts)]
        if answers and "embedding" not in answers[0]:
            raise RecipeError(f"{self.stored.id} returns labels. Call predict()")
        return np.array([answer["embedding"] for answer in answers], dtype=np.float32)

    @overload
    def nearest(  # type: ignore[overload-overlap]
        self,
        query: str,
        among: str | Path | Sequence[str],
        *,
        count: int = ...,
        index: str | Path | None = ...,
        columns: Mapping[str, str] | None = ...,
    ) -> list[Neighbour]: ...
    @overload
    def nearest(
        self,
        query: Sequence[str],
        among: str | Path | Sequence[str],
        *,
        count: int = ...,
        index: str | Path | None = ...,
        columns: Mapping[str, str] | None = ...,
    ) -> list[list[Neighbour]]: ...
    def nearest(
        self,
        query: str | Sequence[str],
        among: str | Path | Sequence[str],
        *,
        count: int = 10,
        index: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> list[Neighbour] | list[list[Neighbour]]:
        """Return the rows most similar to a text, or to the image at a path.

        Args:
            query: a text or a path; a list of queries gives a list of results.
            among: a data file, a folder or an archive of images, or a list of texts or paths.
            count: number of neighbours, sorted by similarity.
            index: file for embeddings; the next call embeds only new rows.
            columns: column names of rows by luthier's keys, such as ``{"text": "question"}``.
        """
        from luthier.data.in_memory import texts_of
        from luthier.data.prompts import input_row, load_inputs
        from luthier.inference.nearest import find_nearest
        from luthier.inference.prediction import Predictor

        if not isinstance(self.opened, Predictor):
            raise RecipeError(f"{self.stored.id} returns no embeddings. Choose an embedding model")
        if isinstance(among, str | Path):
            rows = [row for _, row in load_inputs(among, columns)]
        else:
            texts = texts_of(among, "among")
            rows = [input_row(given, "among[]", n) for n, given in enumerate(texts, 1)]
        asked = [query] if isinstance(query, str) else texts_of(query, "query")
        queries = [input_row(given, "query[]", n) for n, given in enumerate(asked, 1)]
        file = Path(index) if index is not None else None
        found = find_nearest(self.opened, self.stored, queries, rows, count, file).neighbours
        return found[0] if isinstance(query, str) else found


def _is_conversation(given: Any) -> bool:
    from luthier.types import Message

    return isinstance(given, Sequence) and any(
        isinstance(each, Mapping | Message) for each in given
    )


def _prompt(given: Any) -> Any:
    """Convert a prompt to the generator's type: a text, or messages."""
    from luthier.types import Message

    if isinstance(given, str):
        return given
    if not _is_conversation(given):
        raise RecipeError("a prompt is a text, or a list of messages with role and content")
    found = []
    for each in given:
        if isinstance(each, Mapping):
            if {*each} != {"role", "content"} or not all(isinstance(v, str) for v in each.values()):
                raise RecipeError(f"a message needs `role` and `content`, not {', '.join(each)}")
            each = Message(each["role"], each["content"])
        found.append(each)
    return found


def stored_model(model: str | Model | StoredModel) -> StoredModel:
    """Return the stored model of an id or of a model in memory."""
    from luthier.library.models import find

    if isinstance(model, str):
        return find(model)
    return model.stored if isinstance(model, Model) else model


def load(model_id: str) -> Model:
    """Load a model by id, local directory or hub id."""
    return Model(model_id)


def _is_picture(value: object) -> bool:
    """Return whether a value is an image of Pillow."""
    return hasattr(value, "getexif") and hasattr(value, "save")


def _encode_picture(picture: Any) -> bytes:
    """Return the bytes of a file: given ones, or the PNG of an upright image."""
    if isinstance(picture, bytes):
        return picture
    from PIL import ImageOps

    stream = BytesIO()
    ImageOps.exif_transpose(picture).save(stream, "PNG")
    return stream.getvalue()
