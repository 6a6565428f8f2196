"""The Python face: ``inspect``, ``estimate``, ``tune``, ``distil``, ``load``, ``evaluate`` and more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from luthier.errors import RecipeError, data_errors
from luthier.sdk.assembly import assign_fields, fields_of, recipe_of
from luthier.sdk.data import DEFAULT_BASE, clean, convert, inspect, split
from luthier.sdk.deciding import advise, estimate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from luthier.engine.metrics import Reporter
    from luthier.engine.runs import Result
    from luthier.engine.student import Student
    from luthier.evaluation.evaluate import Evaluation
    from luthier.graders import OnError, Spec
    from luthier.recipe import Recipe
    from luthier.serving.generation import Generator
    from luthier.serving.long_rows import LongRows
    from luthier.types import Message
    from luthier.workflows.distil.responses import Distilled

    Conversation = Sequence[Message | Mapping[str, str]]

__all__ = [
    "DEFAULT_BASE",
    "Model",
    "advise",
    "clean",
    "convert",
    "distil",
    "estimate",
    "evaluate",
    "inspect",
    "load",
    "pretrain",
    "split",
    "student",
    "tune",
]


def tune(
    data: str | Path | Recipe,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    **fields: Any,
) -> Result:
    """Tune a base model and store the custom model.

    Args:
        data: a data file, a TOML recipe, or a :class:`~luthier.recipe.Recipe`.
        resume: go on with an interrupted run of the same name and settings.
        reporter: receives progress; nothing is printed without one.
        **fields: fields of the recipe by dotted name with ``__`` for the dot, for example
            ``base="..."``, ``name="..."``, ``training__evaluate_every=50``, ``adaptation__rank=8``;
            ``epochs``, ``batch_size``, ``learning_rate`` and ``seed`` need no ``training__``.

    Returns:
        Model id, folders, losses, time and memory of the finished run.

    Raises:
        RefusedInput: before any training, for data or settings that cannot work.
    """
    from luthier.engine.train import train

    return train(recipe_of(data, fields), resume, reporter)


def distil(
    prompts: str | Path,
    *,
    teacher: str | None = None,
    student: str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **fields: Any,
) -> Distilled:
    """Let a teacher answer prompts, and tune a student on the answers that are accepted.

    Args:
        prompts: a file of prompts or conversations, or a TOML recipe.
        teacher: id of a local model, or ``https://host/v1#model`` for an OpenAI-compatible endpoint.
        student: base or custom model that learns; the default base model when not given.
        resume: go on with an interrupted distillation of the same name and settings.
        reporter: receives progress; nothing is printed without one.
        **fields: fields of :class:`luthier.workflows.distil.recipe.DistilRecipe` with ``__`` for the
            dot: those of :func:`tune`, and for example ``sampling__max_tokens=256`` or
            ``insights__minimum=50``.

    Returns:
        The finished run of the student, and what the manifest says of the distillation.

    Raises:
        RefusedInput: for prompts or settings that cannot work, or too few accepted answers.
        LuthierError: where the teacher cannot be reached; the answers so far are kept.
    """
    from luthier.asking.spec import address_fields
    from luthier.recipe import assign
    from luthier.workflows.distil import distil as run
    from luthier.workflows.distil.recipe import DistilRecipe

    plain = fields_of(prompts)
    if isinstance(plain.get("teacher"), str):
        plain["teacher"] = address_fields(plain["teacher"])
    for key, value in (address_fields(teacher) if teacher else {}).items():
        assign(plain, ["teacher", key], value)
    if student is not None:
        plain["base"] = student
    assign_fields(plain, fields)
    return run(DistilRecipe.parse(plain), resume, reporter)


def pretrain(
    data: str | Path | Sequence[str | Path],
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    **fields: Any,
) -> Result:
    """Train a tokenizer and a network from random weights on raw text; the result is a base model.

    Args:
        data: one file of raw text, several, or a TOML recipe.
        resume: go on with an interrupted run of the same name and settings.
        reporter: receives progress; nothing is printed without one.
        **fields: fields of :class:`luthier.pretraining.PretrainRecipe` with ``__`` for the dot, for
            example ``name="..."`` (which it needs), ``network__size="10m"``, ``training__epochs=1``.

    Returns:
        Model id, folders, losses, time and memory of the finished run.

    Raises:
        RefusedInput: before any training, for text or settings that cannot work.
    """
    from luthier.engine.pretrain import pretrain as run
    from luthier.pretraining import PretrainRecipe
    from luthier.recipe import read_toml

    paths = [Path(data)] if isinstance(data, str | Path) else [Path(path) for path in data]
    one = len(paths) == 1 and paths[0].suffix == ".toml"
    plain: dict[str, Any] = read_toml(paths[0]) if one else {"data": {"train": paths}}
    assign_fields(plain, fields)
    return run(PretrainRecipe.parse(plain), resume, reporter)


def student(
    teacher: str,
    *,
    name: str,
    layers: int | None = None,
    keep: Sequence[int] | None = None,
    heads: int | None = None,
    intermediate: int | None = None,
    hidden: int | None = None,
    reporter: Reporter | None = None,
) -> Student:
    """Make a smaller model of a teacher's own weights and store it; it has yet to be tuned.

    Args:
        teacher: id, local directory or hub id.
        name: of the new custom model.
        layers: how many, spread evenly over the teacher's; or ``keep``, their numbers from 0.
        heads, intermediate, hidden: widths; see :class:`luthier.models.student.StudentShape`.
        reporter: receives what will be cut; nothing is printed without one.

    Raises:
        RefusedInput: before any weight is read, for sizes, family, name or disk.
    """
    from luthier.engine.student import make_student
    from luthier.models.student import StudentShape

    kept = None if keep is None else tuple(keep)
    shape = StudentShape(layers, kept, heads, intermediate, hidden)
    return make_student(teacher, name, shape, reporter)


class Model:
    """A model in memory: answers prompts and conversations."""

    def __init__(self, model_id: str) -> None:
        """Open a base or custom model by id; see :func:`load`."""
        from luthier.serving.generation import Generator
        from luthier.serving.prediction import Predictor
        from luthier.store.models import find, objective_of

        self.stored = find(model_id)
        self.reads = objective_of(self.stored).reads
        """Whether it answers with labels (:meth:`predict`) or writes (:meth:`generate`)."""
        self.opened = (Predictor if self.reads else Generator).open(self.stored)

    @property
    def generator(self) -> Generator:
        """What writes; refuses models that read."""
        from luthier.serving.generation import Generator

        if not isinstance(self.opened, Generator):
            use = "embeddings; use embed()" if self._embeds else "labels; use predict()"
            raise RecipeError(f"{self.stored.id} gives {use}")
        return self.opened

    @property
    def _embeds(self) -> bool:
        from luthier.serving.prediction import Predictor

        return isinstance(self.opened, Predictor) and self.opened.objective.task == "embedding"

    @overload
    def generate(self, prompts: str | Conversation, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str | Conversation], **sampling: Any) -> list[str]: ...
    def generate(
        self, prompts: str | Conversation | Sequence[str | Conversation], **sampling: Any
    ) -> str | list[str]:
        """The reply to one prompt or conversation, or one to each of several.

        A conversation is a list of messages, each ``{"role": ..., "content": ...}`` or a
        :class:`~luthier.types.Message`. Keywords as :class:`luthier.serving.generation.Sampling`.
        """
        from luthier.serving.generation import Sampling

        chosen = Sampling(**sampling)
        if isinstance(prompts, str) or _is_conversation(prompts):
            return self.generator.replies([_prompt(prompts)], chosen)[0]
        return self.generator.replies([_prompt(each) for each in prompts], chosen)

    def stream(self, prompt: str | Conversation, **sampling: Any) -> Iterator[str]:
        """The reply to one prompt or conversation in pieces, as it is decoded."""
        from luthier.serving.generation import Sampling

        return self.generator.stream(_prompt(prompt), Sampling(**sampling))

    # A text is a sequence of texts to a type checker; to people it is one.
    @overload
    def predict(self, texts: str) -> dict[str, Any]: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, texts: Sequence[str | Sequence[str]]) -> list[dict[str, Any]]: ...
    def predict(
        self, texts: str | Sequence[str | Sequence[str]]
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """For one text, or each of several: ``label`` and ``scores``, ``rating``, or ``tags``.

        Among several a text may be a list of words.
        """
        if isinstance(texts, str):
            return self.predict([texts])[0]
        from luthier.serving.prediction import Predictor
        from luthier.types import Row

        if not isinstance(self.opened, Predictor):
            raise RecipeError(f"{self.stored.id} writes text; use generate()")
        if not isinstance(texts, Sequence):
            raise RecipeError(f"give a text, or a list of texts, and no {type(texts).__name__}")
        if not texts:
            return []
        rows = []
        for index, text in enumerate(texts, 1):
            words = tuple(text.split() if isinstance(text, str) else text)
            whole = text if isinstance(text, str) else " ".join(text)
            rows.append(Row("predict()", index, text=whole, tokens=words))
        return self.opened.answers(rows)

    @overload
    def rewards(  # type: ignore[overload-overlap]
        self, prompts: str, completions: str
    ) -> float: ...
    @overload
    def rewards(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]: ...
    def rewards(
        self, prompts: str | Sequence[str], completions: str | Sequence[str]
    ) -> float | list[float]:
        """The reward of each completion of its prompt, from a model of objective ``reward_model``."""
        if isinstance(prompts, str) and isinstance(completions, str):
            return self.rewards([prompts], [completions])[0]
        if isinstance(prompts, str) or isinstance(completions, str):
            raise RecipeError("give one prompt and one completion, or as many of each")
        from luthier.objectives import RewardModel
        from luthier.serving.prediction import Predictor
        from luthier.types import Row

        opened = self.opened
        if not isinstance(opened, Predictor) or not isinstance(opened.objective, RewardModel):
            raise RecipeError(f"{self.stored.id} is no reward model")
        pairs = enumerate(zip(prompts, completions, strict=True), 1)
        rows = [Row("rewards()", n, prompt=p, completion=c) for n, (p, c) in pairs]
        return [answer["reward"] for answer in opened.answers(rows)]

    def embed(self, texts: str | Sequence[str]) -> NDArray[np.float32]:
        """Embeddings ``[R, H]`` of length 1, of one text ``[H]``, from a model that embeds."""
        import numpy as np

        if isinstance(texts, str):
            return np.asarray(self.embed([texts])[0], dtype=np.float32)
        answers = self.predict(texts)
        if answers and "embedding" not in answers[0]:
            raise RecipeError(f"{self.stored.id} gives labels; use predict()")
        return np.array([answer["embedding"] for answer in answers], dtype=np.float32)


def _is_conversation(given: Any) -> bool:
    from luthier.types import Message

    return isinstance(given, Sequence) and any(
        isinstance(each, Mapping | Message) for each in given
    )


def _prompt(given: Any) -> Any:
    """A prompt as the generator takes it: a text, or messages."""
    from luthier.types import Message

    if isinstance(given, str):
        return given
    if not _is_conversation(given):
        raise RecipeError("a prompt is a text, or a list of messages with role and content")
    found = []
    for each in given:
        if isinstance(each, Mapping):
            if {*each} != {"role", "content"} or not all(isinstance(v, str) for v in each.values()):
                raise RecipeError(
                    f"a message has a role and a content, both texts; this one has {', '.join(each)}"
                )
            each = Message(each["role"], each["content"])
        found.append(each)
    return found


def load(model_id: str) -> Model:
    """Load a model by id, local directory or hub id."""
    return Model(model_id)


@data_errors("nothing was evaluated")
def evaluate(
    model: str | Model,
    data: str | Path,
    graders: Sequence[Spec] | Mapping[str, Spec] = ("exact",),
    max_tokens: int = 128,
    on_error: OnError = "fail",
    note: Callable[[str], None] = lambda text: None,
    long_rows: LongRows = "error",
) -> Evaluation:
    """Let a model answer the prompts of a data file and grade the replies.

    Rows with judged answers (chosen and rejected, ratings, thumbs) are not answered: the scores say how
    often the model ranks the answers as people did. Models that read are compared with the labels,
    ratings, tags or partners of the rows.

    Args:
        model: an id, or a model in memory.
        data: rows of prompt and reply, of judged answers, or with what a model that reads says.
        graders: methods by name, tables of ``method`` and fields, or :class:`luthier.graders.Grader`
            objects; a mapping gives them names of your own.
        max_tokens: of a reply at most.
        on_error: what becomes of a reply that a grader cannot grade: ``fail``, or score ``zero``.
        note: hears what a judge will cost and whether it is one.
        long_rows: what becomes of rows longer than the context: ``error`` names them all, ``drop``
            leaves them out, ``truncate`` cuts them; prompts to be answered are never cut.

    Returns:
        Mean scores by the graders' names, and every answer.

    Raises:
        RefusedInput: before anything is written, for rows or graders that cannot work.
        GradingFailed: with ``fail``, naming the row.
    """
    from luthier.data.rows import load_rows
    from luthier.evaluation.evaluate import check, check_shapes
    from luthier.graders import graders_named
    from luthier.serving.grading import open_graders
    from luthier.serving.measuring import measure
    from luthier.serving.prediction import Predictor
    from luthier.serving.preferring import preference_scores
    from luthier.store.models import find, objective_of

    chosen = graders_named(graders)
    rows = load_rows(data)
    stored = model.stored if isinstance(model, Model) else find(model)
    objective = objective_of(stored)
    check_shapes(rows, objective)
    if objective.reads:
        predictor = model.opened if isinstance(model, Model) else Predictor.open(stored)
        assert isinstance(predictor, Predictor)
        return predictor.scores(rows, long_rows=long_rows).evaluation()
    if rows and rows[0].reply is not None:
        return preference_scores(stored, rows, long_rows=long_rows).evaluation()
    check(rows, chosen)
    writer = model if isinstance(model, Model) else load(model)
    chosen = open_graders(chosen, len(rows), note)
    return measure(
        writer.generator, rows, chosen, max_tokens, on_error=on_error, long_rows=long_rows
    )
