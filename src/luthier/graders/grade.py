"""Grading with error handling and time limits, for training and evaluation."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Literal

from luthier.errors import DataError, GradingFailed, Problem, RecipeError, RowRefused, UnknownModel
from luthier.graders.base import Answer, Grader, Ungraded

OnError = Literal["fail", "zero"]
TIME_LIMIT_S = 60.0
"""Time limit per answer, in seconds. A slow judge needs less."""

Scored = tuple[list[float], dict[int, RowRefused]]
"""Scores of a batch, NaN if missing, and the fault of each missing score by index."""


@dataclass(frozen=True)
class Grades:
    """Scores of answers, and the faults of ungraded answers, which score 0."""

    scores: list[float]
    problems: list[Problem] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Index of the answer of each problem."""


def grade_answers(
    grader: Grader,
    answers: Sequence[Answer],
    on_error: OnError = "fail",
    time_limit_s: float = TIME_LIMIT_S,
) -> Grades:
    """Grade ``answers``; all scores are finite.

    Of several correct replies of a row, the reply with the best score counts.

    Args:
        grader: the grader.
        answers: the answers.
        on_error: for answers without a score, ``fail`` raises an error, and ``zero`` gives score 0
            and an entry in :attr:`Grades.problems`.
        time_limit_s: seconds per answer.

    Raises:
        GradingFailed: with ``fail``, for answers without a score.
        RecipeError: if the grader lacks a model or a valid key.

    Python cannot kill a thread: a grader that hangs occupies a core until the process ends.
    """
    options = [_with_references(grader, answer) for answer in answers]
    each = [option for some in options for option in some]
    if not grader.has_time_limit:
        scores, faults = attempt(grader, each)
    else:
        groups = [each] if grader.prefers_batches else [[answer] for answer in each]
        scores, faults = _grade_within(grader, [group for group in groups if group], time_limit_s)
    scores, faults = _best(scores, faults, [len(some) for some in options])
    problems = [
        fault.at(answers[index].row.file, answers[index].row.line)
        for index, fault in sorted(faults.items())
    ]
    if problems and on_error == "fail":
        raise GradingFailed(problems)
    scores = [0.0 if index in faults else score for index, score in enumerate(scores)]
    return Grades(scores, problems, sorted(faults))


def _with_references(grader: Grader, answer: Answer) -> list[Answer]:
    """Return an answer for each correct reply of the row, if ``grader`` compares with the reply."""
    replies = answer.row.other_replies if grader.needs_expected else ()
    return [answer, *(replace(answer, expected=text) for text in replies)]


def _best(
    scores: Sequence[float], faults: Mapping[int, RowRefused], sizes: Sequence[int]
) -> Scored:
    """Return the best score of each group of ``sizes``, and the fault of a group without a score."""
    found: list[float] = []
    missing: dict[int, RowRefused] = {}
    start = 0
    for place, size in enumerate(sizes):
        able = [scores[n] for n in range(start, start + size) if n not in faults]
        if not able:
            missing[place] = faults[start]
        found.append(max(able, default=math.nan))
        start += size
    return found, missing


def check_rows(graders: Sequence[Grader], answers: Sequence[Answer]) -> None:
    """Reject graders with missing requirements, and rows that the graders cannot grade.

    Raises:
        RecipeError: from a grader.
        DataError: all rejected rows.
    """
    problems = []
    for grader in graders:
        grader.check()
        for answer in answers:
            try:
                grader.check_expected(answer.expected)
            except RowRefused as refused:
                problems.append(refused.at(answer.row.file, answer.row.line))
    if problems:
        raise DataError(problems)


def attempt(grader: Grader, answers: Sequence[Answer]) -> Scored:
    """Grade without a time limit; unusable scores become NaN with a fault."""
    try:
        scores, faults = list(grader.grade(answers)), dict[int, RowRefused]()
    except Ungraded as error:
        scores, faults = error.scores, error.faults
    except (RecipeError, UnknownModel):  # a fault of the grader, not of a row
        raise
    except (Exception, SystemExit) as error:
        if len(answers) > 1:  # grade one by one to find the row and to keep the other scores
            return _join([attempt(grader, [answer]) for answer in answers])
        return [math.nan], {0: _fault_of(grader, error)}
    if len(scores) != len(answers):
        text = f"grader `{grader.method}` returned {len(scores)} scores for {len(answers)} answers."
        fault = RowRefused("grader.count", text, "Return one score per answer, in their order.")
        return [math.nan] * len(answers), dict.fromkeys(range(len(answers)), fault)
    for index, score in enumerate(scores):
        if index not in faults and (found := _bad_score(grader, score)):
            faults[index] = found
    return [math.nan if i in faults else float(s) for i, s in enumerate(scores)], faults


def _bad_score(grader: Grader, score: object) -> RowRefused | None:
    text = f"grader `{grader.method}` returned {score!r}, which is not"
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        fix = "Fix the grader; a bad reply scores 0."
        return RowRefused("grader.not_finite", f"{text} a finite number.", fix)
    if grader.is_share and not 0 <= score <= 1:
        return RowRefused("grader.range", f"{text} from 0 to 1.", "Scale the score.")
    return None


def _fault_of(grader: Grader, error: BaseException) -> RowRefused:
    if isinstance(error, RowRefused):
        return error
    text = f"grader `{grader.method}` raised {type(error).__name__}: {str(error)[:300]}"
    return RowRefused("grader.raised", text, "Fix the grader or the row, or score such answers 0.")


def _join(parts: Sequence[Scored]) -> Scored:
    scores: list[float] = []
    faults: dict[int, RowRefused] = {}
    for some, wrong in parts:
        faults |= {len(scores) + index: fault for index, fault in wrong.items()}
        scores += some
    return scores, faults


def _grade_within(grader: Grader, groups: Sequence[Sequence[Answer]], limit_s: float) -> Scored:
    """Grade each group in a thread, and abandon the thread if the group hangs.

    The answers of a group that hangs are then graded separately, to find the row.
    """
    parts: list[Scored] = []
    for group in groups:
        scored = _attempt_within(grader, group, limit_s * len(group))
        if scored is None and len(group) > 1:
            scored = _grade_within(grader, [[answer] for answer in group], limit_s)
        if scored is None:
            text = f"grader `{grader.method}` took more than {limit_s:g} s."
            fix = "Make the grader faster, raise its time limit, or score such answers 0."
            scored = [math.nan], {0: RowRefused("grader.time", text, fix)}
        parts.append(scored)
    return _join(parts)


def _attempt_within(grader: Grader, answers: Sequence[Answer], limit_s: float) -> Scored | None:
    """Return the scores of a new thread, or None after ``limit_s`` seconds."""
    results: queue.SimpleQueue[Scored | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(attempt(grader, answers))
        except BaseException as error:  # raised again in the caller's thread
            results.put(error)

    # The caller's context has the cancellation handle of the work and the journal of verdicts.
    thread = threading.Thread(
        target=copy_context().run, args=(run,), name=f"grader {grader.method}", daemon=True
    )
    thread.start()
    try:
        scored = results.get(timeout=limit_s)
    except queue.Empty:
        return None
    if isinstance(scored, BaseException):
        raise scored
    return scored
