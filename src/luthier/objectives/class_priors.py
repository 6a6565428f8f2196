"""Class frequencies, and the initial bias of a new head.

A random head predicts equal probabilities for all classes. If one class is much more frequent (the
tag ``O`` in named-entity recognition), the first gradients all pull every state towards the
frequent class. The bias of the head moves by one learning rate per step. The network below moves
faster and makes all states alike. With LoRA on an encoder, the collapse takes eight steps, and
nothing is left to learn from (``docs/log/objectives.md``). With the class frequencies as the
initial bias, gradients only concern differences between texts. Lin et al. 2017 (arXiv:1708.02002,
section 3.3) start the rare class at a fixed share of 0.01; this module uses the shares of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LARGEST_WEIGHT = 1_000_000
"""Maximum weight of a class."""


def shares_of(
    labels: Sequence[str], seen: Mapping[str, int], rows: int | None = None
) -> tuple[float, ...]:
    """Return the share of each label, with add-one smoothing: no share is 0 or 1.

    ``seen`` counts the labels. ``rows`` is the number of rows for multi-label data; shares are then
    shares of rows.
    """
    counts = [seen.get(name, 0) + 1 for name in labels]
    # A class of multi-label data is a yes or no per row: one more of each makes rows + 2.
    total = sum(counts) if rows is None else rows + 2
    return tuple(count / total for count in counts)


def check_shares(labels: Sequence[str] | None, shares: Sequence[float] | None) -> None:
    """Reject invalid shares and shares without labels."""
    if shares is None:
        return
    if len(shares) != len(labels or ()):
        raise ValueError("`shares` requires `labels`, with one share per label")
    if not all(0 < share < 1 for share in shares):
        raise ValueError("a share must be above 0 and below 1")


def balanced_weights(labels: Sequence[str], seen: Mapping[str, int]) -> dict[str, float]:
    """Return the weight per label: rows / (classes * rows of the class), as scikit-learn's
    "balanced".

    The mean weight over rows is 1. A class without rows has weight 1 and does not count as a class.
    Weights are at most :data:`LARGEST_WEIGHT`.
    """
    counts = {name: seen[name] for name in labels if seen.get(name)}
    mean = sum(counts.values()) / max(1, len(counts))
    return {
        name: min(mean / counts[name], LARGEST_WEIGHT) if name in counts else 1.0 for name in labels
    }


def softmax_bias(shares: Sequence[float]) -> tuple[float, ...]:
    """Return scores whose softmax equals the shares; the most frequent class has score 0."""
    # Relative to the maximum: equal shares give exactly 0, the bias of an ordinary head.
    return tuple(math.log(share / max(shares)) for share in shares)


def sigmoid_bias(shares: Sequence[float]) -> tuple[float, ...]:
    """Return scores whose sigmoids equal the shares."""
    return tuple(math.log(share / (1 - share)) for share in shares)
