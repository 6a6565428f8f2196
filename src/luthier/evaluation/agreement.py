"""Agreement of raters: Krippendorff's alpha, with a bootstrap interval.

The package ``krippendorff`` has a licence (GPL) that luthier cannot depend on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 500


def alpha_of(
    units: Sequence[Sequence[Any]], *, ordinal: bool = False
) -> tuple[float, float, float] | None:
    """Return Krippendorff's alpha of units with the values of several raters, and a 95 % interval.

    1 is perfect agreement, and 0 agreement by chance (Krippendorff, Computing Krippendorff's
    Alpha-Reliability, 2011). The interval resamples the units. None if all values are equal.

    Args:
        units: values of each unit; units with a single value do not count.
        ordinal: if the values have an order, as ratings. Otherwise, values are equal or different.
    """
    values = sorted({value for unit in units for value in unit})
    counts_UV = np.array([[unit.count(v) for v in values] for unit in map(list, units)], float)
    raters_U = counts_UV.sum(1) if len(units) else np.zeros(0)
    counts_UV, raters_U = counts_UV[raters_U > 1], raters_U[raters_U > 1]
    if not len(raters_U):
        return None
    pairs_UVV = (
        counts_UV[:, :, None] * counts_UV[:, None] - np.eye(len(values)) * counts_UV[:, None]
    )
    pairs_UVV /= (raters_U - 1)[:, None, None]
    alpha = _alpha(pairs_UVV.sum(0), ordinal)
    if alpha is None:
        return None
    random, number = np.random.default_rng(0), len(raters_U)
    weights_RU = random.multinomial(number, np.full(number, 1 / number), RESAMPLES)
    found = (_alpha(np.tensordot(weights, pairs_UVV, 1), ordinal) for weights in weights_RU)
    # A sample of equal values agrees perfectly.
    low, high = np.quantile([1.0 if each is None else each for each in found], (0.025, 0.975))
    return alpha, float(low), float(high)


def _alpha(pairs_VV: NDArray[np.float64], ordinal: bool) -> float | None:
    total_V = pairs_VV.sum(0)
    distance_VV = 1 - np.eye(len(total_V))
    if ordinal:
        middle_V = np.cumsum(total_V) - total_V / 2
        distance_VV = (middle_V[:, None] - middle_V) ** 2
    expected = total_V @ distance_VV @ total_V
    if not expected:
        return None
    return float(1 - (total_V.sum() - 1) * (pairs_VV * distance_VV).sum() / expected)
