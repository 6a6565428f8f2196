"""Evaluation of stored models and of judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import RecipeError
from luthier.sdk.model import Model

if TYPE_CHECKING:
    from luthier.evaluation.evaluate import Evaluation, TurnChoice
    from luthier.evaluation.judges import JudgeAgreement
    from luthier.evaluation.long_rows import LongRows
    from luthier.graders import OnError, Ruler, Spec
    from luthier.library.models import StoredModel
    from luthier.workflows.compare import HeadToHead
    from luthier.workflows.forgetting import Forgetting


def evaluate(
    model: str | Model | StoredModel,
    data: str | Path,
    graders: Sequence[Spec] | Mapping[str, Spec] | None = None,
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
            objects; a mapping gives them names of your own. When not given ``exact``, or ``rouge_l``
            where the expected replies have more than a dozen words in the median.
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
    from luthier.workflows.evaluate import evaluate as run

    opened = model.opened if isinstance(model, Model) else None
    return run(
        model.stored if isinstance(model, Model) else model,
        data,
        graders,
        max_tokens,
        on_error,
        note,
        long_rows,
        turns=turns,
        columns=columns,
        slices=slices,
        on_progress=on_progress,
        attach=attach,
        opened=opened,
    )


def judge_agreement(
    data: str | Path,
    judge: Spec,
    human: str = "chosen",
    note: Callable[[str], None] = lambda text: None,
    *,
    columns: Mapping[str, str] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> JudgeAgreement:
    """Measure how far a judge agrees with people.

    Args:
        data: prompts, each with a chosen and a rejected reply, or with ranked replies. Of ranked
            replies the judge compares the best with the worst.
        judge: a :class:`luthier.graders.Ruler`, its fields, or the name of a model: an id, or
            ``https://host/v1#model``.
        human: column of the replies that people chose or ranked.
        note: hears how many verdicts the judge is asked for.
        columns: the file's name for each of our keys.
        on_progress: hears how many pairs are judged, and of how many.

    Returns:
        Agreement, consistency and biases of the judge, with a ``verdict()`` in words.

    Raises:
        RefusedInput: for rows without two replies that people compared.
    """
    from luthier.data.rows import load_rows
    from luthier.data.shapes.preferences import Preference, RankedReplies
    from luthier.evaluation.judges import check_pairs, measure_agreement
    from luthier.workflows.evaluate import open_graders

    columns = dict(columns or {})
    if human not in (*Preference.keys, *RankedReplies.keys, *columns.values()):
        columns["chosen"] = human
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
        graders: of replies, as of :func:`evaluate`; the first decides. When not given,
            what :func:`evaluate` takes.
        max_tokens: of a reply at most.
        prices: a price table, as of ``luthier estimate``; the one of the store when not given.
        note: hears what is done.
        encoder: id of a model with embeddings, by which examples and passages are found, too.
        judge: as of :func:`judge_agreement`; replies are then compared by how often the judge prefers
            them to those of the base as it is.
        columns: the file's name for each of our keys.
        on_progress: hears how many answers there are, and of how many.
        attach: keep the result with each of ``tuned``, where its certificate finds it.

    Returns:
        ``contenders``, the best first, ``behind()`` for the differences, ``verdict()`` and ``plain()``.

    Raises:
        RefusedInput: where there is nothing to compare, or a tenth of the rows are training rows.
    """
    from luthier.data.rows import load_documents, load_rows
    from luthier.evaluation.evaluate import load_graded
    from luthier.graders import parse_graders
    from luthier.library.models import find
    from luthier.library.reports import check_attachable
    from luthier.workflows.compare import compare as run
    from luthier.workflows.estimate.budget import read_prices
    from luthier.workflows.evaluate import attach_report

    models = [find(each) for each in tuned]
    if not models:
        raise RecipeError("name a tuned model")
    for each in models if attach else ():
        check_attachable(each)
    chosen = None if graders is None else parse_graders(graders)
    rows = load_graded(data, columns, (chosen or {}).values())
    known, train_columns = models[0].manifest.recipe or {}, columns
    learned = known.get("data", {}).get("train")
    if train is None and isinstance(learned, str) and Path(learned).exists():
        train, train_columns = learned, known["data"].get("columns")
        note(f"examples come from {learned}, which {models[0].id} was tuned on")
    texts = load_documents(map(str, documents))
    found = run(
        rows,
        find(base or models[0].root),
        models,
        load_rows(train, train_columns) if train is not None else (),
        texts,
        chosen,
        max_tokens,
        read_prices(None if prices is None else Path(prices)),
        None if encoder is None else find(encoder),
        None if judge is None else _parse_judge(judge),
        note,
        on_progress,
    )
    if attach:
        attach_report(models, "comparison", [data], found.plain(), note)
    return found


def forgetting(
    model: str,
    base: str | None = None,
    probes: Sequence[str | Path] = (),
    note: Callable[[str], None] = lambda text: None,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    attach: bool = False,
) -> Forgetting:
    """Measure what a tuned model forgot of the model that it was tuned from.

    Args:
        model: id of a tuned model that writes.
        base: what it is held against; what it was tuned from, when not given.
        probes: files of rows with choices, or of ``text`` and ``target`` (LAMBADA); a column ``task``
            parts a file into sets. Ours are measured besides.
        note: hears what is done.
        on_progress: hears how many parts are done, and of how many.
        attach: keep the result with the model, where its certificate finds it.

    Returns:
        ``drift``, ``changes`` with their ``differences``, ``verdict()`` and ``plain()``.

    Raises:
        RefusedInput: for a model that was not tuned or does not write, or rows that are no probes.
    """
    from luthier.library.models import find
    from luthier.library.reports import check_attachable
    from luthier.workflows.evaluate import attach_report
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
        note,
        on_progress,
    )
    if attach:
        attach_report([stored], "forgetting", probes, found.plain(), note)
    return found
