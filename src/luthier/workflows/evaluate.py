"""Evaluation of a stored model on held-out rows.

The kind of rows decides the measure:

* prompts with replies: greedy replies, scored by graders;
* raw text: perplexity; of masked language models, pseudo-perplexity (Salazar et al. 2020,
  section 2);
* choices: the likelihood of each choice (:mod:`luthier.evaluation.choices`);
* judged answers: how often the better answer is the likelier answer. The log-probability and DPO's
  implicit reward are compared: the log-probability minus the parent model's (Rafailov et al. 2023,
  section 4). Adapters are merged in float32, because rounded weights move small rewards;
* labels, ratings, tags, pairs and media: :mod:`luthier.workflows.score_predictions`;
* queries with a corpus: :mod:`luthier.workflows.evaluate_search`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from luthier.data.files.read import read_records
from luthier.data.languages import detect_languages
from luthier.data.search_sets import load_search_set
from luthier.data.shapes import of_shape
from luthier.data.shapes.choices import MultipleChoice
from luthier.data.shapes.preferences import JudgedAnswers, ThumbedReply
from luthier.data.shapes.texts import RawText
from luthier.data.tree import READING_BUDGET
from luthier.errors import DataError, Problem, RecipeError, RowRefused, line_field, location_text
from luthier.evaluation.breakdown import length_keys, slice_scores
from luthier.evaluation.choices import ChoiceLikelihood, choice_scores, encode_choices, keep_end
from luthier.evaluation.evaluate import (
    Evaluation,
    TurnChoice,
    check,
    check_shapes,
    default_graders,
    grade,
    load_graded,
    questions,
    with_unread_columns,
)
from luthier.evaluation.long_rows import FittingRows, fit_rows, reject_long_rows
from luthier.evaluation.preferences import Likelihood, pair_scores, thumb_scores
from luthier.evaluation.significance import (
    LESS_IS_BETTER,
    RowScores,
    Score,
    Statistic,
    perplexity_of,
)
from luthier.graders import parse_graders
from luthier.inference.generation import Generator
from luthier.inference.inference import Chat
from luthier.inference.prediction import Predictor
from luthier.inference.reply_log import log_verdicts
from luthier.library import models as library
from luthier.library.reports import check_attachable, hashes_of_data, write_report
from luthier.models.decoding.sampling import Sampling
from luthier.objectives import DPO, KTO, CausalLM, MaskedLM
from luthier.objectives.base import cut_end, predicts
from luthier.objectives.masked_lm import HIDDEN
from luthier.types import Example, LongRows, Row
from luthier.workflows.certificate.certificate import certify
from luthier.workflows.evaluate_search import evaluate_search
from luthier.workflows.score_predictions import score_predictions
from luthier.workflows.training_overlap import row_remarks

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.graders import Grader, OnError, Spec
    from luthier.library.models import StoredModel
    from luthier.media.image_generation import ImageGenerator
    from luthier.models.networks.network import Network, TreeBatch

SLICES = ("label", "length", "language")
"""Slices that are no columns of the rows."""
PSEUDO_TOKENS = 2_000
"""Number of tokens for the pseudo-perplexity, which costs a pass per token."""
AnyGrader = TypeVar("AnyGrader", bound="Grader")
Done = Callable[[int], None]
"""Called with the number of finished rows."""


def evaluate(
    model: str | StoredModel,
    data: str | Path,
    graders: Sequence[Spec] | Mapping[str, Spec] | None = None,
    max_tokens: int = 128,
    on_error: OnError = "fail",
    note: Callable[[str], None] = lambda text: None,
    long_rows: LongRows | None = None,
    *,
    turns: TurnChoice = "last",
    columns: Mapping[str, str] | None = None,
    slices: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    attach: bool = False,
    opened: Predictor | Generator | ImageGenerator | None = None,
    corpus: str | Path | None = None,
    qrels: str | Path | None = None,
    reranker: str | None = None,
) -> Evaluation:
    """Evaluate ``model`` on the rows of ``data``; ``luthier.evaluate`` describes the arguments.

    ``opened`` is the model in memory, if it is loaded already.
    """
    if corpus is None and (qrels or reranker):
        setting = "qrels" if qrels else "reranker"
        raise RecipeError(f"`{setting}` needs the documents: set `corpus`.", setting=setting)
    if corpus is not None:
        given = {
            "grader": graders is not None,
            "turns": turns != "last",
            "long-rows": long_rows is not None,
            "on-grader-error": on_error != "fail",
        }
        if unused := next((name for name, is_given in given.items() if is_given), None):
            raise RecipeError(f"--{unused} has no effect with --corpus. Omit it.", setting=unused)
    parsed = {} if graders is None else parse_graders(graders)
    collection = None if corpus is None else load_search_set(data, corpus, qrels, columns)
    if collection is None:
        rows = load_graded(data, columns, parsed.values(), turns)
    else:
        rows = collection.rows
    total = len(rows)
    stored = library.find(model) if isinstance(model, str) else model
    if attach:
        check_attachable(stored)
    objective = stored.objective
    if collection is None:
        with with_unread_columns(data, columns):
            check_shapes(rows, objective)
    for by in slices:  # reject unknown columns before the model is loaded
        slice_keys(rows, by)

    def done(count: int) -> None:
        on_progress(count, total)

    started = time.monotonic()
    if collection is not None:
        others = None if reranker is None else library.find(reranker)
        evaluation = evaluate_search(stored, collection, others, on_progress)
    elif predicts(objective):
        # The model may be loaded already, for example by a program that evaluates after each
        # change.
        predictor = opened if isinstance(opened, Predictor) else Predictor.open(stored)
        started = time.monotonic()
        evaluation = _with_inputs(score_predictions(predictor, rows, done, long_rows))
    elif of_shape(JudgedAnswers, rows):
        evaluation = preference_scores(stored, rows, done, objective.long_rows(long_rows))
    elif isinstance(objective, MaskedLM):
        evaluation = masked_scores(stored, objective, rows, on_progress)
    elif of_shape(RawText, rows):
        evaluation = perplexity(stored, rows)
    elif choices := of_shape(MultipleChoice, rows):
        evaluation = multiple_choice(stored, choices, done, objective.long_rows(long_rows))
    else:
        if graders is None:
            parsed = default_graders(rows, note)
        check(rows, parsed)
        generator = opened if isinstance(opened, Generator) else Generator.open(stored)
        parsed = open_graders(parsed, total, note)
        started = time.monotonic()
        evaluation = grade_replies(
            generator, rows, parsed, max_tokens, done, on_error, objective.long_rows(long_rows)
        )
    evaluation = replace(
        evaluation,
        seconds=time.monotonic() - started,
        remarks=[*row_remarks(stored, data, evaluation.rows), *evaluation.remarks],
        model=stored.id,
    )
    if slices:
        evaluation = _with_slices(evaluation, slices)
    if attach:
        files = [each for each in (data, corpus, qrels) if each is not None]
        attach_report([stored], "evaluation", files, evaluation.plain(), note)
    return evaluation


def attach_report(
    models: Sequence[StoredModel],
    kind: str,
    data: Sequence[str | Path],
    result: Mapping[str, Any],
    note: Callable[[str], None],
) -> None:
    """Store ``result`` with each of ``models`` and update the certificates."""
    hashes = hashes_of_data(*data)
    for each in models:
        write_report(each, kind, hashes, dict(result))
        certify(each.id)
        note(f"attached to {each.id}; see `luthier models certificate {each.id}`")


def open_graders(
    graders: Mapping[str, AnyGrader], answers: int, note: Callable[[str], None]
) -> dict[str, AnyGrader]:
    """Return ``graders`` with loaded and tested models, ready for ``answers`` answers.

    Verdicts of a judge are logged, so that no prompt is sent twice.

    Raises:
        UnknownModel, RecipeError: for a missing or unsuitable model, a rejected key, or a grader
            with the name of an error metric.
        LuthierError: if an endpoint does not answer.
    """
    if errors := sorted(graders.keys() & LESS_IS_BETTER):
        raise RecipeError(
            f"`{errors[0]}` is the name of an error metric, which is minimized. Rename the grader."
        )
    verdicts = sum(grader.judgements for grader in graders.values())
    if verdicts:
        # Before the first request, because requests may cost money. One more for the trial of the
        # judge.
        note(f"the judge receives at most {verdicts * (answers + 1):,} requests")
    if not verdicts and not any(grader.models for grader in graders.values()):
        return dict(graders)
    from luthier.engine.machine import choose_machine
    from luthier.engine.metrics import Reporter
    from luthier.engine.trained_network import load_frozen
    from luthier.objectives.reinforcement.scoring import LocalModels, check_grader_model

    stored = {n: library.find(n, note) for each in graders.values() for n in each.models}
    for grader in graders.values():
        for name, task in grader.models.items():
            check_grader_model(name, task, stored[name].objective)
    machine = choose_machine()
    networks = {name: load_frozen(each, machine, Reporter()) for name, each in stored.items()}
    models = LocalModels(networks, note, log_verdicts)
    ready = {name: grader.with_models(models) for name, grader in graders.items()}
    for name, grader in ready.items():
        # A wrong key or a full endpoint is reported now, and not after an hour of generation.
        if warning := grader.rehearse():
            note(f"warning: grader {name}: {warning}")
    return ready


def grade_replies(
    generator: Generator,
    rows: Sequence[Row],
    graders: Mapping[str, Grader],
    max_tokens: int,
    done: Done = lambda count: None,
    on_error: OnError = "fail",
    long_rows: LongRows = "error",
    known: Mapping[int, str] | None = None,
) -> Evaluation:
    """Generate a greedy reply to each row and grade the replies.

    ``known`` has replies that need no query of the model, by the number of the row.

    Prompts without room for a reply are rejected or dropped. They are never truncated, because the
    question is at their end.

    Raises:
        DataError: with every prompt that is too long, if ``long_rows`` is ``error``.
        RecipeError: for ``truncate``.
    """
    if long_rows == "truncate":
        raise RecipeError(
            "Prompts are not truncated, because the question is at the end. Set `long_rows=drop`.",
            setting="long_rows",
        )
    prompts = [Chat(each, row.tools) for row, each in zip(rows, questions(rows), strict=True)]
    sampling = Sampling(max_tokens=max_tokens)
    known = known or {}
    refusals = [
        None if number in known else generator.refusal(prompt, sampling)
        for number, prompt in enumerate(prompts)
    ]
    fitting = [index for index, refusal in enumerate(refusals) if refusal is None]
    fix = "Shorten the row, set `long_rows=drop`, or lower `max_tokens`."
    problems = [
        Problem("row.too_long", refusal, fix, row.location)
        for row, refusal in zip(rows, refusals, strict=True)
        if refusal is not None and long_rows == "error"
    ]
    dropped = len(rows) - len(fitting)
    reject_long_rows(problems, len(fitting), dropped)
    began = time.perf_counter()
    asked = [index for index in fitting if index not in known]
    generated = generator.replies([prompts[index] for index in asked], sampling, done=done)
    seconds = time.perf_counter() - began
    by_row = {**known, **dict(zip(asked, generated, strict=True))}
    replies = [by_row[index] for index in fitting]
    graded = grade([rows[index] for index in fitting], replies, graders, on_error)
    return replace(graded, dropped=dropped, reply_seconds=seconds)


def perplexity(stored: StoredModel, rows: Sequence[Row]) -> Evaluation:
    """Score how well a causal language model predicts raw text, packed as in training.

    ``loss`` is in nats per token without the first token of each sequence. ``bits_per_character``
    compares models of different tokenizers. Standard errors are those of a mean over sequences.
    """
    library.check_writes(stored)
    trained = stored.objective
    objective = trained if isinstance(trained, CausalLM) else CausalLM()
    chat = stored.chat
    encoded = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    sequences = objective.pack(encoded, stored.room)
    weight_S = np.array([sequence.weight for sequence in sequences])
    loss = RowScores.of(-np.array(_stored_logps(stored, sequences)), weight_S, is_share=False)
    tokens = float(weight_S.sum())
    bits = tokens / math.log(2) / max(1, sum(len(row.plain_text()) for row in rows))

    scores: dict[str, Score] = {
        "perplexity": _of_loss(loss, perplexity_of),
        "loss": loss,
        "bits_per_character": _of_loss(loss, lambda nats: nats * bits),
    }
    return Evaluation(scores, list(rows), tokens=int(tokens))


def _of_loss(loss: RowScores, change: Callable[[float], float]) -> Statistic:
    return Statistic.of(lambda row_K: change(loss.subset(row_K).value), len(loss), is_share=False)


def masked_scores(
    stored: StoredModel,
    objective: MaskedLM,
    rows: Sequence[Row],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score how well a masked language model fills in raw text.

    ``loss`` is in nats per selected token, with the masks of validation rows.
    ``pseudo_perplexity`` hides each token alone, in random pieces of :data:`PSEUDO_TOKENS` tokens.
    """
    import torch

    from luthier.engine.machine import open_network
    from luthier.objectives.logprobs import row_logps

    encoded = [objective.encode(row, index, stored.chat) for index, row in enumerate(rows)]
    pieces = list(objective.pack(encoded, stored.room))
    # Random pieces, because a file is often sorted, and the first pieces would be of one kind.
    order = np.random.default_rng(0).permutation(len(pieces))
    before = np.cumsum([pieces[place].weight for place in order]) - pieces[order[0]].weight
    chosen = [objective.alone(pieces[place]) for place in order[before < PSEUDO_TOKENS]]
    network = open_network(stored, precise=True)
    total, done = len(pieces) + sum(map(len, chosen)), 0

    def read(examples: Sequence[Example], masked: float) -> list[tuple[float, float]]:
        """Return loss and number of the selected tokens of each example."""

        def of_batch(batch: TreeBatch) -> Iterator[tuple[float, float]]:
            nonlocal done
            hidden = objective.hide(batch, masked=masked)
            logps = row_logps(network, hidden).tolist()
            done += len(logps)
            on_progress(done, total)
            return (
                (-logp, row.weight) for logp, row in zip(logps, hidden.tree.examples, strict=True)
            )

        return network.read_rows(examples, READING_BUDGET, of_batch)

    def mean(losses: Iterable[tuple[float, float]]) -> RowScores:
        loss_S, weight_S = np.array([*losses]).T
        return RowScores.of(loss_S, weight_S, is_share=False)

    with torch.no_grad():
        loss = mean(read(pieces, HIDDEN))
        single = iter(read([*chain(*chosen)], 1.0))
    network.close()
    alone = mean((sum(next(single)[0] for _ in piece), len(piece)) for piece in chosen)
    scores: dict[str, Score] = {"loss": loss, "pseudo_perplexity": _of_loss(alone, perplexity_of)}
    return Evaluation(scores, list(rows), tokens=int(sum(piece.weight for piece in pieces)))


def preference_scores(
    stored: StoredModel,
    rows: Sequence[Row],
    done: Done = lambda count: None,
    long_rows: LongRows = "error",
) -> Evaluation:
    """Score how a model ranks the answers of pairs, ratings or thumbs.

    Raises:
        DataError: with every row longer than the context, if ``long_rows`` is ``error``.
    """
    library.check_writes(stored)
    objective = KTO() if isinstance(rows[0], ThumbedReply) else DPO()
    rows = objective.regroup(rows)
    chat = stored.chat
    texts = [objective.encode(row, index, chat).sides for index, row in enumerate(rows)]
    fitting = fit_rows(rows, texts, stored.room, long_rows, cut_end)
    rows, sides = fitting.rows, [side for each in fitting.examples for side in each]
    logps = _stored_logps(stored, sides)
    done(len(rows))
    parent = stored.manifest.parent
    references: Sequence[float | None] = [None] * len(sides)
    if parent:
        # The parent is loaded after the model is closed: both need not fit into memory at once.
        references = _stored_logps(library.find(str(parent)), sides)
    answers = [
        Likelihood(logp, int(np.count_nonzero(side.weight_T)), reference)
        for logp, side, reference in zip(logps, sides, references, strict=True)
    ]
    records: list[dict[str, Any]]
    if thumbed := of_shape(ThumbedReply, rows):
        scores = thumb_scores(answers, [row.desirable for row in thumbed])
        records = [{**line_field(r.line), **a.plain()} for r, a in zip(rows, answers, strict=True)]
        return fitting.evaluation(scores, records)
    pairs = list(zip(answers[::2], answers[1::2], strict=True))
    records = [
        {**line_field(row.line), "chosen": chosen.plain(), "rejected": rejected.plain()}
        for row, (chosen, rejected) in zip(rows, pairs, strict=True)
    ]
    return fitting.evaluation(pair_scores(pairs), records)


def multiple_choice(
    stored: StoredModel,
    rows: Sequence[MultipleChoice],
    done: Done = lambda count: None,
    long_rows: LongRows = "error",
) -> Evaluation:
    """Score how often the right choice is the likeliest.

    Prompts are continued as text, without the chat template, as in lm-evaluation-harness. Shared
    beginnings of choices are computed once. ``truncate`` cuts the beginning of a prompt.

    Raises:
        DataError: with every row longer than the context, if ``long_rows`` is ``error``.
    """
    from luthier.engine.machine import open_network

    library.check_writes(stored)
    fitting = fit_choices(rows, stored.chat, stored.room, long_rows)
    network = open_network(stored, precise=True)
    likelihoods = choice_likelihoods(network, fitting.examples)
    network.close()
    done(len(rows))
    return fitting.evaluation(
        *choice_scores(of_shape(MultipleChoice, fitting.rows) or (), likelihoods)
    )


def fit_choices(
    rows: Sequence[MultipleChoice], chat: ChatFormat, context: int, long_rows: LongRows
) -> FittingRows:
    """Encode the choices of ``rows`` and apply ``long_rows``.

    Raises:
        DataError: with each row that has a choice without tokens.
    """
    problems: list[Problem] = []
    texts: list[list[Example]] = []
    for row in rows:
        try:
            texts.append(encode_choices(row, chat))
        except RowRefused as bad:
            problems.append(bad.at(row.file, row.line))
    if problems:
        raise DataError(problems)
    return fit_rows(rows, texts, context, long_rows, keep_end)


def choice_likelihoods(
    network: Network, choices: Sequence[Sequence[Example]]
) -> list[list[ChoiceLikelihood]]:
    """Return the likelihoods of the choices of each row."""
    import torch

    from luthier.objectives.logprobs import greedy_token_logps, row_sums

    def read(batch: TreeBatch) -> Iterator[ChoiceLikelihood]:
        logp_M, best_M = greedy_token_logps(network, batch)
        logp_R = row_sums(batch, logp_M).tolist()
        missed_R = row_sums(batch, (~best_M).float()).tolist()
        return (
            ChoiceLikelihood(logp, not missed)
            for logp, missed in zip(logp_R, missed_R, strict=True)
        )

    with torch.no_grad():
        likelihoods = iter(network.read_rows([*chain(*choices)], READING_BUDGET, read))
    return [[next(likelihoods) for _ in of_row] for of_row in choices]


def text_logps(network: Network, texts: Sequence[Example]) -> list[float]:
    """Return the log-probability of the learned tokens of each text, in nats."""
    import torch

    from luthier.objectives.preferences.references import with_reference_logps

    with torch.no_grad():
        examples = with_reference_logps(network, texts, READING_BUDGET)
    return [float(each.reference or 0.0) for each in examples]


def slice_keys(rows: Sequence[Row], by: str) -> list[str]:
    """Return the slice of each row by label, length (thirds), language or a column of the file.

    Raises:
        RecipeError: if no row has a label or such a column.
    """
    if by == "label":
        keys = [", ".join(row.classes()) for row in rows]
    elif by == "length":
        return length_keys(
            [sum(len(each) for each in row.inputs()) or len(row.plain_text()) for row in rows]
        )
    elif by == "language":
        texts = [" ".join(row.inputs()) or row.plain_text() for row in rows]
        return [code or "unknown" for code in detect_languages(texts)]
    else:
        # Rows store only what models use, so the column is read from the file.
        columns = {file: _read_column(Path(file), by) for file in {r.file: None for r in rows}}
        keys = [columns[row.file].get(row.line, "") for row in rows]
    if not any(keys):
        names = ", ".join(name for name in ("label", "length", "language") if name != by)
        raise RecipeError(
            f"No row has a value for the slice {by!r}. Use {names} or a column of text or numbers.",
            setting="slices",
        )
    return [key or "none" for key in keys]


def _read_column(file: Path, name: str) -> dict[int, str]:
    values = {line: record.get(name) for line, record in read_records(file, [])}
    return {line: str(each) for line, each in values.items() if isinstance(each, str | int | float)}


def _with_slices(evaluation: Evaluation, slices: Sequence[str]) -> Evaluation:
    """Return ``evaluation`` with the scores of each slice.

    Raises:
        RecipeError: if the scores are not scores of single rows.
    """
    packed = evaluation.tokens  # raw text, where no score belongs to one text
    per_row = {n: s for n, s in evaluation.row_scores.items() if len(s) == len(evaluation.rows)}
    if packed or not per_row:
        raise RecipeError("These rows have no scores per row. Omit `slices`.", setting="slices")
    parts = [slice_scores(per_row, by, slice_keys(evaluation.rows, by)) for by in slices]
    return replace(evaluation, slices=[each for part in parts for each in part])


def _stored_logps(stored: StoredModel, texts: Sequence[Example]) -> list[float]:
    from luthier.engine.machine import open_network

    network = open_network(stored, precise=True)
    logps = text_logps(network, texts)
    network.close()
    return logps


def _with_inputs(evaluation: Evaluation) -> Evaluation:
    if of_shape(JudgedAnswers, evaluation.rows):
        return evaluation
    records = [
        {"row": location_text(row.file, row.line), **row.input_record(), "expected": row.target(),
         **answer}
        for row, answer in zip(evaluation.rows, evaluation.records, strict=True)
    ]  # fmt: skip
    return replace(evaluation, records=records)
