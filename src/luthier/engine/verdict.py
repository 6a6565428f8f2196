"""Verdicts on finished runs, from the measurements before and during training.

The best measurement determines the stored weights; among measurements equal within chance, the one
with the lowest loss (:func:`~luthier.engine.metrics.best_measurement`). The first measurement
precedes the first step. A run that only does harm therefore keeps the initial weights.

A verdict has at most three sentences: the outcome with its measurements, the stored weights if they
are not the last weights, and advice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luthier.engine.metrics import (
    FEW_ROWS,
    SCORES,
    additional_metrics,
    best_measurement,
    chance_between,
    cost_of,
    deciding_measure,
    is_hollow,
)
from luthier.evaluation.label_issues import LabelIssueCounts
from luthier.formatting import format_duration
from luthier.objectives.question_answering import ANSWERING_BASES
from luthier.recipe import Training

Outcome = Literal[
    "learned",
    "still_improving",
    "overfitted",
    "declined",
    "hardly_learned",
    "worse",
    "unmeasured",
]
Cause = Literal[
    "",
    "unmeasured",
    "few_rows",
    "few_steps",
    "more_steps",
    "rate_high",
    "rate_low",
    "unsteady",
    "overfitting",
    "other_rows",
    "reward",
    "reward_fell",
    "regression",
    "rows_not_learned",
    "base_model",
    "uninformative",
    "wrong_labels",
    "reader_base",
]

LEAST_GAIN = 0.02
"""Minimum gain for a run to have learned, as a share of the first validation loss."""
LEAST_CHANGE = 0.05
"""Minimum rise or fall near the end that counts, as a share of the total gain."""
LAST_PART = 0.6
"""Start of the last part of a run, as a share of the steps. The last part is large: with a rate
that falls to 0, the very end is flat in any case."""
FEWEST_STEPS = 6
"""Minimum number of steps for a trend; in shorter runs the loss varies with the rows."""
RISEN = 0.1
"""Minimum rise of a loss that counts, as a share of the first loss."""
LEARNED = 0.1
"""Minimum fall of the training loss, as a share, before labels can be blamed for an uninformative
model. A new head that only learns label frequencies gains less."""
MANY_ISSUES = 0.02
"""Minimum share of rows with a label issue for the labels to be the cause (docs/log/defaults.md)."""
LOW_F1 = 0.5
"""F1 of a reader with a new head below which another base model is advised (docs/results.md)."""
SMALL_BATCH = 16
"""Batch size below which a larger batch is advised if nothing was learned."""
FEW_LOSSES = 10
"""Number of held-out rows below which a token-level loss is rough."""
_HEADLINES: Mapping[Outcome, str] = {
    "learned": "Learned",
    "still_improving": "Learned, and still improving at the end",
    "overfitted": "Overfitted since step {step}",
    "declined": "Worse again since step {step}",
    "hardly_learned": "Hardly learned",
    "worse": "Worse than before training",
}
_ADVICE: Mapping[Cause, str] = {
    "": "",
    "unmeasured": "Give rows to measure on: `data.validation=FILE`",
    "few_rows": "Give more rows to measure on: `data.validation=FILE`",
    "few_steps": "{steps} steps are too few to find the cause: {longer}",
    "more_steps": "More steps are likely to help: {longer}",
    "rate_high": "The learning rate is too high: try {lower} or `luthier study DATA --search 12`",
    "rate_low": "Unless the model knew the data, the learning rate is too low or the steps are too "
    "few: try {higher} or `luthier study DATA --search 12`",
    "unsteady": "No training row was repeated, so this is not overfitting: try {lower}, or more rows",
    "overfitting": "The later steps memorized the training rows: try more rows, fewer epochs or fewer "
    "trained weights",
    "other_rows": "The training loss fell without a gain on the validation rows: check that both are "
    "of one kind, or give more rows",
    "reward": "Read the replies with `luthier models samples`, and try a finer grader, easier prompts "
    "or more steps",
    "reward_fell": "Read the replies with `luthier models samples`, and try {lower}",
    "regression": "More rows help most, above all of the confused labels",
    "rows_not_learned": "The training loss hardly moved ({first:.3f} to {last:.3f}), so the rows "
    "cannot be judged: try more steps ({times_four}), {higher}{batch} or `luthier "
    "study DATA --search 12`",
    "base_model": "{informed} separates the rows and this base model does not: {other_base}, or use "
    "the baseline",
    "uninformative": "A constant answer is not measurably worse: check the labels, or measure on more "
    "rows with `data.validation=FILE`",
    "wrong_labels": "{issues} of {checked} labels are probably wrong: correct the rows in "
    "`label_issues.jsonl`{leave_out}",
    "reader_base": ANSWERING_BASES,
}


@dataclass(frozen=True)
class Refit:
    """A second training from the base on all rows. The weights of the refit are stored."""

    rows: int
    """Number of training rows."""
    held_out: int
    """Number of training rows held out from the first training."""
    steps: int
    """Number of steps of the second training; 0 if the logistic regression was fitted again."""


@dataclass(frozen=True)
class RunVerdict:
    """The verdict on a run: outcome, text, advice and measurements."""

    outcome: Outcome
    text: str
    """One or two sentences: the outcome with the measurements, and the stored weights."""
    cause: Cause
    """Probable cause of a result that could be better; empty for a good result."""
    advice: str
    """One sentence of advice for the next run; empty without a cause."""
    kept_step: int
    """Step of the stored weights, or of the passes that a refit repeats; 0 is before training."""
    stopped_early: bool
    """True if the patience ended the run before the last step."""
    before: dict[str, float]
    """Validation measurement before training: ``loss`` or ``reward``, and scores."""
    kept: dict[str, float]
    """Validation measurement of the kept step."""
    last: dict[str, float]
    """Validation measurement after the last step."""
    learned: bool = True
    """True if the model is better than before training and better than a constant answer. If not,
    the run skips the refit."""
    unchanged: bool = False
    """True if the stored weights are the weights from before training."""


def judge_run(
    lines: Sequence[Mapping[str, Any]],
    measure: str,
    training: Training,
    steps: int,
    rows: int = 0,
    steps_per_pass: float = 0,
    fitted_head: bool = False,
    uninformative: bool = False,
    informed: str = "",
    other_base: str = "",
    refit: Refit | None = None,
    new_head: bool = False,
    label_issues: LabelIssueCounts | None = None,
    learns_issues: bool = True,
) -> RunVerdict:
    """Return the verdict on a run.

    Args:
        lines: lines of the metrics file, in order.
        measure: validation measure that decides: ``loss``, ``reward`` or a score.
        training: training settings.
        steps: planned number of steps.
        rows: number of validation rows; 0 if unknown.
        steps_per_pass: steps per epoch; 0 if unknown.
        fitted_head: whether the head started from logistic regression. The first measurement is
            then the regression, and an equal result is no failure.
        uninformative: whether a constant answer is not measurably worse than the model.
        informed: name of a baseline that does learn from the rows; empty without.
        other_base: advice for another base model, if the base does not know the language of the
            rows.
        refit: the second training on all rows, if the stored weights come from a refit.
        new_head: whether the head started from random weights.
        label_issues: counts of the label check, if the labels were checked.
        learns_issues: whether the rows with a label issue were learned as they are.
    """
    train = [line for line in lines if line["event"] == "train"]
    held = [line for line in lines if line["event"] == "validation"]
    last_step = train[-1]["step"] if train else 0
    early = last_step < steps
    if not held:
        text, advice = "Not measured: no validation rows", _ADVICE["unmeasured"]
        learned = last_step > 0
        return RunVerdict(
            "unmeasured", text, "unmeasured", advice, last_step, early, {}, {}, {}, learned
        )
    asked, measure = measure, deciding_measure(held, measure)
    # An error rate of at least 100 % throughout: the loss may fall, but nothing is right.
    unread = asked != measure
    course = _Course(train, held, measure, rows, last_step > steps_per_pass)
    by_course, kept = course.outcome(), course.kept["step"]
    outcome: Outcome = "hardly_learned" if unread and by_course != "worse" else by_course
    failed = outcome in ("hardly_learned", "worse")
    few = 0 < rows < (FEW_ROWS if f"{measure}_error" in course.kept else FEW_LOSSES)
    start = "the initial logistic regression" if fitted_head else "before training"
    is_perfect = measure in SCORES and not cost_of(course.first, measure)
    is_perfect = is_perfect and outcome == "hardly_learned"

    headline, cause = _HEADLINES[outcome].format(step=kept), course.cause(by_course, training)
    if unread and by_course == "learned":
        cause = "more_steps"
    if not train:
        headline = "Fitted without training steps"
    elif is_perfect:
        headline, cause = f"As good as {start}: all held-out rows are right", ""
    elif fitted_head and failed:
        headline, cause = f"Not measurably better than {start}", "regression"
    elif few and outcome == "hardly_learned" and kept > 0 and not unread:
        headline = "Better, but on too few held-out rows to be sure"
        if course.gain <= 0:
            headline = "Not distinguishable from before training on so few held-out rows"
    if few:
        cause = "few_rows"  # the cause of a rough measurement is unknown
    elif uninformative and outcome not in ("still_improving", "worse"):
        cause = "base_model" if informed else "uninformative"
        # Blame the labels only if the training loss fell; otherwise the rows were not learned.
        if not fitted_head and not course.training_learned():
            cause = "rate_high" if course.training_rose() else "rows_not_learned"
    is_good = outcome in ("learned", "still_improving") or is_perfect
    wrong = label_issues is not None and label_issues.issues >= MANY_ISSUES * label_issues.rows
    if wrong and not is_good and cause not in ("rate_high", "rows_not_learned", "base_model"):
        cause = "wrong_labels"
    if measure == "span_f1" and new_head and course.kept[measure] < LOW_F1 and not few:
        cause = "reader_base"

    sentences = [f"{headline}: {course.describe(rows if few else 0, start, early and bool(train))}"]
    if refit is not None and not refit.steps:
        sentences.append(f"The stored fit is of all {refit.rows:,} rows, which was not measured")
    elif refit is not None:
        sentences.append(
            f"The stored weights come from a refit of {refit.steps:,} steps on all {refit.rows:,} "
            "rows, which was not measured"
        )
    elif kept == 0:
        fit = "logistic regression" if train else "fit"
        stored = f"The {fit} is" if fitted_head else "The weights from before training are"
        sentences.append(f"{stored} stored")
    elif kept != last_step:
        sentences.append(f"The weights of step {kept} are stored")
    other_base = other_base[:1].lower() + other_base[1:].rstrip(".") or "try another, `--base ID`"
    advice = _ADVICE[cause].format(
        **course.settings(training),
        informed=informed,
        other_base=other_base,
        issues=f"{label_issues.issues:,}" if label_issues else "",
        checked=f"{label_issues.rows:,}" if label_issues else "",
        leave_out=", or try `data.label_issues=leave_out`" if learns_issues else "",
    )
    # A few held-out rows do not show a gain that the training loss shows.
    gained = fitted_head or not failed or (0 < rows < FEW_ROWS and course.training_learned())
    first, best, last = (_values(x, measure) for x in (course.first, course.kept, course.last))
    return RunVerdict(
        "learned" if is_perfect and fitted_head else outcome,
        ". ".join(sentences),
        cause,
        advice[:1].upper() + advice[1:],
        kept,
        early and bool(train),
        first,
        best,
        last,
        learned=(kept > 0 or not train) and gained and not uninformative and not unread,
        unchanged=kept == 0 and not fitted_head,
    )


class _Course:
    """The measurements of a run, compared by :func:`~luthier.engine.metrics.cost_of`."""

    def __init__(
        self,
        train: Sequence[Mapping[str, Any]],
        held: Sequence[Mapping[str, Any]],
        measure: str,
        rows: int,
        repeats: bool,
    ) -> None:
        """Create the course. ``repeats`` states whether training rows were used more than once."""
        self.train, self.held, self.measure = train, held, measure
        self.rows, self.repeats = rows, repeats
        self.first, self.last = held[0], held[-1]
        self.kept = best_measurement(held, measure)
        self.gain = self._cost(self.first) - self._cost(self.kept)

    def outcome(self) -> Outcome:
        """Return the outcome."""
        if not self.train:  # fitted without steps
            return "learned"
        if self.gain <= self._least(self.kept):
            harmed = self.kept is self.first and self._is_above_start(self.last)
            return "worse" if harmed else "hardly_learned"
        lost = self._cost(self.last) - self._cost(self.kept)
        if lost > self._noise(self.kept, self.last):
            # Overfitting requires repeated rows and a training loss that does not rise too.
            apart = self.repeats and self.measure != "reward" and self._training_moved() <= 0
            return "overfitted" if apart else "declined"
        part = LAST_PART * self.last["step"]
        between = [line for line in self.held[:-1] if line["step"] > 0]
        if self.kept is self.last and between:
            earlier = min(between, key=lambda line: abs(line["step"] - part))
            if self._cost(earlier) - self._cost(self.last) > self._noise(earlier, self.last):
                return "still_improving"
        return "learned"

    def cause(self, outcome: Outcome, training: Training) -> Cause:
        """Return the probable cause of the outcome."""
        if outcome == "learned":
            return ""
        if outcome == "still_improving":
            return "more_steps"
        if self.measure == "reward":
            return "reward" if outcome == "hardly_learned" else "reward_fell"
        if outcome == "declined":
            return "unsteady" if self._training_moved() <= 0 else "rate_high"
        if outcome == "overfitted":
            return "overfitting"
        if self.training_rose():
            return "rate_high"
        if len(self.train) < FEWEST_STEPS:
            return "few_steps"
        if self._training_moved() < 0:
            return "other_rows"
        if any(map(self._is_above_start, self.held)) or _has_risen(self.held):
            return "rate_high"
        if training.max_steps is not None and self.kept is self.last:
            return "more_steps"
        return "rate_low"

    def describe(self, few_rows: int, start: str, early: bool) -> str:
        """Return the measurements in words; ``few_rows`` is the number of rows if rough, else 0."""
        measure = SCORES.get(self.measure, self.measure)
        rows = f" on only {few_rows} row{'s' * (few_rows != 1)}" if few_rows else ""
        fit = "regression" if self.train else "fit"
        before = "before training" if start == "before training" else f"of the {fit}"
        text = f"validation {measure}{rows} {self._scores(self.first)} {before}"
        if self.kept is not self.first:
            text += f", {self._scores(self.kept)} at step {self.kept['step']}"
            valid = [
                line
                for line in self.held
                if self.measure != "loss" or not is_hollow(line, self.first)
            ]
            best = min(valid, key=self._cost)
            notes = ["stored"] if self.last is not self.kept else []
            if self._cost(best) < self._cost(self.kept):
                notes.append(f"within chance of {best[self.measure]:.4f} at step {best['step']}")
            text += f" ({'; '.join(notes)})" if notes else ""
        if self.last is not self.kept:
            text += f", {self._scores(self.last)} at step {self.last['step']}"
            if self.measure == "loss" and is_hollow(self.last, self.first):
                chance = "chance_loss" in self.last
                text += " (chance level)" if chance else " (with fewer right rows)"
        return f"{text}, stopped early" if early else text

    def settings(self, training: Training) -> dict[str, Any]:
        """Return the values for the placeholders in the advice."""
        first, last = _ends(self.train) if self.train else (0.0, 0.0)
        done = self.train[-1]["step"] if self.train else 0
        by_steps = training.max_steps is not None or not training.epochs
        name = "max_steps" if by_steps else "epochs"
        length = done if by_steps else training.epochs or 1
        seconds = math.fsum(line.get("seconds", 0.0) for line in self.train)
        is_small = training.batch_size is not None and training.batch_size < SMALL_BATCH
        return {
            "steps": len(self.train),
            "first": first,
            "last": last,
            "lower": _rate(training, 1 / 4),
            "higher": _rate(training, 4),
            "longer": f"`training.{name}={2 * length:g}` takes {format_duration(seconds)} more",
            "times_four": f"`training.{name}={4 * length:g}`",
            "batch": f", `training.batch_size={SMALL_BATCH}`" if is_small else "",
        }

    def training_learned(self) -> bool:
        """Return true if the training loss clearly fell."""
        first, last = _ends(self.train)
        return first - last > LEARNED * abs(first)

    def training_rose(self) -> bool:
        """Return true if the training loss ended clearly above the start."""
        return _has_risen(self.train)

    def _cost(self, line: Mapping[str, Any]) -> float:
        return cost_of(line, self.measure)

    def _least(self, line: Mapping[str, Any]) -> float:
        """Return the minimum significant difference from the first measurement."""
        # The best of eight equal measurements lies 1.4 standard errors above their mean; CHANCE is
        # 2 (docs/log/defaults.md).
        return max(LEAST_GAIN * abs(self._cost(self.first)), self._chance(self.first, line))

    def _noise(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        """Return the minimum significant difference between two measurements of a run with a gain."""
        few = self.measure == "loss" and 0 < self.rows < FEW_LOSSES
        # A loss of few rows has no known error.
        least = LEAST_GAIN * abs(self._cost(self.first)) if few else 0.0
        return max(LEAST_CHANGE * self.gain, self._chance(one, other), least)

    def _chance(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        return chance_between(one, other, self.measure)

    def _is_above_start(self, line: Mapping[str, Any]) -> bool:
        return self._cost(line) - self._cost(self.first) > self._least(line)

    def _training_moved(self) -> int:
        """Return the direction of the training loss after the best step: 1 up, -1 down, 0 flat."""
        losses = [line["loss"] for line in self.train]
        # Means of a quarter of the steps, because the loss of one step varies with its rows.
        part = max(1, len(losses) // 4)
        upto = self.kept["step"] or part
        moved = statistics.fmean(losses[-part:]) - statistics.fmean(losses[:upto][-part:])
        least = LEAST_GAIN * abs(statistics.fmean(losses[:part]))
        return (moved > least) - (moved < -least)

    def _scores(self, line: Mapping[str, Any]) -> str:
        beside = additional_metrics(self.measure)
        texts = [f"{text} {line[name]:.3f}" for name, text in beside.items() if name in line]
        value = f"{line[self.measure]:.4f}"
        if error := line.get(f"{self.measure}_error", 0.0):
            value += f" ± {error:.3f}"
        return f"{value} ({', '.join(texts)})" if texts else value


def _rate(training: Training, times: float) -> str:
    return f"`training.learning_rate={(training.learning_rate or 0.0) * times:.1e}`"


def _ends(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the mean loss of at most three first lines, and of the last quarter."""
    losses = [line["loss"] for line in lines]
    part = max(1, len(losses) // 4)
    return statistics.fmean(losses[: min(part, 3)]), statistics.fmean(losses[-part:])


def _has_risen(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Return true if the loss of ``lines`` ended clearly above the start."""
    first, last = _ends(lines)
    return last > first + RISEN * abs(first)


def _values(line: Mapping[str, Any], measure: str) -> dict[str, float]:
    """Return the measured values without bookkeeping fields."""
    return {name: line[name] for name in (measure, *additional_metrics(measure)) if name in line}
