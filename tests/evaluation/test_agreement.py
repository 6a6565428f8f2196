"""Krippendorff's alpha against the example of the author."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.evaluation.agreement import alpha_of

EXAMPLE = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)
"""Ratings of four raters; a dot is a missing rating (Krippendorff 2011, example C)."""


@pytest.mark.parametrize(("ordinal", "published"), [(False, 0.743), (True, 0.815)])
def test_alpha_is_the_published_value(ordinal: bool, published: float) -> None:
    columns = zip(*(line.split() for line in EXAMPLE), strict=True)
    units = [[int(value) for value in column if value != "."] for column in columns]
    found = alpha_of(units, ordinal=ordinal)
    assert found is not None
    alpha, low, high = found
    assert alpha == pytest.approx(published, abs=0.001)
    assert low < alpha < high <= 1


def test_alpha_of_chance_is_zero_and_of_equal_values_missing() -> None:
    random = np.random.default_rng(0)
    found = alpha_of(random.integers(0, 2, (500, 2)).tolist())
    assert found is not None and found[1] < 0 < found[2]
    assert alpha_of([["spam", "spam"]] * 5) is None
    assert alpha_of([["spam"], []]) is None
