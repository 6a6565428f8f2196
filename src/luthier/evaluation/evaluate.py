"""Evaluation of a model on held-out rows: generate a reply to each prompt and grade the replies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from luthier.data.conversations.citations import (
    cited_numbers,
    declines,
    requires_citations,
    without_citations,
)
from luthier.data.files.sources import Source
from luthier.data.languages import detect_languages
from luthier.data.prompts import load_prompts
from luthier.data.rows import ROWS_CHECKED, RowReader, load_rows
from luthier.data.shapes import describe_shapes, of_shape
from luthier.data.shapes.conversations import Conversation
from luthier.data.shapes.passages import CitedAnswer
from luthier.data.unread import UNREAD
from luthier.errors import DataError, Problem, RecipeError
from luthier.evaluation.breakdown import Calibration, LabelCounts, Slice, worst_rows
from luthier.evaluation.significance import LESS_IS_BETTER, Interval, RowScores, Score, values
from luthier.graders import (
    Answer,
    Exact,
    Grader,
    OnError,
    Similarity,
    ToolCalls,
    check_rows,
    grade_answers,
)
from luthier.graders.similarity import supports
from luthier.pages import PAGE, Tabular
from luthier.types import Message, Row

if TYPE_CHECKING:
    from luthier.objectives import Objective


TurnChoice = Literal["last", "calls", "all"]
"""Assistant turns to generate: the last turn of a conversation, each turn with calls, or all turns."""


FEW_REPLIES = 10
"""Minimum number of equal replies for a remark."""
SHOWN = 100
"""Characters of a reply in a sentence."""
SENTENCE = 3
"""Minimum median of words of replies that may be translations; shorter replies are labels or names."""
TRANSLATED_ROWS = 100
"""Number of rows whose languages are compared. Single sentences are often too short."""
LONG_REPLY = 12
"""Minimum number of words of a reply that no model reproduces exactly without memorization."""


@dataclass(frozen=True, repr=False)
class Evaluation(Tabular):
    """Scores of rows with standard errors, and the reply to every row."""

    row_scores: Mapping[str, Score]
    """Row scores by name. Models are compared by the first score."""
    rows: list[Row]
    """Evaluated rows, in the order of :attr:`records`."""
    problems: list[Problem] = field(default_factory=list)
    """Reasons for score 0 of replies that a grader could not grade."""

    dropped: int = 0
    """Number of dropped rows, which are longer than the model's context."""
    truncated: int = 0
    """Number of rows truncated to the context."""
    remarks: list[str] = field(default_factory=list)
    """Remarks about the uncertainty of the scores and about mistakes, in sentences."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Prompt, expected text and reply of each row, ready for JSON; empty for raw text."""
    is_graded: bool = False
    """True if records have ``prompt``, ``reply`` and the graders' ``scores``."""
    tokens: int = 0
    """Number of predicted tokens of raw text."""
    seconds: float = 0.0
    """Time for generation and grading, in seconds."""
    reply_seconds: float = 0.0
    """Time until the last reply, in seconds."""
    slices: list[Slice] = field(default_factory=list)
    """Scores of parts of the rows, if requested."""
    model: str = ""
    """Id of the evaluated model."""
    pictures: Mapping[int, str] = field(default_factory=dict)
    """Thumbnails of the worst images as ``data:`` addresses, by row."""
    systems: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    """Scores of the model and of other ways to search, on the same queries."""

    def summary(self) -> list[str]:
        """Return the first scores with their 95 % intervals."""
        scores = []
        for name, score in [*self.scores.items()][:3]:
            style = ".1%" if self.row_scores[name].is_share else ".4f"
            low, high = self.intervals.get(name, (score, score))
            interval = f" ({low:{style}} to {high:{style}})" if name in self.intervals else ""
            scores.append(f"{name.replace('_', ' ')} {score:{style}}{interval}")
        return [
            f"Evaluation of {self.model} on {len(self.rows):,} rows",
            *scores,
            *self.remarks[:1],
        ]

    def html(self, layout: str = PAGE) -> str:
        """Return scores, slices, mistakes and the worst rows as a page or fragment."""
        from luthier.evaluation.report_page import page

        file = self.rows[0].file if self.rows else ""
        return page(self, self.model, file.rpartition("/")[2], layout)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the prompt or text of each row with the reply or prediction."""
        return [*self.records]

    @cached_property
    def scores(self) -> dict[str, float]:
        """Scores by the name of the grader or measure."""
        return values(self.row_scores)

    @cached_property
    def errors(self) -> dict[str, float]:
        """Standard errors of the scores, for several rows."""
        known = {name: each.error for name, each in self.row_scores.items() if len(each) > 1}
        return {name: error for name, error in known.items() if math.isfinite(error)}

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % confidence intervals of the scores with a standard error."""
        return {name: self.row_scores[name].interval for name in self.errors}

    @cached_property
    def label_counts(self) -> LabelCounts | None:
        """Confusion matrix of rows with one label each."""
        return LabelCounts.of(self.rows, self.records) if self.records else None

    @cached_property
    def calibration(self) -> Calibration | None:
        """Calibration of predicted labels with probabilities."""
        return Calibration.of(self.rows, self.records) if self.records else None

    def worst(self, count: int) -> list[int]:
        """Return the indices of the worst rows by the first score, confident mistakes first.

        Empty if no score applies to single rows.
        """
        name, first = next(iter(self.row_scores.items()), ("", None))
        if not isinstance(first, RowScores) or len(first) != len(self.records):
            return []
        certain_R = None if self.calibration is None else self.calibration.confidence_R
        return [
            int(number) for number in worst_rows(first, certain_R, name in LESS_IS_BETTER)[:count]
        ]

    @property
    def long_rows_text(self) -> str:
        """Return a remark about rows longer than the context; empty without such rows."""
        if self.dropped:
            total = len(self.rows) + self.dropped
            return f"{self.dropped} of {total} rows are longer than the context and were dropped"
        if self.truncated:
            return f"{self.truncated} of {len(self.rows)} rows were truncated to the context"
        return ""

    def plain(self) -> dict[str, Any]:
        """Return scores, counts and slices without the replies. Empty parts are omitted."""
        counts = {
            "ungraded": len(self.problems), "dropped": self.dropped, "truncated": self.truncated,
            "tokens": self.tokens,
        }  # fmt: skip
        found: dict[str, Any] = {"model": self.model} if self.model else {}
        found |= {"rows": len(self.rows), "scores": self.scores}
        if self.errors:
            found |= {"errors": self.errors, "intervals": self.intervals}
        found |= {name: count for name, count in counts.items() if count}
        if self.label_counts is not None:
            found["labels"] = self.label_counts.scores()
            found["mistakes"] = [
                {"label": truth, "answer": answer, "rows": rows}
                for truth, answer, rows in self.label_counts.mistakes()
            ]
        if self.calibration is not None:
            found["calibration"] = self.calibration.bins()
        if self.systems:
            found["systems"] = {
                name: {
                    score: {"value": each.value, "interval": each.interval}
                    for score, each in scores.items()
                }
                for name, scores in self.systems.items()
            }
        if self.slices:
            found["slices"] = [each.plain() for each in self.slices]
        return found | ({"remarks": self.remarks} if self.remarks else {})


@contextmanager
def with_unread_columns(source: Source, columns: Mapping[str, str] | None) -> Iterator[None]:
    """Add the unread columns that may be targets to the errors of :func:`check_shapes`."""
    try:
        yield
    except DataError as error:
        if error.rule != "row.objective":
            raise
        reader = RowReader(source, columns)
        reader.first(ROWS_CHECKED)
        unread = [each for each in reader.unread_problems() if each.rule == UNREAD]
        raise DataError([*unread, *error.problems]) from None


def check_shapes(rows: Sequence[Row], objective: Objective) -> None:
    """Reject rows without a target for models of ``objective``.

    Raises:
        DataError: all rejected rows.
        RecipeError: no shape of row has a target for the objective.
    """
    if not objective.evaluation_shapes:
        raise RecipeError(
            f"models of objective {objective.method} have no scores on rows. The run has the losses "
            "of held-out rows; `luthier sample` and `luthier predict` show outputs"
        )
    wanted = describe_shapes(objective.evaluation_shapes)
    problems = [
        Problem(
            "row.objective",
            f"models of objective {objective.method} are evaluated on {wanted}, and the row is "
            f"{describe_shapes([row.shape])}.",
            "Name the column of labels with `data.columns.label=COLUMN`, or predict the rows."
            if f"labelled_{row.shape}" in objective.evaluation_shapes
            else "Convert the rows, or choose a model for rows of this shape.",
            row.location,
        )
        for row in rows
        if row.shape not in objective.evaluation_shapes
    ]
    if not problems and objective.task.embeds:
        problems = [
            Problem(
                "row.mixed_shapes",
                f"the row is {describe_shapes([row.shape])}, and the first row is "
                f"{describe_shapes([rows[0].shape])}.",
                "Write the labels of all rows as numbers, or of all rows as words.",
                row.location,
            )
            for row in rows
            if row.shape != rows[0].shape
        ]
    if problems:
        raise DataError(problems)


def questions(rows: Sequence[Row]) -> list[tuple[Message, ...]]:
    """Return the prompt of each row: for a conversation, all messages before the last assistant
    turn.

    Raises:
        DataError: a row without a prompt.
    """
    asked = [row.prompt_turns() for row in rows]
    if mute := next((row for row, turns in zip(rows, asked, strict=True) if not turns), None):
        problem = Problem(
            "row.no_reply",
            "the row has no prompt.",
            "Give rows of prompt and completion, of prompt and expected, or messages.",
            mute.location,
        )
        raise DataError([problem])
    return asked


def citation_scores(rows: Sequence[CitedAnswer], replies: Sequence[str]) -> dict[str, RowScores]:
    """Return the scores of the citations in ``replies``, and of declined questions.

    - ``citation_precision``: share of the citations that name a passage with the answer.
    - ``citation_recall``: share of the passages with the answer that are cited.
    - ``supported``: share of the answers with 75 % of their words or more in the cited passages.
    - ``declined``: share of the questions without an answer that are declined.
    - ``declined_wrongly``: share of the questions with an answer that are declined.
    """
    given = [{*cited_numbers(reply)} for reply in replies]
    right = [len(one & {*row.cited}) for one, row in zip(given, rows, strict=True)]
    declined = [declines(reply) for reply in replies]
    answered = [row.answer is not None for row in rows]
    scores = {
        "citation_precision": RowScores.of(right, [*map(len, given)]),
        "citation_recall": RowScores.of(right, [len(row.cited) for row in rows]),
        "supported": RowScores.of(
            [
                not one and supports(_cited_text(row, reply), without_citations(reply))
                for one, row, reply in zip(declined, rows, replies, strict=True)
            ],
            [not one for one in declined],
        ),
        "declined": RowScores.of(
            [one and not known for one, known in zip(declined, answered, strict=True)],
            [not known for known in answered],
        ),
        "declined_wrongly": RowScores.of(
            [one and known for one, known in zip(declined, answered, strict=True)], answered
        ),
    }
    return {name: score for name, score in scores.items() if score.wholes_R.any()}


def _cited_text(row: CitedAnswer, reply: str) -> str:
    """Return the passages that a reply cites."""
    numbers = (n for n in cited_numbers(reply) if 1 <= n <= len(row.passages))
    return "\n".join(row.passages[n - 1] for n in numbers)


def load_graded(
    source: Source,
    columns: Mapping[str, str] | None,
    graders: Iterable[Grader],
    turns: TurnChoice = "last",
) -> list[Row]:
    """Load rows for generation and grading.

    If no grader needs an expected reply, rows may be prompts with additional keys for the graders.

    Raises:
        DataError: all problems of the rows.
        RecipeError: see :func:`choose_turns`.
    """
    chosen = list(graders)
    calls = any(isinstance(each, ToolCalls) for each in chosen)
    if turns == "last" and not calls and any(each.grades_prompts for each in chosen):
        return load_prompts(source, columns)
    return choose_turns(load_rows(source, columns), turns)


def choose_turns(rows: Sequence[Row], turns: TurnChoice) -> list[Row]:
    """Return a row per selected turn, which ends with the turn.

    Raises:
        RecipeError: turns with calls are selected, and no turn of ``rows`` calls tools.
    """
    if turns == "last":
        return list(rows)
    chosen: list[Row] = []
    for row in rows:
        if not isinstance(row, Conversation):
            chosen += [row] if turns == "all" else []
            continue
        for size, turn in enumerate(row.messages, 1):
            if turn.role == "assistant" and turn.learned and (turn.calls or turns == "all"):
                chosen.append(replace(row, messages=row.messages[:size], expected=None))
        if turns == "all" and row.messages[-1].role != "assistant":
            chosen.append(row)
    if not chosen:
        raise RecipeError("no turn of the rows calls a tool; omit `turns=calls`")
    return chosen


def median_words(replies: Iterable[str | None]) -> float:
    """Return the median length of the expected replies in words; 0 without expected replies.

    In scripts without blanks, 12 characters count as a word.
    """
    return median([max(len(reply.split()), len(reply) // 12) for reply in replies if reply] or [0])


def translated_languages(rows: Sequence[Row]) -> tuple[str, str] | None:
    """Return the languages of prompts and expected replies; ``None`` if equal or unknown."""
    asked = questions(rows[:TRANSLATED_ROWS])
    prompts = "\n".join(turns[-1].content for turns in asked)
    replies = "\n".join(row.expected_reply() or "" for row in rows[:TRANSLATED_ROWS])
    source, target = detect_languages([prompts, replies])
    return (source, target) if source and target and source != target else None


def default_graders(rows: Sequence[Row], note: Callable[[str], None]) -> dict[str, Grader]:
    """Return the default graders for ``rows``. ``note`` receives the reason if not ``exact``."""
    if of_shape(CitedAnswer, rows):
        return {"token_f1": Similarity()}
    words = median_words(row.expected_reply() for row in rows)
    if words >= SENTENCE and (pair := translated_languages(rows)):
        note(
            f"grader: chrf (common n-grams of characters), because the prompts are in {pair[0]} and "
            f"the expected replies in {pair[1]}. Choose a grader for a different measure"
        )
        return {"chrf": Similarity(measure="chrf")}
    if words <= LONG_REPLY:
        return {"exact": Exact()}
    note(
        "grader: rouge_l (common words in order), because the expected replies have "
        f"{words:.0f} words (median). Choose a grader for a different measure"
    )
    return {
        "rouge_l": Similarity(measure="rouge_l"),
        "rouge_1": Similarity(measure="rouge_1"),
        "rouge_2": Similarity(measure="rouge_2"),
    }


def check(rows: Sequence[Row], graders: Mapping[str, Grader]) -> None:
    """Reject incompatible rows and graders before a model is loaded.

    Raises:
        DataError: rows without an expected reply, or with an expected reply that a grader rejects.
        RecipeError: a grader lacks a requirement, or no selected turn has tool calls to grade.
    """
    if any(isinstance(grader, ToolCalls) for grader in graders.values()):
        conversations = [row.turns() for row in rows]
        if not any(turns and turns[-1].calls for turns in conversations) and any(
            turn.calls for turns in conversations for turn in turns
        ):
            raise RecipeError(
                "no row ends with a tool call, so grader `tool_calls` has nothing to compare. Set "
                "`turns=calls` to evaluate the turns with calls.",
                rule="grader.no_calls",
            )
    questions(rows)
    check_rows(list(graders.values()), [Answer.of(row, "") for row in rows])


def grade(
    rows: Sequence[Row],
    replies: Sequence[str],
    graders: Mapping[str, Grader],
    on_error: OnError = "fail",
) -> Evaluation:
    """Grade ``replies`` to ``rows`` with each of ``graders``.

    Raises:
        GradingFailed: a grader cannot grade a reply, unless ``on_error`` is ``zero``.
    """
    questions(rows)
    cited = of_shape(CitedAnswer, rows) or ()
    answers = [
        Answer.of(
            row, without_citations(reply) if requires_citations(row.prompt_turns()) else reply
        )
        for row, reply in zip(rows, replies, strict=True)
    ]
    found = {name: grade_answers(grader, answers, on_error) for name, grader in graders.items()}
    records = [
        {
            "prompt": answer.prompt[-1].content,
            "reply": replies[index],
            "expected": answer.expected,
            "scores": {name: grades.scores[index] for name, grades in found.items()},
        }
        for index, answer in enumerate(answers)
    ]
    problems = [problem for grades in found.values() for problem in grades.problems]
    scores = {
        name: RowScores.of(found[name].scores, is_share=grader.is_share)
        for name, grader in graders.items()
    }
    if cited:
        scores |= citation_scores(cited, replies)
    remarks = []
    expected = {answer.expected for answer in answers}
    if len(replies) >= FEW_REPLIES and len({*replies}) == 1 < len(expected):
        shown = replies[0] if len(replies[0]) <= SHOWN else f"{replies[0][:SHOWN]} …"
        remarks.append(f"all {len(replies):,} replies are equal: {shown!r}")
    words = median_words(answer.expected for answer in answers)
    for name, grader in graders.items():
        none = len(replies) >= FEW_REPLIES and scores[name].value == 0
        if none and type(grader) is Exact and words > LONG_REPLY:
            remarks.append(
                f"{name} is too strict for long replies: the expected replies have {words:.0f} words "
                "(median). Use grader `similarity` with `measure=rouge_l`"
            )
        elif none and grader.is_share:
            remarks.append(
                f"all replies have score 0 by {name}: read some replies, and choose another grader if "
                "the replies are right, such as `similarity` with `measure=chrf` for translations"
            )
    return Evaluation(
        scores, list(rows), problems, remarks=remarks, records=records, is_graded=True
    )
