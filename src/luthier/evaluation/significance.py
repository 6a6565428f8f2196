"""Standard errors of scores and of score differences on held-out rows.

Two models measured on the same rows agree on most rows. The difference of the scores is therefore
more precise than either score: its error comes only from rows with different results (McNemar
1947).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHANCE = 2.0
"""Minimum difference between scores in standard errors: 95 % of random differences are smaller."""
RESAMPLES = 400
"""Number of bootstrap resamples, for an error of a :class:`Statistic` that is precise to 4 %."""
MOST_DRAWN = 40_000_000
"""Maximum number of rows drawn for one error. The minimum is 50 resamples."""

LESS_IS_BETTER = frozenset(
    {
        "mean_absolute_error",
        "frechet_distance",
        "cer",
        "declined_wrongly",
        "perplexity",
        "pseudo_perplexity",
        "loss",
        "gap in nats",
        "share of hostile endings",
    }
)
"""Measures where lower is better."""

Interval = tuple[float, float]
"""Bounds of a 95 % confidence interval."""


def perplexity_of(nats: float) -> float:
    """Return the perplexity of a loss in nats per token, limited to e**700 to stay finite."""
    return math.exp(min(nats, 700.0))


@dataclass(frozen=True, eq=False)
class RowScores:
    """A score as a ratio of sums over rows: numerators over denominators.

    An accuracy has 1 or 0 over 1. An F1 has the correct entities over the mean of predicted and
    true entities, and is no mean over rows. A mean error has the error over 1.
    """

    parts_R: NDArray[np.float64]
    wholes_R: NDArray[np.float64]
    is_share: bool = True
    """True if the score ranges from 0 to 1."""

    @staticmethod
    def of(parts: ArrayLike, wholes: ArrayLike | None = None, is_share: bool = True) -> RowScores:
        """Create a score from sequences of numbers. The default denominators are 1."""
        parts_R = np.asarray(parts, dtype=np.float64)
        wholes_R = np.ones_like(parts_R) if wholes is None else np.asarray(wholes, dtype=np.float64)
        return RowScores(parts_R, wholes_R, is_share)

    @staticmethod
    def concatenate(pieces: Sequence[RowScores]) -> RowScores:
        """All rows of several."""
        parts, wholes = (
            [getattr(each, name) for each in pieces] for name in ("parts_R", "wholes_R")
        )
        return RowScores(np.concatenate(parts), np.concatenate(wholes), pieces[0].is_share)

    @staticmethod
    def read(plain: Mapping[str, Any]) -> RowScores:
        """Parse the result of :meth:`plain`."""
        return RowScores.of(plain["parts"], plain.get("wholes"), plain.get("is_share", True))

    def plain(self) -> dict[str, Any]:
        """Return the score for JSON, without defaults."""
        found: dict[str, Any] = {"parts": self.parts_R.tolist()}
        if (self.wholes_R != 1).any():
            found["wholes"] = self.wholes_R.tolist()
        return found if self.is_share else found | {"is_share": False}

    @property
    def value(self) -> float:
        """The score."""
        whole = float(self.wholes_R.sum())
        return float(self.parts_R.sum()) / whole if whole else 0.0

    def __len__(self) -> int:
        return len(self.parts_R)

    def subset(self, row_K: NDArray[np.int64]) -> RowScores:
        """Return the score of a subset of the rows, by index."""
        return RowScores(self.parts_R[row_K], self.wholes_R[row_K], self.is_share)

    @property
    def interval(self) -> Interval:
        """95 % confidence interval; for shares, centred on the score with four additional rows."""
        return _interval(self._with((1, 1, 0, 0)).value, self.error, self.is_share)

    @property
    def error(self) -> float:
        """Standard error of the score.

        For shares, two correct and two wrong rows are added (Agresti and Coull 1998): 16 of 16
        correct rows are no certainty.
        """
        return _error(self._with((1, 1, 0, 0))._influence())

    def difference_error(self, other: RowScores) -> float:
        """Return the standard error of the difference from another score of the same rows.

        For shares, two rows are added, each correct in one score only (Bonett and Price 2012).
        """
        one_R, other_R = self._with((1, 0))._influence(), other._with((0, 1))._influence()
        return _error(one_R - other_R)

    def _with(self, right: Sequence[int]) -> RowScores:
        """Return the score with additional rows of denominator 1."""
        if not self.is_share:
            return self
        wholes = np.ones(len(right))
        return RowScores(np.r_[self.parts_R, right], np.r_[self.wholes_R, wholes])

    def _influence(self) -> NDArray[np.float64]:
        """Influence of each row on the score, times the number of rows (delta method)."""
        mean = float(self.wholes_R.mean()) or 1.0
        influence_R: NDArray[np.float64] = (self.parts_R - self.value * self.wholes_R) / mean
        return influence_R


@dataclass(frozen=True, eq=False)
class Statistic:
    """A score that is no ratio of sums over rows: macro-F1, a correlation, the area under a curve.

    The standard error is the bootstrap's (Efron 1979): the spread over resampled rows. For classes
    with few rows, two standard errors cover the true value less often than 95 %
    (docs/log/evaluation.md).
    """

    measure: Callable[[NDArray[np.int64]], float]
    """Returns the score of rows ``[K]`` by index, with repetitions; nan without a score."""
    row_R: NDArray[np.int64]
    """Indices of the scored rows."""
    is_share: bool = True
    """True if the score ranges from 0 to 1."""

    @staticmethod
    def of(
        measure: Callable[[NDArray[np.int64]], float], rows: int, is_share: bool = True
    ) -> Statistic:
        """Create a statistic of ``rows`` rows."""
        return Statistic(measure, np.arange(rows), is_share)

    def __len__(self) -> int:
        return len(self.row_R)

    def subset(self, row_K: NDArray[np.int64]) -> Statistic:
        """Return the score of a subset of the rows, by position."""
        return Statistic(self.measure, self.row_R[row_K], self.is_share)

    @cached_property
    def value(self) -> float:
        """The score."""
        return self.measure(self.row_R)

    @cached_property
    def error(self) -> float:
        """Standard error of the score; deterministic.

        A share that no resample changes (all rows correct) has the standard error of an accuracy.
        """
        rows = len(self.row_R)
        count = max(50, min(RESAMPLES, MOST_DRAWN // max(1, rows)))
        draw = np.random.default_rng(0)
        drawn = [self.measure(self.row_R[draw.integers(rows, size=rows)]) for _ in range(count)]
        known = [score for score in drawn if not math.isnan(score)]
        error = float(np.std(known)) if known else math.nan
        return standard_error(self.value, rows) if error == 0 and self.is_share else error

    @property
    def interval(self) -> Interval:
        """95 % confidence interval."""
        return _interval(self.value, self.error, self.is_share)


Score = RowScores | Statistic
"""A score of rows with a standard error, which can be restricted to a subset of the rows."""


def as_gain(measure: str, value: float) -> float:
    """Return a score, or a difference, with the sign changed if lower is better."""
    return 0.0 - value if measure in LESS_IS_BETTER else value


def values(scores: Mapping[str, Score]) -> dict[str, float]:
    """The bare numbers."""
    return {name: score.value for name, score in scores.items()}


@dataclass(frozen=True)
class Difference:
    """Difference between a score and a reference score on the same rows."""

    value: float
    """Less the reference's."""
    error: float
    p_value: float
    """Two-sided p-value."""
    significant: bool
    """True if the difference is significant after correction for multiple comparisons."""

    def plain(self) -> dict[str, Any]:
        """Return the difference for JSON."""
        return {
            "difference": self.value, "error": self.error, "p_value": self.p_value,
            "significant": self.significant,
        }  # fmt: skip


def differences(
    reference: RowScores, others: Mapping[str, RowScores], level: float = 0.05
) -> dict[str, Difference]:
    """Compare scores with ``reference``, as :func:`paired_differences`."""
    return paired_differences({name: (reference, each) for name, each in others.items()}, level)


def paired_differences(
    pairs: Mapping[str, tuple[RowScores, RowScores]], level: float = 0.05
) -> dict[str, Difference]:
    """Compare the second score of each pair with the first, row by row (McNemar 1947 for shares).

    Holm's correction (1979) keeps the probability of any false significance at ``level``, for any
    number of pairs.
    """
    found = {}
    for name, (reference, scores) in pairs.items():
        value, error = scores.value - reference.value, scores.difference_error(reference)
        surprise = abs(value) / error if error else (math.inf if value else 0.0)
        found[name] = (value, error, 2 * (1 - NormalDist().cdf(surprise)))
    significant = significant_of([p_value for _, _, p_value in found.values()], level)
    return {
        name: Difference(*each, beyond_chance)
        for (name, each), beyond_chance in zip(found.items(), significant, strict=True)
    }


def significant_of(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Return the significant p-values after Holm's correction (1979).

    The probability of any false significance stays at ``level``.
    """
    significant = [False] * len(p_values)
    for place, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[number] > level / (len(p_values) - place):
            break
        significant[number] = True
    return significant


def welch_p_value(value: float, parts: Sequence[tuple[float, int]]) -> float:
    """Return the two-sided p-value of a difference; 1 without a known error.

    ``parts`` are independent standard errors with their degrees of freedom. The t statistic has the
    degrees of freedom of Welch and Satterthwaite, and becomes normal by Wallace's approximation
    (1959).
    """
    error = math.hypot(*(each for each, _ in parts))
    if not error:
        return 1.0
    freedom = error**4 / sum(each**4 / max(1, count) for each, count in parts)
    square = freedom * math.log1p((value / error) ** 2 / freedom)
    normal = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(square)
    return 2 * (1 - NormalDist().cdf(normal))


def _interval(middle: float, error: float, is_share: bool) -> Interval:
    low, high = middle - CHANCE * error, middle + CHANCE * error
    return (max(0.0, low), min(1.0, high)) if is_share else (low, high)


def _error(influence_R: NDArray[np.float64]) -> float:
    return math.sqrt(float((influence_R**2).sum())) / len(influence_R)


def standard_error(share: float, rows: int) -> float:
    """Return the standard error of a share of correct ``rows``, as :attr:`RowScores.error`."""
    share = (share * rows + 2) / (rows + 4)
    return math.sqrt(share * (1 - share) / (rows + 4))


def share_interval(right: int, rows: int) -> Interval:
    """Return the 95 % interval of a share of correct ``rows``, as :attr:`RowScores.interval`."""
    middle = (right + 2) / (rows + 4)
    return _interval(middle, standard_error(right / rows, rows), True)


def differ(share: float, other: float, rows: int) -> bool:
    """Return True if two shares of different rows differ beyond chance."""
    error = math.hypot(standard_error(share, rows), standard_error(other, rows))
    return abs(share - other) >= CHANCE * error
