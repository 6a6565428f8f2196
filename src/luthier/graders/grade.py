"""Running a grader that may raise, hang or give nonsense, for training and evaluation alike."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Literal

from luthier.errors import DataError, GradingFailed, Problem, RecipeError, RowRefused, UnknownModel
from luthier.graders.base import Answer, Grader, Trouble, Ungraded

OnError = Literal["fail", "zero"]
TIME_LIMIT_S = 60.0
"""Seconds for one answer: a slow judge takes less, and a rule takes microseconds."""

Scored = tuple[list[float], dict[int, Trouble]]
"""Scores of a batch, NaN where there is none, and the reasons by index."""


@dataclass(frozen=True)
class Grades:
    """Scores of answers, and what went wrong with those that were set to 0."""

    scores: list[float]
    problems: list[Problem] = field(default_factory=list)
    """One for each answer without a score of its own."""
    places: list[int] = field(default_factory=list)
    """Which answers those are."""


def grade_answers(
    grader: Grader,
    answers: Sequence[Answer],
    on_error: OnError = "fail",
    time_limit_s: float = TIME_LIMIT_S,
) -> Grades:
    """Scores of ``answers``, all of them finite numbers.

    Args:
        grader: gives the scores.
        answers: what is graded.
        on_error: an answer without a score stops everything (``fail``), or has score 0 and is counted
            in :attr:`Grades.problems` (``zero``).
        time_limit_s: seconds for one answer; a batch that is graded at once has as many times that.

    Returns:
        One score for each answer: from 0 to 1 where the grader is bounded.

    Raises:
        GradingFailed: with ``fail``, naming the row, the grader and the fix.
        RecipeError: always, where the grader lacks something: a model, a valid key.

    A Python thread cannot be killed: a grader that hangs is left behind, and goes on using a core until
    it ends by itself or the process does.
    """
    if not grader.has_time_limit:
        scores, troubles = attempt(grader, answers)
    else:
        groups = (
            [answers]
            if grader.prefers_batches
            else [answers[i : i + 1] for i in range(len(answers))]
        )
        scores, troubles = _grade_within(grader, [group for group in groups if group], time_limit_s)
    problems = [
        Problem(answers[i].row.file, answers[i].row.line, t.rule, t.message, t.fix)
        for i, t in sorted(troubles.items())
    ]
    if problems and on_error == "fail":
        raise GradingFailed(problems)
    scores = [0.0 if i in troubles else s for i, s in enumerate(scores)]
    return Grades(scores, problems, sorted(troubles))


def check_rows(graders: Sequence[Grader], answers: Sequence[Answer]) -> None:
    """Refuse, before anything is written, graders that lack something and rows they cannot grade.

    Raises:
        RecipeError: from the grader.
        DataError: naming every row.
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
    """Scores without a time limit; whatever is no usable score becomes NaN and a reason."""
    try:
        scores, troubles = list(grader.grade(answers)), dict[int, Trouble]()
    except Ungraded as error:
        scores, troubles = error.scores, error.troubles
    except (RecipeError, UnknownModel):  # of the grader itself: no row is to blame
        raise
    except (Exception, SystemExit) as error:
        if len(answers) > 1:  # one by one, to find the row, and to keep the others
            return _join([attempt(grader, [answer]) for answer in answers])
        return [math.nan], {0: _trouble_of(grader, error)}
    if len(scores) != len(answers):
        text = f"grader `{grader.method}` gave {len(scores)} scores for {len(answers)} answers."
        fault = Trouble("grader.count", text, "Return one score for each answer, in their order.")
        return [math.nan] * len(answers), dict.fromkeys(range(len(answers)), fault)
    for index, score in enumerate(scores):
        trouble = None if index in troubles else _fault(grader, score)
        if trouble:
            troubles[index] = trouble
    return [math.nan if i in troubles else float(s) for i, s in enumerate(scores)], troubles


def _fault(grader: Grader, score: object) -> Trouble | None:
    """What is wrong with a score, if anything."""
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        text = f"grader `{grader.method}` gave {score!r}, which is no finite number."
        return Trouble("grader.not_finite", text, "Mend the grader; 0 is the score of a bad reply.")
    if grader.is_share and not 0 <= score <= 1:
        text = f"grader `{grader.method}` gave {score!r}, which is not from 0 to 1."
        return Trouble("grader.range", text, "Scale the score, or say that it is not `bounded`.")
    return None


def _trouble_of(grader: Grader, error: BaseException) -> Trouble:
    if isinstance(error, RowRefused):
        return Trouble(error.rule, error.message, error.fix)
    text = f"grader `{grader.method}` raised {type(error).__name__}: {str(error)[:300]}"
    return Trouble("grader.raised", text, "Mend the grader or the row, or score such answers 0.")


def _join(parts: Sequence[Scored]) -> Scored:
    scores: list[float] = []
    troubles: dict[int, Trouble] = {}
    for some, wrong in parts:
        troubles |= {len(scores) + index: trouble for index, trouble in wrong.items()}
        scores += some
    return scores, troubles


def _grade_within(grader: Grader, groups: Sequence[Sequence[Answer]], limit_s: float) -> Scored:
    """``groups`` one after the other in a thread; one that hangs is left behind with its thread.

    Of a group that hangs as a whole, each answer is tried by itself, to find the row.
    """
    done: list[Scored] = []
    while len(done) < len(groups):
        worker = _Worker(grader, groups[len(done) :])
        for group in groups[len(done) :]:
            found = worker.next(limit_s * len(group))
            if found is not None:
                done.append(found)
                continue
            singles = [[answer] for answer in group]
            done.append(
                _grade_within(grader, singles, limit_s)
                if len(group) > 1
                else ([math.nan], {0: _too_long(grader, limit_s)})
            )
            break  # with a new thread for those that follow
    return _join(done)


def _too_long(grader: Grader, limit_s: float) -> Trouble:
    return Trouble(
        "grader.time",
        f"grader `{grader.method}` took more than {limit_s:g} s.",
        "Make the grader faster, raise its time limit, or score such answers 0.",
    )


class _Worker:
    """A thread that grades groups in their order until nobody wants them any more.

    It has the context of whoever asks: who may cancel the work, and whose journal a verdict belongs to.
    """

    def __init__(self, grader: Grader, groups: Sequence[Sequence[Answer]]) -> None:
        self._found: queue.SimpleQueue[Scored | BaseException] = queue.SimpleQueue()
        self._left = threading.Event()
        thread = threading.Thread(
            target=copy_context().run,
            args=(self._run, grader, groups),
            name=f"grader {grader.method}",
            daemon=True,
        )
        thread.start()

    def _run(self, grader: Grader, groups: Sequence[Sequence[Answer]]) -> None:
        for group in groups:
            if self._left.is_set():
                return
            try:
                self._found.put(attempt(grader, group))
            except BaseException as error:  # it would end the thread without a word
                self._found.put(error)
                return

    def next(self, limit_s: float) -> Scored | None:
        """The next group's scores; nothing when they are not there in time."""
        try:
            found = self._found.get(timeout=limit_s)
        except queue.Empty:
            self._left.set()
            return None
        if isinstance(found, BaseException):
            raise found
        return found
