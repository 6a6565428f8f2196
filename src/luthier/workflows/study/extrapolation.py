"""Effect of more rows: a power law through the costs of growing shares of the rows.

    cost(n) = floor + scale * n ** -exponent

with ``n`` training rows (POW3 of Viering and Loog 2023, "The Shape of Learning Curves",
arXiv:2103.10948). The interval of the gain comes from fits to 1,000 curves with noise as large as
the residuals and the standard errors. The interval is wide: in simulations 97 to 100 % of the
intervals contained the true gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.engine.metrics import SCORES
from luthier.evaluation.significance import as_gain

MIN_POINTS = 4
"""Three points fit any curve of three parameters."""
EXPONENTS = np.linspace(0.05, 2.0, 40)
RESAMPLES = 1000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CurvePoint:
    """A trained and measured number of rows."""

    rows: int
    cost: float
    """The loss, an error rate, or 1 less a score: see :func:`luthier.engine.metrics.cost_of`."""
    error: float = 0.0
    """Standard error of a score, by the held-out rows."""


@dataclass(frozen=True)
class MoreRows:
    """Predicted effect of twice the rows."""

    rows: int
    """Twice the rows of the last point."""
    measure: str
    """``loss``, ``reward`` or a score."""
    gain: float
    """Fall of the cost."""
    interval: tuple[float, float]
    """Interval of the gain, of 95 %."""

    @staticmethod
    def of(points: Sequence[CurvePoint], measure: str) -> MoreRows:
        """Return the prediction from at least :data:`MIN_POINTS` points, in order of the rows."""
        return MoreRows(2 * points[-1].rows, measure, *extrapolate(points))

    def verdict(self) -> str:
        """Return in a sentence the effect of more rows, which the curve's form makes positive."""
        verb = "raise" if as_gain(self.measure, 1.0) > 0 else "lower"
        low, high = self.interval
        return (
            f"Twice the rows ({self.rows:,}) of the same kind would {verb} "
            f"{SCORES.get(self.measure, self.measure)} by about {self.gain:.3f} ({low:.3f} to "
            f"{high:.3f}, by a power law)."
        )


def extrapolate(points: Sequence[CurvePoint]) -> tuple[float, tuple[float, float]]:
    """Return the fall of the cost with twice the rows of the last point, and the interval of the
    fall."""
    rows_P = np.array([point.rows for point in points], dtype=np.float64)
    cost_P = np.array([point.cost for point in points])
    fitted_BP, gain_B = _fit(rows_P, cost_P[None])
    draw, freedom = np.random.default_rng(0), len(points) - 3
    spread = float(np.sqrt(((cost_P - fitted_BP) ** 2).sum() / freedom))
    # The spread of few points is hardly known, so the noise has Student's distribution.
    spread_B = spread * np.sqrt(freedom / draw.chisquare(freedom, (RESAMPLES, 1)))
    error_P = np.array([point.error for point in points])
    noise_BP = np.hypot(spread_B, error_P) * draw.standard_normal((RESAMPLES, len(points)))
    low, high = np.quantile(_fit(rows_P, fitted_BP + noise_BP)[1], (0.025, 0.975))
    gain = float(gain_B[0])
    return gain, (min(gain, float(low)), max(gain, float(high)))


def _fit(rows_P: Array, cost_BP: Array) -> tuple[Array, Array]:
    """Fit the law by least squares over a grid of exponents; return fitted costs and gains."""
    x_CP = (rows_P / rows_P[-1]) ** -EXPONENTS[:, None]
    centred_CP = x_CP - x_CP.mean(1, keepdims=True)
    scale_BC = np.maximum(0.0, cost_BP @ centred_CP.T / (centred_CP**2).sum(1))
    fitted_BCP = cost_BP.mean(1)[:, None, None] + scale_BC[..., None] * centred_CP
    best_B = ((cost_BP[:, None] - fitted_BCP) ** 2).sum(-1).argmin(1)
    place_B = np.arange(len(cost_BP))
    return fitted_BCP[place_B, best_B], scale_BC[place_B, best_B] * (1 - 2 ** -EXPONENTS[best_B])
