"""Estimate of a whole run from a few measured steps, with prediction intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.engine import checkpoints
from luthier.engine.metrics import Reporter
from luthier.engine.timings import PARTS, estimates_folder
from luthier.files import write_json
from luthier.formatting import format_duration
from luthier.models.manifest import created_now
from luthier.pages import Displayed
from luthier.recipe import Recipe
from luthier.workflows.estimate.trial import MeasuredTrial, measure

if TYPE_CHECKING:
    from luthier.workflows.estimate.budget import BreakEven, BudgetPlan, Cost

_T90 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)
"""Student's t for a two-sided interval of 90 %, for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class PredictionInterval:
    """A value with its prediction interval, 90 % by default."""

    value: float
    low: float
    high: float

    @staticmethod
    def exactly(value: float) -> PredictionInterval:
        """Return a known number."""
        return PredictionInterval(value, value, value)

    @staticmethod
    def around(value: float, below: float, above: float) -> PredictionInterval:
        """Return ``value`` with relative errors ``below`` and ``above``."""
        return PredictionInterval(value, value * (1 - below), value * (1 + above))

    def __add__(self, other: PredictionInterval) -> PredictionInterval:
        """Return the sum of two values with independent errors."""
        value = self.value + other.value
        below = math.hypot(self.value - self.low, other.value - other.low)
        above = math.hypot(self.high - self.value, other.high - other.value)
        return PredictionInterval(value, value - below, value + above)

    def times(self, factor: float) -> PredictionInterval:
        """Return value and interval multiplied by ``factor``."""
        return PredictionInterval(self.value * factor, self.low * factor, self.high * factor)

    def widen(self, below: float, above: float) -> PredictionInterval:
        """Return the value with additional independent relative errors ``below`` and ``above``."""
        return self + PredictionInterval(0.0, -below * self.value, above * self.value)


@dataclass(frozen=True)
class FittedLine:
    """Seconds of a step by tokens: a least-squares line through measured steps.

    Intercept and slope are not negative: a step that gets faster with more tokens is noise.
    """

    intercept: float
    slope: float
    noise: float
    """Standard deviation of a step around the line."""
    points: int
    mean: float
    spread: float
    """Sum of squared distances of the points' tokens from their mean."""

    @staticmethod
    def through(tokens: Sequence[float], seconds: Sequence[float]) -> FittedLine:
        """Fit at least one point; equal token counts give the mean."""
        x, y = np.array(tokens, dtype=float), np.array(seconds, dtype=float)
        mean, spread = float(x.mean()), float(((x - x.mean()) ** 2).sum())
        slope = float(((x - mean) * (y - y.mean())).sum() / spread) if spread else 0.0
        # Less than a tenth of the tokens apart, noise decides the slope: time goes with tokens then.
        if mean and math.sqrt(spread / len(x)) < 0.1 * mean:
            slope = float(y.mean()) / mean
        slope = max(0.0, slope)
        intercept = float(y.mean()) - slope * mean
        if intercept < 0:
            intercept, slope = 0.0, float((x * y).sum() / (x * x).sum())
        residuals = y - intercept - slope * x
        freedom = max(1, len(x) - 2)
        noise = (
            math.sqrt(float((residuals**2).sum()) / freedom)
            if len(x) > 2
            else 0.1 * float(y.mean())
        )
        return FittedLine(intercept, slope, noise, len(x), mean, spread)

    def total(self, tokens: Sequence[float], steps: int) -> PredictionInterval:
        """Return the seconds of ``steps`` steps; ``tokens`` is a representative sample."""
        mean = float(np.mean(tokens))
        value = steps * (self.intercept + self.slope * mean)
        leverage = (mean - self.mean) ** 2 / self.spread if self.spread else 0.0
        of_mean = self.noise * math.sqrt(1 / self.points + leverage)
        error = math.hypot(steps * of_mean, self.noise * math.sqrt(steps))
        error *= _T90[min(max(1, self.points - 2), len(_T90)) - 1]
        return PredictionInterval(value, max(0.0, value - error), value + error)


SPEED_DRIFT = 0.1
"""Relative drift of a machine's speed, measured on a virtual machine (``docs/results.md``)."""
MEMORY_SLACK = 0.1
"""Relative growth of the peak after the first steps, by fragmentation of freed memory."""
SINGLE_ERROR = 0.1
"""Relative error of parts that are measured once."""
PER_STEP = 400
"""Bytes of a line of the metrics."""


@dataclass(frozen=True, repr=False)
class Estimate(Displayed):
    """Estimate of a job. Times in seconds, sizes in bytes."""

    key: str
    """Key of the request; see :func:`luthier.engine.timings.request_key`."""
    machine: str
    created: str
    base: str
    objective: str
    adaptation: str
    rows: int
    """Training examples."""
    steps: int
    """Optimizer steps without a refit; all further fields include a refit."""
    refit_steps: int
    """Maximum steps of a refit on all rows; 0 without a refit."""
    epochs: float
    tokens: PredictionInterval
    """Tokens of the rows of all steps; shared prefixes count in each row."""
    learned: PredictionInterval
    """Tokens with loss."""
    parts: dict[str, PredictionInterval]
    """Seconds of each part, by its name in ``luthier.engine.timings.PARTS``."""
    seconds: PredictionInterval
    """Seconds from the first check of the data to the stored and verified model."""
    memory: PredictionInterval
    """Largest resident size of the process."""
    disk: PredictionInterval
    """Checkpoints, the custom model, and the files of the run."""
    modelled_memory: int
    """Memory that the engine expects from the sizes, before loading."""
    tried: list[tuple[int, float]]
    """Distinct tokens and seconds of each measured step."""
    cost: Cost | None = None
    plan: BudgetPlan | None = None
    monthly: Sequence[BreakEven] = ()
    """Monthly cost compared with each endpoint of the price table."""
    warnings: Sequence[str] = ()
    """Settings that are probably mistakes."""

    def summary(self) -> list[str]:
        """Return time, memory and disk with 90 % intervals."""
        time, memory = self.seconds, self.memory
        return [
            f"{self.objective} with {self.adaptation} on {self.base}: {self.rows:,} rows, "
            f"{self.steps:,} steps",
            f"time {format_duration(time.value)} ({format_duration(time.low)} to "
            f"{format_duration(time.high)})",
            f"peak memory {memory.value / 1e9:.2f} GB ({memory.low / 1e9:.2f} to "
            f"{memory.high / 1e9:.2f} GB)",
            f"disk {self.disk.value / 1e6:,.0f} MB",
        ]

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @property
    def fixed_seconds(self) -> float:
        """Seconds of a run that do not grow with the steps."""
        changing = ("steps", "validation", "checkpoints", "ahead")
        return sum(part.value for name, part in self.parts.items() if name not in changing)


def estimate(recipe: Recipe, reporter: Reporter | None = None) -> Estimate:
    """Measure a trial of ``recipe`` and estimate the whole job.

    The estimate is stored in ``estimates/`` for the certificate of the run. All files of the trial
    are removed.

    Raises:
        RefusedInput: as :func:`luthier.engine.train.train`.
    """
    measured = measure(recipe, reporter or Reporter())
    result = estimate_from(measured)
    write_json(estimates_folder() / f"{result.key}.json", result.plain())
    return result


def estimate_from(measured: MeasuredTrial) -> Estimate:
    """Return the estimate of the whole run from the measurement of a trial."""
    job, work, trial = measured.job, measured.work, measured.trial
    training = job.recipe.training
    parts = _parts(measured)
    seconds = PredictionInterval.exactly(0.0)
    for part in parts.values():
        seconds += part
    steps_per_pass = job.rows / (training.batch_size or 1)
    tokens = PredictionInterval.exactly(work.tokens * trial.token_share)
    if trial.token_share < 0.999:  # generated replies have any length
        tokens = PredictionInterval(tokens.value, tokens.value * 0.7, float(work.tokens))
    tokens = _with_refit(tokens, job.refit_steps / work.steps)
    ratio = work.learned / max(1, work.tokens)
    return Estimate(
        key=measured.key,
        machine=measured.machine,
        created=created_now(),
        base=job.base.id,
        objective=job.data.objective.method,
        adaptation=job.recipe.adaptation.method,
        rows=job.rows,
        steps=work.steps,
        refit_steps=job.refit_steps,
        epochs=training.epochs or round(work.steps / steps_per_pass, 3),
        tokens=tokens,
        learned=tokens.times(ratio),
        parts=parts,
        seconds=seconds.widen(SPEED_DRIFT, SPEED_DRIFT),
        memory=_memory(measured),
        disk=_disk(measured, parts),
        modelled_memory=job.expected_memory,
        tried=[(trial.batches[each.batch].tokens, each.seconds) for each in trial.tries],
        warnings=job.unusual_settings,
    )


def _parts(measured: MeasuredTrial) -> dict[str, PredictionInterval]:
    once, trial = measured.seconds, measured.trial
    parts = {
        name: PredictionInterval.around(once[name], SINGLE_ERROR, SINGLE_ERROR) for name in PARTS
    }
    # Scales the tried rows to all rows: both have the average length.
    scale = measured.work.row_tokens / max(1, trial.row_tokens)
    parts["ahead"] = parts["ahead"].times(scale)
    parts["calibrate"] = parts["calibrate"].times(measured.calibration)
    parts["baselines"] = _baselines(measured)
    parts["steps"] = _steps(measured)
    parts["validation"] = PredictionInterval.around(
        _validation(measured), SINGLE_ERROR, SINGLE_ERROR
    )
    step_seconds = parts["steps"].value + parts["validation"].value
    writes = _checkpoints(step_seconds, measured.work.steps, once["checkpoints"])
    parts["checkpoints"] = PredictionInterval.around(
        writes * once["checkpoints"], SINGLE_ERROR, SINGLE_ERROR
    )
    if refit_steps := measured.job.refit_steps:
        for name in ("data", "load", "begin", "ahead", "calibrate"):
            parts[name] = _with_refit(parts[name], 1.0)
        for name in ("steps", "checkpoints"):
            parts[name] = _with_refit(parts[name], refit_steps / measured.work.steps)
    return parts


def _with_refit(once: PredictionInterval, share: float) -> PredictionInterval:
    """Return ``once`` plus ``share`` of it; a refit may stop earlier, so the lower end stays."""
    return PredictionInterval(once.value * (1 + share), once.low, once.high * (1 + share))


def _steps(measured: MeasuredTrial) -> PredictionInterval:
    """Return the seconds of warm steps by tokens, plus the first run of each micro-batch size."""
    trial = measured.trial
    # A slow machine may end the trial before any batch ran twice.
    warm = [each for each in trial.tries if not each.first] or trial.tries[1:] or trial.tries
    tokens = [trial.batches[each.batch].tokens for each in warm]
    line = FittedLine.through(tokens, [each.seconds for each in warm])
    total = line.total([step.tokens for step in measured.steps], measured.work.steps)
    return total + PredictionInterval.around(_new_sizes(measured), 0.5, 0.5)


def _new_sizes(measured: MeasuredTrial) -> float:
    """Return the seconds for creating matrix kernels of new sizes."""
    trial = measured.trial
    first = {each.batch: each.seconds for each in trial.tries if each.first}
    repeated = {each.batch: each.seconds for each in trial.tries if not each.first}
    tried_sizes = frozenset[int]().union(*(trial.batches[batch].sizes for batch in repeated))
    run_sizes = frozenset[int]().union(*(step.sizes for step in measured.steps))
    extra = sum(first[batch] - seconds for batch, seconds in repeated.items())
    return max(0.0, extra) * len(run_sizes) / len(tried_sizes) if tried_sizes else 0.0


def measurements(steps: int, every: int | None) -> int:
    """Return the number of validation measurements in ``steps``, including the first before
    training."""
    every = every or steps
    return 1 + steps // every + (steps % every > 0)


def _validation(measured: MeasuredTrial) -> float:
    trial, job = measured.trial, measured.job
    if not trial.held_tokens:
        return 0.0
    one = trial.held_seconds * measured.work.validation_tokens / trial.held_tokens
    return one * measurements(measured.work.steps, job.recipe.training.evaluate_every)


def _baselines(measured: MeasuredTrial) -> PredictionInterval:
    """Seconds to read the rows once, for the states of the base model, and as long again to fit."""
    trial, job = measured.trial, measured.job
    limit = job.recipe.training.baseline_seconds
    if not trial.held_tokens or not all(job.data.compared):
        return PredictionInterval.exactly(0.0)
    tokens = sum(len(example) for rows in job.data.compared for example in rows.examples)
    value = min(limit, 2 * trial.held_seconds * tokens / trial.held_tokens)
    return PredictionInterval(value, 0.0, limit)


def _checkpoints(seconds: float, steps: int, cost: float) -> int:
    """Return the number of checkpoints in ``seconds`` of steps, by the engine's rules."""
    each = seconds / max(1, steps)
    if not each:
        return 0
    # Checkpoints are written only between steps.
    latest, wait = checkpoints.FIRST_SECONDS, checkpoints.first_seconds(cost)
    first = min(math.ceil(latest / each), max(checkpoints.FIRST_STEP, math.ceil(wait / each)))
    apart = math.ceil(max(10.0, cost / checkpoints.SHARE_OF_TIME) / each)
    return 1 + (steps - first) // apart if steps >= first else 0


def _memory(measured: MeasuredTrial) -> PredictionInterval:
    trial = measured.trial
    # The peak of the trial contains the states of the tried rows already.
    remaining = measured.work.row_tokens / max(1, trial.row_tokens) - 1
    value = trial.peak_memory + trial.kept_memory * max(0.0, remaining)
    return PredictionInterval.around(value, MEMORY_SLACK / 2, MEMORY_SLACK)


def _disk(measured: MeasuredTrial, parts: Mapping[str, PredictionInterval]) -> PredictionInterval:
    trial = measured.trial
    scale = measured.work.row_tokens / max(1, trial.row_tokens)
    model = trial.model_bytes + trial.kept_disk * scale + trial.run_bytes
    model += PER_STEP * measured.work.steps
    trainings = 2 if measured.job.refit_steps else 1  # each has checkpoints until the run ends
    maximum = model + trainings * checkpoints.RETAINED * trial.checkpoint_bytes
    step_seconds = parts["steps"].value + parts["validation"].value
    writes = _checkpoints(step_seconds, measured.work.steps, measured.seconds["checkpoints"])
    value = model + trainings * min(checkpoints.RETAINED, writes) * trial.checkpoint_bytes
    return PredictionInterval(value, model, maximum)
