"""The Fréchet distance against the paper's formula, with a matrix root taken by other means."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.media.objectives.generative import frechet_distance

RANDOM = np.random.default_rng(0)


def matrix_root(given_DD: np.ndarray) -> np.ndarray:
    """Compute the root by the iteration of Denman and Beavers (1976), without eigenvalues."""
    root_DD, inverse_DD = given_DD, np.eye(len(given_DD))
    for _ in range(40):
        root_DD, inverse_DD = (
            (root_DD + np.linalg.inv(inverse_DD)) / 2,
            (inverse_DD + np.linalg.inv(root_DD)) / 2,
        )
    assert np.allclose(root_DD @ root_DD, given_DD)
    return root_DD


def by_matrix_root(one_ND: np.ndarray, other_ND: np.ndarray) -> float:
    """Compute the distance by the paper's formula, with the root of the product of covariances."""
    one_DD, other_DD = np.cov(one_ND.T), np.cov(other_ND.T)
    apart = np.sum((one_ND.mean(0) - other_ND.mean(0)) ** 2)
    return float(apart + np.trace(one_DD + other_DD - 2 * matrix_root(one_DD @ other_DD)))


def test_frechet_distance_matches_paper_formula() -> None:
    mix_DD = RANDOM.normal(size=(6, 6))
    one_ND = RANDOM.normal(size=(200, 6)) @ mix_DD
    other_ND = RANDOM.normal(1.0, 2.0, (150, 6))
    expected = by_matrix_root(one_ND, other_ND)
    assert expected > 1
    assert frechet_distance(one_ND, other_ND) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_single_feature_matches_normal_formula() -> None:
    one_N, other_N = RANDOM.normal(3, 2, 500), RANDOM.normal(-1, 0.5, 400)
    expected = (one_N.mean() - other_N.mean()) ** 2 + (one_N.std(ddof=1) - other_N.std(ddof=1)) ** 2
    assert frechet_distance(one_N[:, None], other_N[:, None]) == pytest.approx(expected)


def test_frechet_distance_is_symmetric_and_0_for_equal_sets() -> None:
    one_ND, other_ND = RANDOM.normal(size=(30, 40)), RANDOM.normal(1, 1, (20, 40))  # of lower rank
    there, back = frechet_distance(one_ND, other_ND), frechet_distance(other_ND, one_ND)
    assert there == pytest.approx(back)
    assert frechet_distance(one_ND, one_ND) == pytest.approx(0, abs=1e-6 * there)


def test_frechet_distance_of_single_row_is_refused() -> None:
    with pytest.raises(ValueError):
        frechet_distance(np.ones((1, 2)), np.ones((3, 2)))
