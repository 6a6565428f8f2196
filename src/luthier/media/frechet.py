"""The Fréchet distance of two sets of features, by the normal distributions that fit them best.

Heusel et al. 2017 (arXiv:1706.08500, equation 6): of made and real images in the features of a
classifier it is near 0 where both are alike in their means and in how they vary, so it sees both images
that are unlike any real one and kinds of images that are never made. What is called FID takes an
Inception network that was trained on ImageNet, and some 50,000 images. With other features, or another
number of images, figures are other figures: compare those of one classifier and one number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def frechet_distance(one_ND: NDArray[Any], other_ND: NDArray[Any]) -> float:
    """``|m - n|^2 + tr(S + T - 2 (S T)^(1/2))`` of the means and covariances of both sets.

    Raises:
        ValueError: where a set has fewer than two rows, or numbers that are not finite.
    """
    sets = [np.asarray(each, np.float64) for each in (one_ND, other_ND)]
    if any(len(each_ND) < 2 or not np.isfinite(each_ND).all() for each_ND in sets):
        raise ValueError("a distance of distributions needs two finite rows of each at least")
    one_D, other_D = (each_ND.mean(0) for each_ND in sets)
    one_DD, other_DD = (np.atleast_2d(np.cov(each_ND, rowvar=False)) for each_ND in sets)
    # S^(1/2) T S^(1/2) has the eigenvalues of S T and is symmetric, so none of them is complex.
    values_D, vectors_DD = np.linalg.eigh(one_DD)
    root_DD = (vectors_DD * np.sqrt(values_D.clip(0))) @ vectors_DD.T
    crossed_D = np.linalg.eigvalsh(root_DD @ other_DD @ root_DD).clip(0)
    apart = np.square(one_D - other_D).sum() + np.trace(one_DD) + np.trace(other_DD)
    return max(0.0, float(apart - 2 * np.sqrt(crossed_D).sum()))
