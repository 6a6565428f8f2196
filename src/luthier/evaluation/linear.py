"""Linear models on fixed features, fitted by scikit-learn: a *linear probe*.

Features are centred and divided by one common number. Directions in which texts differ little carry
little information, and a scale per feature is worse on the sets of ``docs/results.md``. The fits
are deterministic: equal rows give equal weights, on any number of threads.

Sparse rows of length 1 (TF-IDF) are neither centred nor divided.

Cross-validation selects the penalty of a logistic regression: with wrong labels, a small penalty
learns the wrong labels (``docs/log/defaults.md``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Candidate weights of half the squared norm compared with the mean loss of a row, for features of
variance 1. The largest is first, because each fit starts from the fit before."""
SPARSE_PENALTIES = (1.0, 0.1, 0.01)
"""The same compared with the total loss, for sparse rows of length 1: 1, 10 and 100 as scikit-learn's
``C``."""
FOLDS = 5
ENOUGH_ROWS = 2000
"""Number of held-out rows that select a penalty. More rows need fewer folds for them."""
ITERATIONS = 100
RIDGE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidate penalties per row of ridge regression, selected by leave-one-out error."""


@dataclass(frozen=True)
class LinearModel:
    """``scores = features @ weight.T + bias``."""

    weight_CH: Tensor
    bias_C: Tensor

    def scores(self, features_NH: Tensor) -> Tensor:
        """Return scores ``[N, C]``."""
        return features_NH @ self.weight_CH.T + self.bias_C


def fit_logistic(
    features_NH: Tensor,
    targets: Tensor,
    classes: int,
    penalty: float | None = None,
    bias: bool = True,
    weights: Sequence[float] = (),
) -> LinearModel:
    """Fit a logistic regression with an L2 penalty.

    Args:
        features_NH: float32, dense or sparse.
        targets: ``[N]`` classes, one per row, or ``[N, C]`` of 0 and 1 if a row may have several
            classes; then one binary regression is fitted per class.
        classes: number of classes, also of classes without rows.
        penalty: weight of half the squared norm of the weights compared with the mean loss of a
            row, or with the total loss for sparse features; selected by
            :func:`select_penalty` by default.
        bias: whether to fit a bias; otherwise the bias is 0.
        weights: weight of the rows of each class, if each row has one class; 1 by default.
    """
    if penalty is None:
        penalty = select_penalty(features_NH, targets, classes, bias, weights)
    return next(_fit_path(features_NH, targets, classes, [penalty], bias, weights))


def select_penalty(
    features_NH: Tensor,
    targets: Tensor,
    classes: int,
    bias: bool = True,
    weights: Sequence[float] = (),
) -> float:
    """Return the penalty of :data:`PENALTIES` or :data:`SPARSE_PENALTIES` with the least loss on
    held-out rows.

    The rows of each class are spread over :data:`FOLDS` folds, in order. Fewer rows than folds get
    the largest penalty. See :func:`fit_logistic` for the arguments.
    """
    import torch
    from torch.nn import functional as F

    rows = len(targets)
    penalties = SPARSE_PENALTIES if features_NH.is_sparse else PENALTIES
    if rows < FOLDS:
        return penalties[0]
    _, stratum_N = np.unique(targets.numpy(), axis=0, return_inverse=True)
    fold_N = torch.empty(rows, dtype=torch.long)
    fold_N[np.argsort(stratum_N, kind="stable")] = torch.arange(rows) % FOLDS
    loss_P = np.zeros(len(penalties))
    for fold in range(min(FOLDS, -(-ENOUGH_ROWS * FOLDS // rows))):
        # Sparse features support no masks.
        held_Q, rest_M = (fold_N == fold).nonzero()[:, 0], (fold_N != fold).nonzero()[:, 0]
        held, rest = targets[held_Q], targets[rest_M]
        learned = features_NH.index_select(0, rest_M)
        for place, model in enumerate(_fit_path(learned, rest, classes, penalties, bias, weights)):
            scores_QC = model.scores(features_NH.index_select(0, held_Q))
            if held.ndim == 2:
                loss = F.binary_cross_entropy_with_logits(scores_QC, held.float(), reduction="sum")
            else:
                weight_C = scores_QC.new_tensor(weights) if weights else None
                loss = F.cross_entropy(scores_QC, held, weight_C, reduction="sum")
            loss_P[place] += float(loss)
    return penalties[int(loss_P.argmin())]


def _fit_path(
    features_NH: Tensor,
    targets: Tensor,
    classes: int,
    penalties: Sequence[float],
    bias: bool,
    weights: Sequence[float],
) -> Iterator[LinearModel]:
    """Yield the fit of each penalty. Each fit starts from the weights of the fit before."""
    import torch
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import ThreadpoolController

    libraries = ThreadpoolController()  # finds all loaded libraries, in about 20 ms
    width = features_NH.shape[1]
    if features_NH.is_sparse:
        mean_H, spread = torch.zeros(width), torch.ones(())
        scaled_NK, column_K = _seen_columns(features_NH)
    else:
        mean_H = features_NH.mean(0) * bias
        spread = (features_NH - mean_H).square().mean().sqrt().clamp(min=1e-12)
        scaled_NK, column_K = ((features_NH - mean_H) / spread).numpy(), np.arange(width)
    target, same_N = targets.numpy(), np.ones(len(targets))
    several = target.ndim == 2
    models = [
        LogisticRegression(fit_intercept=bias, max_iter=ITERATIONS, warm_start=True)
        for _ in range(classes if several else 1)
    ]

    def fit(place: int, class_N: NDArray[Any], weight_N: NDArray[Any], penalty: float) -> Any:
        model = models[place].set_params(
            C=1 / (penalty * (1 if features_NH.is_sparse else weight_N.sum()))
        )
        # Two threads of OpenBLAS took five times as long as one on a busy machine.
        with libraries.limit(limits=1, user_api="blas"), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            # Few rows with many labels are no regression.
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            model.fit(scaled_NK, class_N, weight_N)
        return model.coef_, model.intercept_

    for penalty in penalties:
        weight_CK = np.zeros((classes, len(column_K)), np.float32)
        # The log-odds of a class that no row has, or that every row has: scikit-learn fits neither.
        bias_C = np.full(classes, -np.log(len(target) + 1), np.float32)
        if several:
            for place, class_N in enumerate(target.T):
                if class_N.min() < class_N.max():
                    weight_CK[place], bias_C[place : place + 1] = fit(
                        place, class_N, same_N, penalty
                    )
                elif class_N.min():
                    bias_C[place] *= -1
        elif len(seen := np.unique(target)) == 1:
            bias_C[seen] = 0
        else:
            weight_N = np.array(weights)[target] if weights else same_N
            coefficients, intercepts = fit(0, target, weight_N, penalty)
            # Of two classes scikit-learn has the scores of the second one alone.
            half = np.array([-0.5, 0.5]) if len(seen) == 2 else np.ones(1)
            weight_CK[seen], bias_C[seen] = half[:, None] * coefficients, half * intercepts
        weight_CH = torch.zeros(classes, width)
        weight_CH[:, column_K] = torch.from_numpy(weight_CK) / spread
        yield LinearModel(weight_CH, torch.from_numpy(bias_C) * bias - weight_CH @ mean_H)


def _seen_columns(features_NH: Tensor) -> tuple[Any, NDArray[Any]]:
    """Return the columns of sparse features with a value, ``[N, K]``, and their indexes ``[K]``."""
    from scipy.sparse import csr_array

    features_NH = features_NH.coalesce()
    row_M, column_M = features_NH.indices().numpy()
    column_K, place_M = np.unique(column_M, return_inverse=True)
    shape = (len(features_NH), len(column_K))
    return csr_array((features_NH.values().numpy(), (row_M, place_M)), shape), column_K


def fit_centroids(features_NH: Tensor, classes_N: Tensor, classes: int) -> LinearModel:
    """Return the nearest centroid by cosine as scores: the unit vector to the mean of each class.

    scikit-learn's ``NearestCentroid`` has no cosine, and fails on constant features.
    """
    from torch.nn.functional import normalize

    mean_H = features_NH.mean(0)
    centred_NH = normalize(features_NH - mean_H, dim=-1)
    sum_CH = centred_NH.new_zeros(classes, centred_NH.shape[1]).index_add_(0, classes_N, centred_NH)
    weight_CH = normalize(sum_CH, dim=-1)
    return LinearModel(weight_CH, -weight_CH @ mean_H)


def fit_ridge(features_NH: Tensor, targets_N: Tensor) -> LinearModel:
    """Fit a ridge regression with one output. The leave-one-out error selects the penalty."""
    from sklearn.linear_model import RidgeCV

    square = float((features_NH - features_NH.mean(0)).square().mean().clamp(min=1e-12))
    model = RidgeCV([penalty * len(targets_N) * square for penalty in RIDGE_PENALTIES])
    model.fit(features_NH.double().numpy(), targets_N.double().numpy())
    weight_CH = features_NH.new_tensor(model.coef_[None])
    return LinearModel(weight_CH, features_NH.new_tensor([model.intercept_]))
