"""Linear models on fixed features: logistic regression and ridge regression, a *linear probe*.

Features are centred and brought to one scale, not each to its own: directions of a network in which
texts differ little say little (on the sets of ``docs/results.md`` a scale for each loses). Nothing is
drawn at random, so the same rows give the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PENALTY = 1e-2
"""Weight of half the squared norm beside the mean loss of a row, for features of variance 1."""
ITERATIONS = 100
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of ridge regression, for each row; the one of the least leave-one-out error is taken."""


@dataclass(frozen=True)
class LinearModel:
    """``scores = features @ weight.T + bias``."""

    weight_CH: Tensor
    bias_C: Tensor

    def scores(self, features_NH: Tensor) -> Tensor:
        """Scores ``[N, C]``."""
        return features_NH @ self.weight_CH.T + self.bias_C


@dataclass(frozen=True)
class _Scaling:
    """Features of mean 0 (as they are, where no bias can make up for it) and a mean square of 1."""

    mean_H: Tensor
    spread: Tensor

    @staticmethod
    def of(features_NH: Tensor, centred: bool = True) -> _Scaling:
        mean_H = features_NH.mean(0) * centred
        spread = (features_NH - mean_H).square().mean().sqrt().clamp(min=1e-12)
        return _Scaling(mean_H, spread)

    def scale(self, features_NH: Tensor) -> Tensor:
        return (features_NH - self.mean_H) / self.spread

    def unscale(self, weight_CH: Tensor, bias_C: Tensor) -> LinearModel:
        """The model of scaled features as one of the features themselves."""
        weight_CH = weight_CH / self.spread
        return LinearModel(weight_CH, bias_C - weight_CH @ self.mean_H)


def fit_logistic(
    features_NH: Tensor,
    targets: Tensor,
    classes: int,
    penalty: float = PENALTY,
    bias: bool = True,
    weights: Sequence[float] = (),
) -> LinearModel:
    """Logistic regression with an L2 penalty, by L-BFGS.

    Args:
        features_NH: float32.
        targets: ``[N]`` classes, one for each row, or ``[N, C]`` of 0 and 1 where a row may have
            several; each class is then told from the rest by itself.
        classes: how many there are.
        penalty: weight of half the squared norm of the weights beside the mean loss of a row.
        bias: whether there is one; else it is 0.
        weights: what a row of each class counts, where each row has one; all alike when not given.
    """
    import torch
    from torch.nn import functional as F

    scaling = _Scaling.of(features_NH, bias)
    scaled_NH = scaling.scale(features_NH)
    weight_CH = scaled_NH.new_zeros(classes, scaled_NH.shape[1], requires_grad=True)
    bias_C = scaled_NH.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_CH, *([bias_C] if bias else [])],
        max_iter=ITERATIONS,
        history_size=10,  # each holds as many numbers as the weights, twice
        line_search_fn="strong_wolfe",
    )

    weight_C = scaled_NH.new_tensor(weights) if weights else None

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores_NC = scaled_NH @ weight_CH.T + bias_C
        if targets.ndim == 1:
            total = F.cross_entropy(scores_NC, targets, weight=weight_C)
        else:
            each_NC = F.binary_cross_entropy_with_logits(
                scores_NC, targets.float(), reduction="none"
            )
            total = each_NC.sum(-1).mean()
        total = total + penalty / 2 * weight_CH.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return scaling.unscale(weight_CH.detach(), bias_C.detach())


def fit_centroids(features_NH: Tensor, classes_N: Tensor, classes: int) -> LinearModel:
    """The nearest centroid by cosine, as scores: the unit vector to the mean of each class."""
    from torch.nn.functional import normalize

    mean_H = features_NH.mean(0)
    centred_NH = normalize(features_NH - mean_H, dim=-1)
    sum_CH = centred_NH.new_zeros(classes, centred_NH.shape[1]).index_add_(0, classes_N, centred_NH)
    weight_CH = normalize(sum_CH, dim=-1)
    return LinearModel(weight_CH, -weight_CH @ mean_H)


def fit_ridge(features_NH: Tensor, targets_N: Tensor) -> LinearModel:
    """Ridge regression of one number, with the penalty of the least leave-one-out error."""
    import torch

    scaling = _Scaling.of(features_NH)
    scaled_NH = scaling.scale(features_NH).double()
    center = targets_N.double().mean()
    error_N = targets_N.double() - center
    left_NK, values_K, right_KH = torch.linalg.svd(scaled_NH, full_matrices=False)
    along_K = left_NK.T @ error_N
    best: tuple[float, Tensor] | None = None
    for penalty in PENALTIES:
        shrink_K = values_K.square() / (values_K.square() + penalty * len(error_N))
        fitted_N = left_NK @ (shrink_K * along_K)
        # The diagonal of the hat matrix, and the mean that every row helped to make.
        share_N = left_NK.square() @ shrink_K + 1 / len(error_N)
        left_out_N = (error_N - fitted_N) / (1 - share_N).clamp(min=1e-6)
        error = float(left_out_N.square().mean())
        if best is None or error < best[0]:
            best = error, (shrink_K / values_K.clamp(min=1e-12) * along_K) @ right_KH
    assert best is not None
    weight_CH = best[1][None].to(features_NH.dtype)
    return scaling.unscale(weight_CH, center.to(features_NH.dtype)[None])
