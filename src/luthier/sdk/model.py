"""Models that are there: ``load`` and what they answer, ``evaluate`` and how good that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from luthier.errors import DataError, Problem, RecipeError, data_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from luthier.evaluation.evaluate import Evaluation, TurnChoice
    from luthier.evaluation.judges import JudgeAgreement
    from luthier.graders import OnError, Ruler, Spec
    from luthier.serving.evaluation import LongRows
    from luthier.serving.generation import Generator
    from luthier.serving.images import ImageGenerator, Reconstruction, SampledImage
    from luthier.serving.nearest import Neighbour
    from luthier.store.models import StoredModel
    from luthier.types import Message, Row
    from luthier.workflows.compare import HeadToHead
    from luthier.workflows.forgetting import Forgetting

    Conversation = Sequence[Message | Mapping[str, str]]


class Model:
    """A model in memory: answers prompts and conversations."""

    def __init__(self, model_id: str | StoredModel) -> None:
        """Open a base or custom model by id; see :func:`load`."""
        from luthier.objectives.capabilities import SupportsPrediction, SupportsSampling
        from luthier.serving.generation import Generator
        from luthier.serving.images import ImageGenerator
        from luthier.serving.prediction import Predictor
        from luthier.store.models import check_active, find, objective_of

        self.stored = check_active(find(model_id)) if isinstance(model_id, str) else model_id
        objective = objective_of(self.stored)
        self.reads = isinstance(objective, SupportsPrediction)
        """Whether it answers with labels (:meth:`predict`) or writes (:meth:`generate`)."""
        self.opened: Predictor | ImageGenerator | Generator
        if self.reads:
            self.opened = Predictor.open(self.stored)
        elif isinstance(objective, SupportsSampling):
            self.opened = ImageGenerator.open(self.stored)
        else:
            self.opened = Generator.open(self.stored)

    @property
    def generator(self) -> Generator:
        """What writes; refuses models that read."""
        from luthier.serving.generation import Generator
        from luthier.serving.images import ImageGenerator

        if isinstance(self.opened, ImageGenerator):
            raise RecipeError(f"{self.stored.id} makes images; use sample()")
        if not isinstance(self.opened, Generator):
            use = "embeddings; use embed()" if self._embeds else "labels; use predict()"
            raise RecipeError(f"{self.stored.id} gives {use}")
        return self.opened

    @property
    def image_generator(self) -> ImageGenerator:
        """What makes images; refuses models that make none."""
        from luthier.serving.images import ImageGenerator
        from luthier.serving.prediction import Predictor

        opened = self.opened
        if isinstance(opened, Predictor):
            opened = ImageGenerator(opened.network, opened.objective, opened.chat, self.stored.id)
        if not isinstance(opened, ImageGenerator):
            raise RecipeError(f"{self.stored.id} writes text; use generate()")
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
    ) -> list[SampledImage]:
        """New images, each with ``pixels`` ``[H, W, 3]`` and a ``label``, from a model that makes them.

        The same ``seed`` gives the same images. ``label`` asks for those of a class; a model that knows
        classes makes as many of each in turn where it is not given. ``prompt`` says what they are to
        show, for a model that learned from captions. ``steps``, ``guidance_scale`` and ``eta`` are for
        diffusion models, in the place of what they were stored with.
        """
        from luthier.objectives.capabilities import DenoisingSettings

        settings = DenoisingSettings(steps, guidance_scale, eta)
        return self.image_generator.sample(count, seed, label, settings=settings, prompt=prompt)

    @data_errors("nothing was reconstructed")
    def reconstruct(self, images: Sequence[str]) -> list[Reconstruction]:
        """Each image, by its path, beside what the model gives back of it, and the error."""
        from luthier.data.rows import input_row

        rows = [input_row(path, "reconstruct()", n) for n, path in enumerate(images, 1)]
        return self.image_generator.reconstruct(rows)

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
        :class:`~luthier.types.Message`. Keywords as :class:`luthier.models.sampling.Sampling`.
        """
        from luthier.models.sampling import Sampling

        chosen = Sampling(**sampling)
        if isinstance(prompts, str) or _is_conversation(prompts):
            return self.generator.replies([_prompt(prompts)], chosen)[0]
        return self.generator.replies([_prompt(each) for each in prompts], chosen)

    def stream(self, prompt: str | Conversation, **sampling: Any) -> Iterator[str]:
        """The reply to one prompt or conversation in pieces, as it is decoded."""
        from luthier.models.sampling import Sampling

        return self.generator.stream(_prompt(prompt), Sampling(**sampling))

    # A text is a sequence of texts to a type checker; to people it is one.
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
        texts: Sequence[str | Sequence[str] | Mapping[str, Any]],
        *,
        top: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]: ...
    @data_errors("nothing was predicted")
    def predict(
        self,
        texts: str | Mapping[str, Any] | Sequence[str | Sequence[str] | Mapping[str, Any]],
        *,
        top: int | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """For one text, or each of several: ``label`` and ``scores``, ``rating``, or ``tags``.

        To a model that reads images or sounds a text is the path of one. One that reads the text of
        images gives ``text`` and ``probability``.

        Among several a text may be a list of words, or a row such as ``{"id": 7, "text": "..."}``,
        which comes back with all its fields and the answer under ``predicted``.

        Args:
            texts: one or several.
            top: leave so many classes in ``scores``, the likeliest first.
            columns: what rows call our keys, such as ``{"text": "question"}``.
        """
        if isinstance(texts, str | Mapping):
            return self.predict([texts], top=top, columns=columns)[0]
        from luthier.data.rows import PREDICTED, InputChecker, input_row
        from luthier.data.shapes import TaggedWords
        from luthier.serving.images import ImageGenerator
        from luthier.serving.prediction import Predictor

        if not isinstance(self.opened, Predictor):
            does = "writes text; use generate()"
            if isinstance(self.opened, ImageGenerator):
                does = "makes images; use sample()"
            raise RecipeError(f"{self.stored.id} {does}")
        if not isinstance(texts, Sequence):
            raise RecipeError(f"give a text, or a list of texts, and no {type(texts).__name__}")
        if top is not None and top < 1:
            raise RecipeError(f"top must be at least 1, and is {top}")
        if not texts:
            return []
        problems: list[Problem] = []
        checker = InputChecker("predict()", problems, columns)
        rows: list[Row | None] = []
        for index, text in enumerate(texts, 1):
            if isinstance(text, str):
                rows.append(input_row(text, "predict()", index))
            elif isinstance(text, Mapping):
                rows.append(checker.row(index, dict(text)))
            else:
                rows.append(TaggedWords("predict()", index, tuple(text), None))
        if problems:
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
        """The reward of each completion of its prompt, from a model of objective ``reward_model``."""
        if isinstance(prompts, str) and isinstance(completions, str):
            return self.rewards([prompts], [completions])[0]
        if isinstance(prompts, str) or isinstance(completions, str):
            raise RecipeError("give one prompt and one completion, or as many of each")
        from luthier.data.shapes import PromptCompletion
        from luthier.objectives import RewardModel
        from luthier.serving.prediction import Predictor

        opened = self.opened
        if not isinstance(opened, Predictor) or not isinstance(opened.objective, RewardModel):
            raise RecipeError(f"{self.stored.id} is no reward model")
        pairs = enumerate(zip(prompts, completions, strict=True), 1)
        rows = [PromptCompletion("rewards()", n, p, c) for n, (p, c) in pairs]
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

    @data_errors("nothing was looked up")
    def nearest(
        self,
        query: str | Sequence[str],
        among: str | Path | Sequence[str],
        *,
        count: int = 10,
        index: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> list[Neighbour] | list[list[Neighbour]]:
        """What is nearest to a text or to the image at a path, from a model that embeds.

        Args:
            query: a text or a path; of several the answer is a list for each.
            among: a data file, a folder or an archive of images; or a list of texts or paths.
            count: of neighbours, the nearest first.
            index: a file that keeps the embeddings; the next call embeds only what is new.
            columns: what rows call our keys, such as ``{"text": "question"}``.
        """
        from luthier.data.rows import input_row, load_inputs
        from luthier.serving.nearest import find_nearest
        from luthier.serving.prediction import Predictor

        if not isinstance(self.opened, Predictor):
            raise RecipeError(f"{self.stored.id} gives no embeddings; name a model that does")
        if isinstance(among, str | Path):
            rows = [row for _, row in load_inputs(among, columns)]
        else:
            rows = [input_row(given, "nearest()", n) for n, given in enumerate(among, 1)]
        asked = [query] if isinstance(query, str) else list(query)
        queries = [input_row(given, "nearest()", n) for n, given in enumerate(asked, 1)]
        file = Path(index) if index is not None else None
        found = find_nearest(self.opened, self.stored, queries, rows, count, file).neighbours
        return found[0] if isinstance(query, str) else found


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
    model: str | Model | StoredModel,
    data: str | Path,
    graders: Sequence[Spec] | Mapping[str, Spec] = ("exact",),
    max_tokens: int = 128,
    on_error: OnError = "fail",
    note: Callable[[str], None] = lambda text: None,
    long_rows: LongRows = "error",
    *,
    turns: TurnChoice = "last",
    columns: Mapping[str, str] | None = None,
    slices: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    attach: bool = False,
) -> Evaluation:
    """Let a model answer the prompts of a data file and grade the replies.

    Rows with judged answers (chosen and rejected, ratings, thumbs) are not answered: the scores say how
    often the model ranks the answers as people did. Models that read are compared with the labels,
    ratings, tags or partners of the rows. Of raw text the scores say how well each token is predicted,
    of rows with choices how often the right one is the likeliest.

    Replies are on the disk as they come: the same call after a kill asks for the others only. A judge
    is asked nothing twice.

    Args:
        model: an id, a model in memory, or one on this machine.
        data: rows of prompt and reply, of judged answers, of raw text, or with what a model that reads
            says.
        graders: methods by name, tables of ``method`` and fields, or :class:`luthier.graders.Grader`
            objects; a mapping gives them names of your own.
        max_tokens: of a reply at most.
        on_error: what becomes of a reply that a grader cannot grade: ``fail``, or score ``zero``.
        note: hears what a judge will cost and whether it is one.
        long_rows: what becomes of rows longer than the context: ``error`` names them all, ``drop``
            leaves them out, ``truncate`` cuts them; prompts to be answered are never cut.
        turns: of the assistant that are asked for: the ``last`` of each conversation, each that
            ``calls`` tools, or ``all``.
        columns: the file's name for each of our keys, such as ``{"prompt": "question"}``.
        slices: what else scores are given by: ``label``, ``length``, ``language``, or a column.
        on_progress: hears how many rows are done, and of how many.
        attach: keep the result with the model, where its certificate finds it.

    Returns:
        Scores by the graders' names, how sure they are, and every answer.

    Raises:
        RefusedInput: before anything is written, for rows or graders that cannot work.
        GradingFailed: with ``fail``, naming the row.
    """
    from luthier.data.shapes import JudgedAnswers, MultipleChoice, RawText, of_shape
    from luthier.evaluation.breakdown import slice_scores
    from luthier.evaluation.evaluate import check, check_shapes, load_graded
    from luthier.graders import parse_graders
    from luthier.objectives.capabilities import SupportsPrediction
    from luthier.serving.evaluation import (
        measure,
        multiple_choice,
        open_graders,
        perplexity,
        preference_scores,
        slice_keys,
    )
    from luthier.serving.journal import evaluation_journal
    from luthier.serving.prediction import Predictor
    from luthier.store.models import find, objective_of
    from luthier.store.reports import check_attachable

    chosen = parse_graders(graders)
    rows = load_graded(data, columns, chosen.values(), turns)
    total = len(rows)
    stored = model.stored if isinstance(model, Model) else model
    stored = find(stored) if isinstance(stored, str) else stored
    if attach:
        check_attachable(stored)
    objective = objective_of(stored)
    check_shapes(rows, objective)
    for by in slices:  # before anything is answered
        slice_keys(rows, by)

    def done(count: int) -> None:
        on_progress(count, total)

    started = time.monotonic()
    if isinstance(objective, SupportsPrediction):
        predictor = model.opened if isinstance(model, Model) else Predictor.open(stored)
        assert isinstance(predictor, Predictor)
        started = time.monotonic()
        found = predictor.scores(rows, done, long_rows)
        if not of_shape(JudgedAnswers, rows):
            records = [
                {**row_input(row), "expected": _expected_answer(row), **answer}
                for row, answer in zip(found.rows, found.records, strict=True)
            ]
            found = replace(found, records=records)
    elif of_shape(JudgedAnswers, rows):
        found = preference_scores(stored, rows, done, long_rows)
    elif of_shape(RawText, rows):
        found = perplexity(stored, rows)
    elif choices := of_shape(MultipleChoice, rows):
        found = multiple_choice(stored, choices, done, long_rows)
    else:
        check(rows, chosen)
        writer = model if isinstance(model, Model) else Model(stored)
        chosen = open_graders(chosen, total, note)
        started = time.monotonic()
        about = {"data": str(Path(data).absolute()), "max_tokens": max_tokens, "turns": turns}
        with evaluation_journal(stored, about) as journal:
            if journal is not None and journal.replies:
                note(f"{len(journal.replies):,} replies are there from a run that was cut")
            found = measure(
                writer.generator, rows, chosen, max_tokens, done, on_error, long_rows, journal
            )
        fields = ("prompt", "reply", "expected", "scores")
        records = [{name: getattr(each, name) for name in fields} for each in found.answers]
        found = replace(found, records=records)
    found = replace(found, seconds=time.monotonic() - started)
    if slices:
        whole = {n: each for n, each in found.row_scores.items() if len(each) == len(found.rows)}
        if not whole:
            raise RecipeError(
                f"{stored.id} is not scored row by row on such rows: leave slices away"
            )
        parts = [slice_scores(whole, by, slice_keys(found.rows, by)) for by in slices]
        found = replace(found, slices=[each for part in parts for each in part])
    if attach:
        _attach([stored], "evaluation", [data], found, note)
    return found


def _attach(
    models: Sequence[StoredModel],
    kind: str,
    data: Sequence[str | Path],
    found: Evaluation | HeadToHead | Forgetting,
    note: Callable[[str], None],
) -> None:
    """Keep what was measured on ``data`` with each of ``models``, where their certificates find it."""
    from luthier.store.reports import hashes_of_data, write_report
    from luthier.workflows.certificate.certificate import certify

    hashes, result = hashes_of_data(*data), found.plain()
    for each in models:
        write_report(each, kind, hashes, result)
        certify(each.id)
        note(f"kept with {each.id}, for `luthier certificate {each.id}`")


@data_errors("nothing was judged")
def judge(
    data: str | Path,
    judge: Spec,
    note: Callable[[str], None] = lambda text: None,
    *,
    columns: Mapping[str, str] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> JudgeAgreement:
    """Say how far a judge agrees with people, before its scores are relied on.

    Args:
        data: pairs of which people chose one reply (``prompt``, ``chosen``, ``rejected``), or ranked
            replies, of which the best and the worst are taken.
        judge: a :class:`luthier.graders.Ruler`, its fields, or the name of a model: an id, or
            ``https://host/v1#model``.
        note: hears what the judge will be asked.
        columns: the file's name for each of our keys.
        on_progress: hears how many pairs are judged, and of how many.

    Returns:
        Agreement, consistency and what the judge is biased for, with a ``verdict()`` in words.

    Raises:
        RefusedInput: for rows that people have not judged.
    """
    from luthier.data.rows import load_rows
    from luthier.evaluation.judges import check_pairs, measure_agreement
    from luthier.serving.evaluation import open_graders

    pairs = check_pairs(load_rows(data, columns))
    # Each pair is judged in both orders.
    ruler = open_graders({"judge": _parse_judge(judge)}, 2 * len(pairs), note)["judge"]
    return measure_agreement(ruler, pairs, lambda count: on_progress(count, len(pairs)))


def _parse_judge(judge: Spec) -> Ruler:
    """A judge that compares."""
    from luthier.graders import Ruler, parse_graders

    spec: Spec = {"method": "ruler", "model": judge} if isinstance(judge, str) else judge
    ruler = parse_graders({"judge": spec})["judge"]
    if not isinstance(ruler, Ruler):
        raise RecipeError("replies are compared by a grader of method ruler; name that, or a model")
    return ruler


@data_errors("nothing was compared")
def compare(
    data: str | Path,
    tuned: Sequence[str],
    base: str | None = None,
    train: str | Path | None = None,
    documents: Sequence[str | Path] = (),
    graders: Sequence[Spec] | Mapping[str, Spec] | None = None,
    max_tokens: int = 64,
    prices: str | Path | None = None,
    note: Callable[[str], None] = lambda text: None,
    *,
    answers: int = 0,
    search_seconds: float | None = None,
    reflector: str | None = None,
    encoder: str | None = None,
    judge: Spec | None = None,
    columns: Mapping[str, str] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    attach: bool = False,
) -> HeadToHead:
    """Hold tuned models against what needs no training, on the same held-out rows.

    Args:
        data: rows of prompt and reply, or of text and label, that nothing was learned from.
        tuned: ids of the models to judge.
        base: what is asked without training; the base of the first of ``tuned`` when not given.
        train: where examples come from, and what simple baselines learn; the training rows of the first
            of ``tuned`` when not given, where they are still there.
        documents: sources of texts that answers should be true to.
        graders: of replies, as of :func:`evaluate`; the first decides. ``exact`` when not given.
        max_tokens: of a reply at most.
        prices: a price table, as of ``luthier estimate``; the one of the store when not given.
        note: hears what is done.
        answers: that you expect of the tuned model, for what they return of what tuning took.
        search_seconds: that a prompt is searched for a base that writes; as long as tuning took, at
            most ten minutes, when not given; 0 for none.
        reflector: id of the model that rewrites instructions in this search, or ``https://host/v1#model``
            with its key in ``OPENAI_API_KEY``; the base itself when not given.
        encoder: id of a model with embeddings, by which examples and passages are found, too.
        judge: as of :func:`judge`; replies are then compared by how often it prefers them to those of
            the base as it is.
        columns: the file's name for each of our keys.
        on_progress: hears how many answers there are, and of how many.
        attach: keep the result with each of ``tuned``, where its certificate finds it.

    Returns:
        ``contenders``, the best first, ``behind()`` for the differences, ``verdict()`` and ``plain()``.

    Raises:
        RefusedInput: where there is nothing to compare, or a tenth of the rows are training rows.
    """
    from luthier.chat_models.base import ModelSpec, address_fields
    from luthier.data.rows import load_rows
    from luthier.evaluation.evaluate import load_graded
    from luthier.graders import parse_graders
    from luthier.store.models import find
    from luthier.store.reports import check_attachable
    from luthier.workflows.compare import compare as run
    from luthier.workflows.estimate.budget import read_prices

    models = [find(each) for each in tuned]
    if not models:
        raise RecipeError("name a tuned model")
    for each in models if attach else ():
        check_attachable(each)
    chosen = None if graders is None else parse_graders(graders)
    rows = load_graded(data, columns, (chosen or {}).values())
    known = models[0].manifest.recipe or {}
    learned = known.get("data", {}).get("train")
    if train is None and isinstance(learned, str) and Path(learned).exists():
        train = learned
        note(f"examples come from {learned}, which {models[0].id} was tuned on")
    texts = [row.plain_text() for source in documents for row in load_rows(str(source))]
    found = run(
        rows,
        find(base or models[0].root),
        models,
        load_rows(train, columns) if train is not None else (),
        texts,
        chosen,
        max_tokens,
        read_prices(None if prices is None else Path(prices)),
        answers,
        search_seconds,
        None if reflector is None else ModelSpec(**address_fields(reflector)),
        None if encoder is None else find(encoder),
        None if judge is None else _parse_judge(judge),
        note,
        on_progress,
    )
    if attach:
        _attach(models, "comparison", [data], found, note)
    return found


@data_errors("nothing was measured")
def forgetting(
    model: str,
    base: str | None = None,
    probes: Sequence[str | Path] = (),
    canaries: str | Path | None = None,
    safety: bool = True,
    note: Callable[[str], None] = lambda text: None,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    attach: bool = False,
) -> Forgetting:
    """Say what a tuned model forgot, and whether it is as safe as the model that it was tuned from.

    Args:
        model: id of a tuned model that writes.
        base: what it is held against; what it was tuned from, when not given.
        probes: files of rows with choices, or of ``text`` and ``target`` (LAMBADA); a column ``task``
            parts a file into sets. Ours are measured besides.
        canaries: the file that :func:`plant_canaries` wrote beside the training rows.
        safety: whether bias and refusals are measured.
        note: hears what is done.
        on_progress: hears how many parts are done, and of how many.
        attach: keep the result with the model, where its certificate finds it.

    Returns:
        ``drift``, ``changes`` with their ``differences``, ``exposures``, ``verdict()`` and ``plain()``.

    Raises:
        RefusedInput: for a model that was not tuned or does not write, or rows that are no probes.
    """
    from luthier.evaluation.canaries import read_canaries
    from luthier.store.models import find
    from luthier.store.reports import check_attachable
    from luthier.workflows.forgetting import load_probes, measure_forgetting

    stored = find(model)
    if attach:
        check_attachable(stored)
    before = base or stored.manifest.parent
    if before is None:
        raise RecipeError(
            f"{stored.id} was not tuned here, so what it was before is not known. Name a tuned model, "
            "or the base that this one is held against"
        )
    found = measure_forgetting(
        stored,
        find(before),
        load_probes(probes),
        () if canaries is None else read_canaries(Path(canaries)),
        safety,
        note,
        on_progress,
    )
    if attach:
        _attach([stored], "forgetting", probes, found, note)
    return found


def row_input(row: Row) -> dict[str, Any]:
    """What a row gives a model that reads, ready for JSON."""
    from luthier.data.shapes import MediaRow, PromptCompletion, TaggedWords

    if isinstance(row, PromptCompletion):
        return row.record()
    if isinstance(row, MediaRow):
        return {row.key(): str(row.media)}
    if isinstance(row, TaggedWords) and row.tags is not None:
        return {"tokens": list(row.tokens)}
    return {"text": row.plain_text()}


def _expected_answer(row: Row) -> Any:
    """What a row says that the model should have answered."""
    from luthier.data.shapes import CaptionedImage, Labelled, RatedText, TaggedWords, TextPair

    match row:
        case CaptionedImage():
            return row.caption
        case TaggedWords():
            return list(row.tags or ())
        case RatedText():
            return row.rating
        case Labelled():
            return row.label
        case TextPair():
            return row.positive
    return None
