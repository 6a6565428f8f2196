"""How good a stored model is on held-out rows, by what the rows say.

Replies are graded, raw text is predicted (perplexity), choices are compared by how likely they are
(:mod:`luthier.evaluation.choices`), and judged answers are told apart: beside the plain log-probability
stands the implicit reward of DPO, the log-probability less that of the model it was trained from
(Rafailov et al. 2023, section 4), whose accuracy is the held-out win rate. Adapters are merged in
float32 where memory allows, as rounding merged weights moves small rewards.

Rows longer than the context are refused, left out, or cut; what training does with them is for
``data.long_rows``, and the choices have the same names.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from luthier.data.read import read_records
from luthier.data.shapes import of_shape
from luthier.data.shapes.choices import MultipleChoice
from luthier.data.shapes.preferences import ThumbedReply
from luthier.data.tree import READING_BUDGET
from luthier.errors import DataError, Problem, RecipeError, RowRefused
from luthier.evaluation.breakdown import length_keys
from luthier.evaluation.choices import (
    ChoiceLikelihood,
    choice_scores,
    cut_prompt,
    encode_choices,
)
from luthier.evaluation.evaluate import Evaluation, grade, questions
from luthier.evaluation.preferences import (
    Likelihood,
    pair_scores,
    thumb_scores,
)
from luthier.evaluation.significance import (
    LESS_IS_BETTER,
    RowScores,
    Score,
    Statistic,
    perplexity_of,
)
from luthier.gate.language_identification import detect_languages
from luthier.inference.reply_log import journal_verdicts
from luthier.objectives.base import cut_end
from luthier.types import Example, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.graders import Grader, OnError
    from luthier.inference.generation import Generator
    from luthier.library.models import StoredModel
    from luthier.models.network import Network, TreeBatch

MOST_COMPARED_BYTES = 64_000_000
"""Of a training file, that is read to find evaluated rows in it: some seconds."""

AnyGrader = TypeVar("AnyGrader", bound="Grader")
LongRows = Literal["error", "drop", "truncate"]
"""Refuse them all at once, leave them out, or cut them to the context."""


@dataclass(frozen=True)
class FittingRows:
    """Rows that a model can read, each as the texts it consists of."""

    rows: list[Row]
    examples: list[list[Example]]
    """The texts of each row: one, or two where a row compares or pairs two."""
    dropped: int = 0
    """Rows left out as too long."""
    truncated: int = 0
    """Rows cut to the context."""

    def evaluation(
        self,
        scores: Mapping[str, Score],
        records: Sequence[Mapping[str, Any]],
        remarks: Sequence[str] = (),
    ) -> Evaluation:
        """``scores`` of what a model says of the rows, and that itself."""
        return Evaluation(
            scores, self.rows, remarks=[*remarks], records=[dict(each) for each in records],
            dropped=self.dropped, truncated=self.truncated,
        )  # fmt: skip


def fit_rows(
    rows: Sequence[Row],
    examples: Sequence[list[Example]],
    context: int,
    long_rows: LongRows,
    cut: Callable[[Example, int], Example],
) -> FittingRows:
    """``rows`` with texts of at most ``context`` tokens; ``cut`` shortens a text.

    Raises:
        DataError: with ``error``, naming every row that is too long; or where none is left.
    """
    problems: list[Problem] = []
    kept: list[tuple[Row, list[Example]]] = []
    dropped = truncated = 0
    for row, texts in zip(rows, examples, strict=True):
        longest = max(len(text) for text in texts)
        if longest <= context:
            kept.append((row, texts))
        elif long_rows == "truncate":
            truncated += 1
            kept.append((row, [cut(t, context) if len(t) > context else t for t in texts]))
        elif long_rows == "drop":
            dropped += 1
        else:
            message = f"{longest} tokens are more than the model's context of {context}."
            problems.append(too_long(row, message))
    refuse_long_rows(problems, left=len(kept), dropped=dropped)
    return FittingRows([r for r, _ in kept], [texts for _, texts in kept], dropped, truncated)


def too_long(row: Row, message: str, cure: str = ", or `long_rows=truncate`") -> Problem:
    """What is wrong with a row that is too long; ``cure`` is what else would make it fit."""
    fix = f"Shorten the row, or choose `long_rows=drop`{cure}."
    return Problem(row.file, row.line, "row.too_long", message, fix)


def refuse_long_rows(problems: Sequence[Problem], left: int, dropped: int) -> None:
    """Refuse ``problems``, and data of which no row is ``left``.

    Raises:
        DataError: with each row that is too long.
        RecipeError: where all rows were dropped.
    """
    if problems:
        raise DataError(problems, "nothing was evaluated")
    if dropped and not left:
        raise RecipeError(f"all {dropped} rows are longer than the model's context; none is left")


def long_rows_summary(found: Evaluation) -> str:
    """What became of rows longer than the context, for people; empty where there were none."""
    if found.dropped:
        count = len(found.rows) + found.dropped
        return f"{found.dropped} of {count} rows are longer than the context and were left out"
    cut = found.truncated
    return f"{cut} of {len(found.rows)} rows were cut to the context" if cut else ""


def row_remarks(stored: StoredModel, data: str | Path, rows: Sequence[Row]) -> list[str]:
    """Why scores of these rows say less than their errors do."""
    from luthier.files import sha256_of
    from luthier.gate.row_keys import repeated_rows

    remarks = []
    learned = _training_files(stored)
    if learned and Path(data).is_file() and sha256_of(Path(data)) in learned.values():
        remarks.append(
            f"{stored.id} was trained on these rows, so what is measured is what it "
            "remembers, and nothing of rows that it has not seen"
        )
    elif seen := _rows_learned(stored, learned, rows):
        number, place = next(iter(seen.items()))
        example = f"{rows[number].file}:{rows[number].line}, which asks what {place} asks"
        remarks.append(
            f"{len(seen):,} of {len(rows):,} rows ask what training rows ask (such as {example}), so "
            f"what is measured on them is what {stored.id} remembers. Evaluate it on rows that it has "
            "not seen; `luthier split` keeps some apart"
        )
    if repeats := repeated_rows(rows):
        remarks.append(
            f"{len(repeats):,} of {len(rows):,} rows repeat others word for word and say nothing "
            f"new: the intervals are those of {len(rows):,} different rows, and too narrow for these"
        )
    return remarks


def _training_files(stored: StoredModel) -> dict[str, str]:
    """Hash of each file that a model learned from, by path."""
    if stored.manifest.data is None:
        return {}
    named = (stored.manifest.recipe or {}).get("data", {})
    held_out = set[str]()
    # Of pre-training there may be several.
    for each in (named.get("validation"), named.get("test")):
        held_out.update([each] if isinstance(each, str) else each or ())
    return {p: digest for p, digest in stored.manifest.data.sha256.items() if p not in held_out}


def _rows_learned(
    stored: StoredModel, learned: Mapping[str, str], rows: Sequence[Row]
) -> dict[int, str]:
    """Numbers of the ``rows`` that ask what a row asks that the model learned from, and its place.

    ``learned`` are the hashes of its files. One that is gone or changed is not looked at, nor what goes
    beyond :data:`MOST_COMPARED_BYTES` in all, nor lines that were held out.
    """
    from luthier.data.rows import RowReader
    from luthier.engine.dataset import checker_for
    from luthier.engine.runs import HELD_OUT
    from luthier.files import read_json, sha256_of
    from luthier.gate.row_keys import match_questions, question_of
    from luthier.library.folders import working_folders
    from luthier.library.models import objective_of

    if not learned or not any(map(question_of, rows)):
        return {}
    held_out = [stored.manifest.data.held_out] if stored.manifest.data else []
    for folder in working_folders(stored.id)[:1]:
        if (folder / HELD_OUT).is_file():  # has the lines of a test, too
            held_out += read_json(folder / HELD_OUT).values()
    columns = (stored.manifest.recipe or {}).get("data", {}).get("columns")
    checker = checker_for(objective_of(stored))

    def rows_of(path: str) -> Iterator[Row]:
        left_out = {line for files in held_out for line in files.get(path, ())}
        reader = RowReader(path, columns, checker)
        return (row for row in reader if row.line not in left_out)

    usable, left = list[str](), MOST_COMPARED_BYTES
    for path in filter(os.path.isfile, learned):
        if (size := os.path.getsize(path)) <= left:
            left -= size
            usable.append(path)
    same = (path for path in usable if sha256_of(Path(path)) == learned[path])
    return match_questions(rows, chain.from_iterable(map(rows_of, same)))


def slice_keys(rows: Sequence[Row], by: str) -> list[str]:
    """What each row counts as ``by`` its label, length, language, or a column of its file.

    Lengths are the characters of what is given, in thirds; languages those that are certain. Columns
    are read from the files once more, as rows hold only what a model reads or learns.

    Raises:
        RecipeError: where no row has such a column, or none has a label.
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
        columns = {file: _column(Path(file), by) for file in dict.fromkeys(r.file for r in rows)}
        keys = [columns[row.file].get(row.line, "") for row in rows]
    if not any(keys):
        what = "a label" if by == "label" else f"a column {by!r} with texts or numbers"
        raise RecipeError(
            f"no row has {what} to slice by; slices are by label, length, language or a column"
        )
    return [key or "none" for key in keys]


def _column(file: Path, name: str) -> dict[int, str]:
    """What the lines of a file hold in a column, where that is a text, a number or a truth value."""
    records = read_records(file, [])
    found = {line: record.get(name) for line, record in records}
    return {line: str(each) for line, each in found.items() if isinstance(each, str | int | float)}


def open_graders(
    graders: Mapping[str, AnyGrader], answers: int, note: Callable[[str], None]
) -> dict[str, AnyGrader]:
    """``graders`` ready for ``answers`` answers, each model tried and what it will cost told.

    A judge is asked nothing twice, by no run: its verdicts are in its journal.

    Raises:
        UnknownModel, RecipeError: for a model that is not there or is for something else, a key that
            is refused, the name of an error.
        LuthierError: for an endpoint that does not answer.
    """
    if errors := sorted(graders.keys() & LESS_IS_BETTER):
        raise RecipeError(
            f"a grader is called {errors[0]!r}, which names an error, of which less is better: give it "
            "another name"
        )
    judgements = sum(grader.judgements for grader in graders.values())
    if judgements:
        note(f"the judge will be asked for {judgements * (answers + 1):,} verdicts at most")
    if not judgements and not any(grader.models for grader in graders.values()):
        return dict(graders)
    from luthier.engine.job import load_frozen
    from luthier.engine.machine import choose_machine
    from luthier.engine.metrics import Reporter
    from luthier.library.models import find, objective_of
    from luthier.objectives.scoring import LocalModels, check_grader_model

    stored = {name: find(name, note) for each in graders.values() for name in each.models}
    for grader in graders.values():
        for name, task in grader.models.items():
            check_grader_model(name, task, objective_of(stored[name]))
    machine = choose_machine()
    networks = {name: load_frozen(each, machine, Reporter()) for name, each in stored.items()}
    models = LocalModels(networks, note, journal_verdicts)
    ready = {name: grader.with_models(models) for name, grader in graders.items()}
    for name, grader in ready.items():
        if warning := grader.rehearse():
            note(f"warning: grader {name}: {warning}")
    return ready


def measure(
    generator: Generator,
    rows: Sequence[Row],
    graders: Mapping[str, Grader],
    max_tokens: int,
    done: Callable[[int], None] = lambda count: None,
    on_error: OnError = "fail",
    long_rows: LongRows = "error",
) -> Evaluation:
    """Greedy replies to ``rows``, graded; ``done`` hears how many are finished.

    ``on_error`` says what becomes of replies that
    a grader cannot grade, and ``long_rows`` of prompts that leave no room for a reply; they are never
    cut, as their end is what is asked.

    Raises:
        DataError: with ``error``, naming every prompt that is too long.
        RecipeError: for ``truncate``.
    """
    from luthier.inference.inference import Chat
    from luthier.models.sampling import Sampling

    if long_rows == "truncate":
        raise RecipeError(
            "a prompt that is cut loses what it asks, so prompts are not truncated; choose "
            "`long_rows=drop`"
        )
    asked = [Chat(each, row.tools) for row, each in zip(rows, questions(rows), strict=True)]
    sampling = Sampling(max_tokens=max_tokens)
    refusals = [generator.refusal(prompt, sampling) for prompt in asked]
    kept = [index for index, refusal in enumerate(refusals) if refusal is None]
    dropped = len(rows) - len(kept)
    problems = [
        too_long(row, refusal, cure=", or lower max_tokens")
        for row, refusal in zip(rows, refusals, strict=True)
        if refusal is not None and long_rows == "error"
    ]
    refuse_long_rows(problems, len(kept), dropped)
    prompts = [asked[index] for index in kept]
    began = time.perf_counter()
    replies = generator.replies(prompts, sampling, done=done)
    seconds = time.perf_counter() - began
    graded = grade([rows[index] for index in kept], replies, graders, on_error)
    return replace(graded, dropped=dropped, reply_seconds=seconds)


def perplexity(stored: StoredModel, rows: Sequence[Row]) -> Evaluation:
    """How well a causal language model predicts raw text, packed as in training (or by 512 tokens).

    ``loss`` is in nats a token, the first of each sequence left out; ``bits_per_character`` compares
    models of different tokenizers. Errors are those of a mean over sequences.
    """
    from luthier.library import models as store
    from luthier.objectives import CausalLM

    store.check_writes(stored, "so raw text has no perplexity under it")
    trained = store.objective_of(stored)
    objective = trained if isinstance(trained, CausalLM) else CausalLM()
    chat = store.chat_format(stored)
    encoded = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    sequences = objective.pack(encoded, store.room_of(stored))
    weight_S = np.array([sequence.weight for sequence in sequences])
    loss = RowScores.of(-np.array(_logps(stored, sequences)), weight_S, is_share=False)
    tokens = float(weight_S.sum())
    bits = tokens / math.log(2) / max(1, sum(len(row.plain_text()) for row in rows))

    def of_loss(change: Callable[[float], float]) -> Statistic:
        return Statistic.of(lambda row_K: change(loss.take(row_K).value), len(loss), is_share=False)

    scores: dict[str, Score] = {
        "perplexity": of_loss(perplexity_of),
        "loss": loss,
    }
    scores["bits_per_character"] = of_loss(lambda nats: nats * bits)
    return Evaluation(scores, list(rows), tokens=int(tokens))


def preference_scores(
    stored: StoredModel,
    rows: Sequence[Row],
    done: Callable[[int], None] = lambda count: None,
    long_rows: LongRows = "error",
) -> Evaluation:
    """Scores of ``stored`` on pairs, ratings or thumbs, and what it says of each row.

    Raises:
        DataError: with ``error``, naming every row that is longer than the context.
    """
    from luthier.library import models as store
    from luthier.objectives import DPO, KTO

    store.check_writes(stored, "so answers have no probability under it")
    thumbs = isinstance(rows[0], ThumbedReply)
    objective = KTO() if thumbs else DPO()
    rows = objective.regroup(rows)
    chat = store.chat_format(stored)
    texts = [objective.encode(row, index, chat).sides for index, row in enumerate(rows)]
    measured = fit_rows(rows, texts, store.room_of(stored), long_rows, cut_end)
    rows, sides = measured.rows, [side for each in measured.examples for side in each]
    found = _logps(stored, sides)
    done(len(rows))
    parent = stored.manifest.parent
    reference = _logps(store.find(str(parent)), sides) if parent else [None] * len(sides)
    answers = [
        Likelihood(logp, int(np.count_nonzero(side.weight_T)), other)
        for logp, side, other in zip(found, sides, reference, strict=True)
    ]
    lines: list[dict[str, Any]]
    if thumbed := of_shape(ThumbedReply, rows):
        scores = thumb_scores(answers, [row.desirable for row in thumbed])
        lines = [{"line": r.line, **a.plain()} for r, a in zip(rows, answers, strict=True)]
        return measured.evaluation(scores, lines)
    pairs = list(zip(answers[::2], answers[1::2], strict=True))
    lines = [
        {"line": row.line, "chosen": chosen.plain(), "rejected": rejected.plain()}
        for row, (chosen, rejected) in zip(rows, pairs, strict=True)
    ]
    return measured.evaluation(pair_scores(pairs), lines)


def multiple_choice(
    stored: StoredModel,
    rows: Sequence[MultipleChoice],
    done: Callable[[int], None] = lambda count: None,
    long_rows: LongRows = "error",
) -> Evaluation:
    """How often ``stored`` finds the right choice the likeliest, with what it says of each row.

    Prompts are texts that go on, without the chat template, as lm-evaluation-harness gives them. What
    the choices of a row, or several rows, begin with is computed once. ``truncate`` cuts the beginning
    of a prompt.

    Raises:
        DataError: with ``error``, naming every row that is longer than the context.
    """
    from luthier.engine.machine import open_network
    from luthier.library import models as store

    store.check_writes(stored, "so choices have no probability under it")
    measured = fit_choices(rows, store.chat_format(stored), store.room_of(stored), long_rows)
    network = open_network(stored, precise=True)
    found = choice_likelihoods(network, measured.examples)
    network.close()
    done(len(rows))
    kept = of_shape(MultipleChoice, measured.rows) or ()
    return measured.evaluation(*choice_scores(kept, found))


def fit_choices(
    rows: Sequence[MultipleChoice], chat: ChatFormat, context: int, long_rows: LongRows
) -> FittingRows:
    """``rows`` with their choices as tokens, as :func:`fit_rows`.

    Raises:
        DataError: naming each row with a choice that gives no tokens.
    """
    problems: list[Problem] = []
    texts: list[list[Example]] = []
    for row in rows:
        try:
            texts.append(encode_choices(row, chat))
        except RowRefused as bad:
            problems.append(Problem(row.file, row.line, bad.rule, bad.message, bad.fix))
    if problems:
        raise DataError(problems, "nothing was evaluated")
    return fit_rows(rows, texts, context, long_rows, cut_prompt)


def choice_likelihoods(
    network: Network, choices: Sequence[Sequence[Example]]
) -> list[list[ChoiceLikelihood]]:
    """How likely ``network`` finds the choices of each row."""
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
        found = iter(network.read_rows([*chain(*choices)], READING_BUDGET, read))
    return [[next(found) for _ in of_row] for of_row in choices]


def text_logps(network: Network, texts: Sequence[Example]) -> list[float]:
    """Log-probability of the learned tokens of each text under ``network``, in nats."""
    import torch

    from luthier.objectives.references import with_reference_logps

    with torch.no_grad():
        found = with_reference_logps(network, texts, READING_BUDGET)
    return [float(each.reference or 0.0) for each in found]


def _logps(stored: StoredModel, texts: Sequence[Example]) -> list[float]:
    from luthier.engine.machine import open_network

    network = open_network(stored, precise=True)
    found = text_logps(network, texts)
    network.close()
    return found
