"""Verdicts on finished runs, from the measurements before and during training.

The best measurement determines the stored weights; among measurements equal within chance, the last
(:func:`~luthier.engine.metrics.best_measurement`). The first measurement precedes the first step. A
run that only does harm therefore keeps the initial weights.
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
    best_measurement,
    chance_between,
    cost_of,
    deciding_measure,
    is_hollow,
    metrics_beside,
)
from luthier.formatting import format_duration
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
SMALL_BATCH = 16
"""Batch size below which a larger batch is advised if nothing was learned."""
FEW_LOSSES = 10
"""Number of held-out rows below which a token-level loss is rough."""
_HEADLINES: Mapping[Outcome, str] = {
    "learned": "learned",
    "still_improving": "learned, and still improving at the end",
    "overfitted": "overfitted since step {step}",
    "declined": "worse again since step {step}",
    "hardly_learned": "hardly learned",
    "worse": "worse than before training",
}


@dataclass(frozen=True)
class _Start:
    """Wording for the measurement before the first step."""

    measured: str
    name: str
    stored: str
    """Sentence for stored weights from before the first step."""


_UNTRAINED = _Start(
    "before training",
    "before training",
    "The weights from before training are stored: this model answers as it did before",
)
_REGRESSION = _Start("of the regression", "the regression", "The regression is what is stored")


@dataclass(frozen=True)
class Refit:
    """A second training from the base on all rows. The weights of the refit are stored."""

    rows: int
    """Number of training rows."""
    held_out: int
    """Number of training rows held out from the first training."""
    steps: int
    """Number of steps of the second training."""

    @property
    def text(self) -> str:
        """Sentence about the origin of scores and weights."""
        return (
            f"The scores belong to a training without the {self.held_out:,} held-out rows. The stored "
            f"weights come from a second training of {self.steps:,} steps on all {self.rows:,} rows, "
            "which was not measured"
        )


@dataclass(frozen=True)
class RunVerdict:
    """The verdict on a run: outcome, text, advice and measurements."""

    outcome: Outcome
    text: str
    """The outcome with the measurements and the stored weights."""
    advice: str
    """Advice for the next run; empty without advice."""
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
    the run skips the refit. Defaults to true for results of older runs."""
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
    """
    train = [line for line in lines if line["event"] == "train"]
    held = [line for line in lines if line["event"] == "validation"]
    last_step = train[-1]["step"] if train else 0
    early = last_step < steps
    if not held:
        return RunVerdict(
            "unmeasured",
            "not measured: there were no validation rows, so nothing says whether the model does "
            "better on rows that it did not learn from",
            "Give rows to measure on: `data.validation=FILE`",
            last_step,
            early,
            {},
            {},
            {},
            learned=last_step > 0,
        )
    measure = deciding_measure(held, measure)
    start = _REGRESSION if fitted_head else _UNTRAINED
    course = _Course(train, held, measure, start, rows, last_step > steps_per_pass)
    outcome = course.outcome()
    kept = course.kept["step"]
    headline, advice = _HEADLINES[outcome], course.advice(outcome, training)
    few = 0 < rows < (FEW_ROWS if f"{measure}_error" in course.kept else FEW_LOSSES)
    if few and outcome == "hardly_learned" and course.gain > 0:
        # What to change is not known where nothing is known to be wrong.
        headline, advice = "better, on too few held-out rows to be sure", ""
    elif few and outcome == "hardly_learned" and kept > 0:
        headline, advice = "so few held-out rows do not tell it from the model before training", ""
    if fitted_head and outcome in ("hardly_learned", "worse"):
        headline = "not measurably better than the logistic regression that it started from"
        advice = "More rows, above all of the labels that it confuses, are likely to help most"
    if measure in SCORES and not cost_of(course.first, measure) and outcome == "hardly_learned":
        started = (
            "the logistic regression that it started from" if fitted_head else "before training"
        )
        headline, advice = f"as right as {started}", ""
    if uninformative and outcome not in ("still_improving", "worse"):
        advice = (
            "It is not measurably better than to answer every row alike, so nothing shows yet that the "
            "rows tell their answers: check what they are labelled with, or measure on more rows"
        )
        if not fitted_head and not course.training_learned():
            advice = course.advice_to_learn(training)
        elif informed:
            advice = (
                f"To answer every row alike is not measurably worse, yet {informed} tells the rows "
                "apart: it is the base model that does not know what they hold, such as their "
                "language. "
            )
            advice += other_base or "Try one that does: `--base ID`."
            advice += " With this base, the baseline is the better choice"
    kept_for = "stored" if refit is None else "the best"
    text = f"{headline.format(step=kept)}: {course.describe(early, last_step, kept_for)}"
    if few:
        held_out = "One held-out row gives" if rows == 1 else f"{rows} held-out rows give"
        text += f". {held_out} only a rough measurement"
        more = "Give more rows to measure on: `data.validation=FILE`"
        advice = f"{more}. {advice}" if advice else more
    gained = fitted_head or outcome not in ("hardly_learned", "worse")
    # So few rows would not show it.
    gained = gained or (0 < rows < FEW_ROWS and course.training_learned())
    learned = kept > 0 and gained and not uninformative
    if refit is not None:
        text += f". {refit.text}"
    elif fitted_head and kept == 0 and training.refit:
        text += ". It did not learn from the held-out rows: only a head that trained on is refitted"
    elif training.refit and not learned:
        alike = gained and uninformative
        why = "it answers every row alike as far as can be told" if alike else "nothing was learned"
        text += f". It was not trained once more on all rows: {why}"
    first, best, last = (_values(x, measure) for x in (course.first, course.kept, course.last))
    unchanged = kept == 0 and not fitted_head
    return RunVerdict(outcome, text, advice, kept, early, first, best, last, learned, unchanged)


class _Course:
    """The measurements of a run, compared by :func:`~luthier.engine.metrics.cost_of`."""

    def __init__(
        self,
        train: Sequence[Mapping[str, Any]],
        held: Sequence[Mapping[str, Any]],
        measure: str,
        start: _Start,
        rows: int,
        repeats: bool,
    ) -> None:
        """Create the course. ``repeats`` states whether training rows were used more than once."""
        self.train, self.held, self.measure, self.start = train, held, measure, start
        self.rows, self.repeats = rows, repeats
        self.first, self.last = held[0], held[-1]
        self.kept = best_measurement(held, measure)
        self.gain = self._cost(self.first) - self._cost(self.kept)

    def outcome(self) -> Outcome:
        """Return the outcome."""
        if self.gain <= self._least(self.kept):
            harmed = self.kept is self.first and self._above_start(self.last)
            return "worse" if harmed else "hardly_learned"
        lost = self._cost(self.last) - self._cost(self.kept)
        if lost > self._noise(self.kept, self.last):
            # It is overfitting where the training rows do not get worse with the others. Rows that
            # were seen once at most are not known by heart.
            apart = self.repeats and self.measure != "reward" and self._training_moved() <= 0
            return "overfitted" if apart else "declined"
        part = LAST_PART * self.last["step"]
        between = [line for line in self.held[:-1] if line["step"] > 0]
        if self.kept is self.last and between:
            earlier = min(between, key=lambda line: abs(line["step"] - part))
            gained = self._cost(earlier) - self._cost(self.last)
            if gained > self._noise(earlier, self.last):
                return "still_improving"
        return "learned"

    def describe(self, early: bool, last_step: int, kept_for: str) -> str:
        """Return a sentence with the measurements and the kept weights."""
        measure = SCORES.get(self.measure, self.measure)
        text = f"validation {measure} {self._scores(self.first)} {self.start.measured}"
        kept = self.kept["step"]
        if kept == 0:
            hollow = self.measure == "loss" and is_hollow(self.last, self.first)
            why = ", which is lower and yet no better: " if hollow else ""
            if hollow and "chance_loss" in self.last:
                why += "no partner would be told from another at a loss of "
                why += f"{self.last['chance_loss']:.3f}"
            elif hollow:
                why += "fewer rows are right"
            end = "where training stopped early" if early else "at the end"
            return (
                f"{text} and never better in {last_step} steps, {self._scores(self.last)} {end}"
                f"{why}. {self.start.stored}"
            )
        text += f", {self._scores(self.kept)} at step {kept}"
        sound = [
            line for line in self.held if self.measure != "loss" or not is_hollow(line, self.first)
        ]
        best = min(sound, key=self._cost)
        if self._cost(best) < self._cost(self.kept):  # of losses, those of few rows
            alike = "scores" if self.measure in SCORES else "losses of few rows"
            text += (
                f" (the {best[self.measure]:.4f} of step {best['step']} may be chance, and of {alike} "
                "that are alike the last one is taken)"
            )
        if kept == last_step:
            why = ", where training stopped early"
            if self._cost(self.kept):
                why += ": the last measurements were no better"
            return f"{text}{why if early else ''}"
        end = "where training stopped early" if early else "the last"
        worse = f", worse than {self.start.name}" if self._above_start(self.last) else ""
        lost = self._cost(self.last) - self._cost(self.kept)
        if 0 < lost <= self._few_rows_chance():
            share = lost / abs(self._cost(self.kept))
            worse += f"; of so few rows the difference of {share:.1%} is chance"
        return (
            f"{text}, whose weights are {kept_for}; {self._scores(self.last)} at step {last_step}, "
            f"{end}{worse}"
        )

    def advice(self, outcome: Outcome, training: Training) -> str:
        """Return advice for the next run."""
        lower = _rate(training, 1 / 4)
        too_high = f"The rate is too high: try {lower}, or let `luthier search` find one"
        if outcome == "learned":
            return ""
        if outcome == "still_improving":
            return f"More steps are likely to help: {self._twice(training)}"
        if self.measure == "reward":
            return self._reward_advice(outcome, lower)
        if outcome == "declined" and self._training_moved() <= 0:
            return (
                "No training row came twice, so this is not overfitting: a lower rate is steadier, try "
                f"{lower}, or give more rows"
            )
        if outcome == "declined":
            return f"The training loss rose too, so the rate is too high: try {lower}"
        if outcome == "overfitted":
            return (
                "The later steps only learned the training rows by heart: more rows help, or fewer "
                "passes, or fewer weights"
            )
        if self._risen(self.train):
            return too_high
        if len(self.train) < FEWEST_STEPS:
            return f"{len(self.train)} steps are too few to tell why: {self._twice(training)}"
        if self._training_moved() < 0:
            return (
                "The training loss fell, so the rows were learned, and what they teach does not help "
                "with the validation rows: check that both are of one kind, or give more rows"
            )
        harmed = any(self._above_start(line) for line in self.held)
        if harmed or self._risen(self.held):
            return too_high
        if training.max_steps is not None and self.kept is self.last:
            return f"The last step was the best, so more steps may help: {self._twice(training)}"
        return (
            "The model knew the data already, or rate or steps are too low: try "
            f"{_rate(training, 4)}, or run `luthier search`"
        )

    def training_learned(self) -> bool:
        """Return true if the training loss clearly fell."""
        first, last = _ends(self.train)
        return first - last > LEARNED * abs(first)

    def advice_to_learn(self, training: Training) -> str:
        """Return advice for a run with unlearned training rows."""
        first, last = _ends(self.train)
        moved = f"The training loss changed little, from {first:.3f} to {last:.3f}"
        if self._risen(self.train):
            lower = _rate(training, 1 / 4)
            moved = f"The training loss rose from {first:.3f} to {last:.3f}"
            return f"{moved}: the learning rate is too high. Try {lower}, or run `luthier search`"
        longer = f"`training.epochs={4 * (training.epochs or 1):g}`"
        if training.max_steps is not None or not training.epochs:
            longer = f"`training.max_steps={4 * self.train[-1]['step']}`"
        tries = [
            f"more steps, {longer}",
            _rate(training, 4),
        ]
        if training.batch_size is not None and training.batch_size < SMALL_BATCH:
            tries.append(f"`training.batch_size={SMALL_BATCH}` against noise")
        return (
            f"{moved}: the rows were not learned. Try {', '.join(tries)}, or search settings with "
            "`luthier search`"
        )

    def _reward_advice(self, outcome: Outcome, lower: str) -> str:
        look = "Read the sampled text with `luthier samples`"
        if outcome == "hardly_learned":
            return f"{look}. A finer grader, easier prompts or more steps may help"
        return f"{look}. A lower rate is more stable: try {lower}"

    def _twice(self, training: Training) -> str:
        """Return the setting for twice the steps, with the additional time."""
        longer = format_duration(math.fsum(line.get("seconds", 0.0) for line in self.train))
        setting = f"training.max_steps={2 * self.train[-1]['step']}"
        if training.max_steps is None and training.epochs:
            setting = f"training.epochs={2 * training.epochs:g}"
        return f"`{setting}` would take {longer} more than this run"

    def _cost(self, line: Mapping[str, Any]) -> float:
        return cost_of(line, self.measure)

    def _least(self, line: Mapping[str, Any]) -> float:
        """Return the minimum significant difference from the first measurement."""
        return max(LEAST_GAIN * abs(self._cost(self.first)), self._chance(self.first, line))

    def _noise(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        """Return the minimum significant difference between two measurements of a run with a gain."""
        least = LEAST_CHANGE * self.gain
        return max(least, self._chance(one, other), self._few_rows_chance())

    def _few_rows_chance(self) -> float:
        """Return the minimum significant difference of a loss of few rows, whose error is unknown;
        else 0."""
        few = self.measure == "loss" and 0 < self.rows < FEW_LOSSES
        return LEAST_GAIN * abs(self._cost(self.first)) if few else 0.0

    def _chance(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        return chance_between(one, other, self.measure)

    def _above_start(self, line: Mapping[str, Any]) -> bool:
        return self._cost(line) - self._cost(self.first) > self._least(line)

    def _training_moved(self) -> int:
        """Return the direction of the training loss after the best step: 1 up, -1 down, 0 flat."""
        losses = [line["loss"] for line in self.train]
        part = max(1, len(losses) // 4)
        upto = self.kept["step"] or part
        moved = statistics.fmean(losses[-part:]) - statistics.fmean(losses[:upto][-part:])
        least = LEAST_GAIN * abs(statistics.fmean(losses[:part]))
        return (moved > least) - (moved < -least)

    def _risen(self, lines: Sequence[Mapping[str, Any]]) -> bool:
        """Return true if a loss ended clearly above the start."""
        first, last = _ends(lines)
        return last > first + RISEN * abs(first)

    def _scores(self, line: Mapping[str, Any]) -> str:
        beside = metrics_beside(self.measure)
        texts = [f"{text} {line[name]:.3f}" for name, text in beside.items() if name in line]
        value = f"{line[self.measure]:.4f}"
        if error := line.get(f"{self.measure}_error", 0.0):
            value += f" ± {error:.3f}"
        return f"{value} ({', '.join(texts)})" if texts else value


def _rate(training: Training, times: float) -> str:
    """Return the setting for ``times`` the run's learning rate."""
    rate = training.learning_rate or 0.0
    return f"`training.learning_rate={rate * times:.1e}` (it was {rate:.1e})"


def _ends(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the mean loss of the first three lines at most, and of the last quarter."""
    losses = [line["loss"] for line in lines]
    part = max(1, len(losses) // 4)
    return statistics.fmean(losses[: min(part, 3)]), statistics.fmean(losses[-part:])


def _values(line: Mapping[str, Any], measure: str) -> dict[str, float]:
    """Return the measured values without bookkeeping fields."""
    return {name: line[name] for name in (measure, *metrics_beside(measure)) if name in line}
