"""How far scores of held-out rows may be from the truth by chance, alone and beside each other.

Two models that are measured on the same rows agree on most of them, so the difference of their scores
is known better than either score: its error comes from the rows on which they differ (McNemar 1947).
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
"""Standard errors by which scores must differ to say anything: 95 % of what chance does is less."""
RESAMPLES = 400
"""Of the rows, of which the error of a :class:`Statistic` is known to 4 %."""
MOST_DRAWN = 40_000_000
"""Rows that are drawn for one error at most; 50 resamples are always taken."""

LESS_IS_BETTER = frozenset(
    {"mean_absolute_error", "cer", "perplexity", "loss", "gap in nats", "share of hostile endings"}
)
"""Errors among the scores that models are compared by."""

Interval = tuple[float, float]
"""Between which a score lies with 95 % confidence."""


def perplexity_of(nats: float) -> float:
    """The perplexity of a loss in nats a token; one that no float could hold is cut at e**700."""
    return math.exp(min(nats, 700.0))


@dataclass(frozen=True, eq=False)
class RowScores:
    """A score as the sum of a part of each row over the sum of a whole of each row.

    An accuracy has 1 or 0 over 1; an F1 the entities that are right over the mean of those given and
    wanted (it is no mean over rows); a mean error the error over 1.
    """

    parts_R: NDArray[np.float64]
    wholes_R: NDArray[np.float64]
    is_share: bool = True
    """Whether the score goes from 0 to 1."""

    @staticmethod
    def of(parts: ArrayLike, wholes: ArrayLike | None = None, is_share: bool = True) -> RowScores:
        """Of sequences of numbers; each whole is 1 when not given."""
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
        """From what :meth:`plain` gave."""
        return RowScores.of(plain["parts"], plain.get("wholes"), plain.get("is_share", True))

    def plain(self) -> dict[str, Any]:
        """For JSON, without what goes without saying."""
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

    def take(self, row_K: NDArray[np.int64]) -> RowScores:
        """Of some of the rows, by their numbers."""
        return RowScores(self.parts_R[row_K], self.wholes_R[row_K], self.is_share)

    @property
    def interval(self) -> Interval:
        """Where the score lies with 95 % confidence; of a share around one of four further rows."""
        return _interval(self._with((1, 1, 0, 0)).value, self.error, self.is_share)

    @property
    def error(self) -> float:
        """Standard error of the score.

        Of a share, two rows that are right and two that are wrong are added (Agresti and Coull 1998):
        16 of 16 are no certainty.
        """
        return _error(self._with((1, 1, 0, 0))._influence())

    def difference_error(self, other: RowScores) -> float:
        """Standard error of the difference to another score of the same rows.

        Of shares, one row that only this one and one that only the other has right are added (Bonett
        and Price 2012).
        """
        one_R, other_R = self._with((1, 0))._influence(), other._with((0, 1))._influence()
        return _error(one_R - other_R)

    def _with(self, right: Sequence[int]) -> RowScores:
        """With rows of whole 1 that are right or wrong."""
        if not self.is_share:
            return self
        wholes = np.ones(len(right))
        return RowScores(np.r_[self.parts_R, right], np.r_[self.wholes_R, wholes])

    def _influence(self) -> NDArray[np.float64]:
        """By how much each row moves the score, times the number of rows (the delta method)."""
        mean = float(self.wholes_R.mean()) or 1.0
        influence_R: NDArray[np.float64] = (self.parts_R - self.value * self.wholes_R) / mean
        return influence_R


@dataclass(frozen=True, eq=False)
class Statistic:
    """A score that is no ratio of sums over rows: macro-F1, a correlation, the area under a curve.

    Its error is that of the bootstrap (Efron 1979): how far scores of as many rows spread that are
    drawn from these with repetition. Twice it to both sides holds the truth less often than
    95 % where there are few rows of a class (docs/log/evaluation.md).
    """

    measure: Callable[[NDArray[np.int64]], float]
    """The score of rows by their numbers ``[K]``, which may repeat; nan where it has none."""
    row_R: NDArray[np.int64]
    """The rows that are scored."""
    is_share: bool = True
    """Whether the score goes from 0 to 1."""

    @staticmethod
    def of(
        measure: Callable[[NDArray[np.int64]], float], rows: int, is_share: bool = True
    ) -> Statistic:
        """Of all rows, so many."""
        return Statistic(measure, np.arange(rows), is_share)

    def __len__(self) -> int:
        return len(self.row_R)

    def take(self, row_K: NDArray[np.int64]) -> Statistic:
        """Of some of the rows, by their places among these."""
        return Statistic(self.measure, self.row_R[row_K], self.is_share)

    @cached_property
    def value(self) -> float:
        """The score."""
        return self.measure(self.row_R)

    @cached_property
    def error(self) -> float:
        """Standard error of the score; the same for the same rows.

        A share that no draw moves (all rows are right) has that of an accuracy of as many rows.
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
        """Where the score lies with 95 % confidence."""
        return _interval(self.value, self.error, self.is_share)


Score = RowScores | Statistic
"""A score of rows that knows its error, and itself of a part of the rows."""


def as_gain(measure: str, value: float) -> float:
    """A score, or a difference of two, as something to be high: minus it where less is better."""
    return 0.0 - value if measure in LESS_IS_BETTER else value


def values(scores: Mapping[str, Score]) -> dict[str, float]:
    """The bare numbers."""
    return {name: score.value for name, score in scores.items()}


@dataclass(frozen=True)
class Difference:
    """How far a score is from a reference's on the same rows."""

    value: float
    """Less the reference's."""
    error: float
    p_value: float
    """Of a difference that large by chance, to either side."""
    significant: bool
    """Whether it is more than chance, all that are compared considered."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "difference": self.value, "error": self.error, "p_value": self.p_value,
            "significant": self.significant,
        }  # fmt: skip


def differences(
    reference: RowScores, others: Mapping[str, RowScores], level: float = 0.05
) -> dict[str, Difference]:
    """How others differ from ``reference``, as :func:`paired_differences`."""
    return paired_differences({name: (reference, each) for name, each in others.items()}, level)


def paired_differences(
    pairs: Mapping[str, tuple[RowScores, RowScores]], level: float = 0.05
) -> dict[str, Difference]:
    """How the second of each pair differs from the first on the same rows, row by row (McNemar 1947,
    where scores are shares).

    With the correction of Holm 1979: the chance that any of them is called significant where none is
    stays at ``level``, however many they are.
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
    """Which of several findings are more than chance, all of them considered (Holm 1979).

    The chance that any is called significant where none is stays at ``level``.
    """
    significant = [False] * len(p_values)
    for place, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[number] > level / (len(p_values) - place):
            break
        significant[number] = True
    return significant


def _interval(middle: float, error: float, is_share: bool) -> Interval:
    low, high = middle - CHANCE * error, middle + CHANCE * error
    return (max(0.0, low), min(1.0, high)) if is_share else (low, high)


def _error(influence_R: NDArray[np.float64]) -> float:
    return math.sqrt(float((influence_R**2).sum())) / len(influence_R)


def standard_error(share: float, rows: int) -> float:
    """Standard error of a share of ``rows`` that are answered right, as :attr:`RowScores.error`."""
    share = (share * rows + 2) / (rows + 4)
    return math.sqrt(share * (1 - share) / (rows + 4))


def differ(share: float, other: float, rows: int) -> bool:
    """Whether two shares, of other rows each, are further apart than by chance."""
    error = math.hypot(standard_error(share, rows), standard_error(other, rows))
    return abs(share - other) >= CHANCE * error
