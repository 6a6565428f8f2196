"""The Fréchet distance between two sets of features, under a normal distribution for each set.

Source: Heusel et al. 2017 (arXiv:1706.08500, equation 6). In the features of a classifier, the
    distance
between generated and real images is near 0 if means and covariances agree. The distance therefore
detects both unrealistic images and missing kinds of images. FID is the distance in an
    ImageNet-trained
Inception network with about 50,000 images. Compare distances only for one classifier and one number
    of
images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def frechet_distance(one_ND: NDArray[Any], other_ND: NDArray[Any]) -> float:
    """Return ``|m - n|^2 + tr(S + T - 2 (S T)^(1/2))`` for the means and covariances of both sets.

    Raises:
        ValueError: for a set with fewer than two rows or with numbers that are not finite.
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
