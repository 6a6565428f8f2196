"""A number that is not known exactly, and a line through a few measured points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_T90 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)
"""Student's t for a two-sided interval of 90 %, for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """A value between two others; unless something else is said, nine times out of ten."""

    value: float
    low: float
    high: float

    @staticmethod
    def exactly(value: float) -> Interval:
        """A number that is known."""
        return Interval(value, value, value)

    @staticmethod
    def around(value: float, below: float, above: float) -> Interval:
        """``value`` with room for a share of it ``below`` and ``above``."""
        return Interval(value, value * (1 - below), value * (1 + above))

    def __add__(self, other: Interval) -> Interval:
        """Sum of two numbers whose errors have nothing to do with each other."""
        value = self.value + other.value
        below = math.hypot(self.value - self.low, other.value - other.low)
        above = math.hypot(self.high - self.value, other.high - other.value)
        return Interval(value, value - below, value + above)

    def times(self, factor: float) -> Interval:
        """The same in another unit, or so many of it."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def widened(self, below: float, above: float) -> Interval:
        """The same with shares of the value added to its error, as errors of their own."""
        return self + Interval(0.0, -below * self.value, above * self.value)


@dataclass(frozen=True)
class Line:
    """Seconds of a step by its tokens: least squares through measured steps.

    Neither part is negative: a step that takes less the more tokens it has is noise.
    """

    intercept: float
    slope: float
    noise: float
    """Standard deviation of one step around the line."""
    points: int
    mean: float
    spread: float
    """Sum of squared distances of the points' tokens from their mean."""

    @staticmethod
    def through(tokens: Sequence[float], seconds: Sequence[float]) -> Line:
        """Fit at least one point; without a spread of tokens, the mean is all that is known."""
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
        left = y - intercept - slope * x
        freedom = max(1, len(x) - 2)
        noise = math.sqrt(float((left**2).sum()) / freedom) if len(x) > 2 else 0.1 * float(y.mean())
        return Line(intercept, slope, noise, len(x), mean, spread)

    def total(self, tokens: Sequence[float], steps: int) -> Interval:
        """Seconds of ``steps`` steps, of which ``tokens`` are a fair sample."""
        mean = float(np.mean(tokens))
        value = steps * (self.intercept + self.slope * mean)
        away = (mean - self.mean) ** 2 / self.spread if self.spread else 0.0
        of_mean = self.noise * math.sqrt(1 / self.points + away)
        error = math.hypot(steps * of_mean, self.noise * math.sqrt(steps))
        error *= _T90[min(max(1, self.points - 2), len(_T90)) - 1]
        return Interval(value, max(0.0, value - error), value + error)
