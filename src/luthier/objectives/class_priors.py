"""How often each class occurs, and the bias from which a new head starts by it.

A head of random numbers gives every class the same probability. Where one class is much more frequent
than the others (the tag ``O`` in named-entity recognition), the first gradients all say the same thing
of every state: more of that class. The head's own bias follows at a learning rate a step; the network
below it is faster, and answers by making all states alike. With LoRA on an encoder that takes eight
steps, and nothing is left to learn from (see ``docs/log/objectives.md``). So the bias says from the
start what the shares say, and gradients are about how texts differ. Lin et al. 2017
(arXiv:1708.02002, section 3.3) start the rare class at a fixed share of 0.01; here it is the rows' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LARGEST_WEIGHT = 1_000_000
"""Of a class."""


def shares_of(
    labels: Sequence[str], seen: Mapping[str, int], rows: int | None = None
) -> tuple[float, ...]:
    """Share of each of ``labels``, ``seen`` so often, one more of each counted: none is 0 or 1.

    ``rows`` is given where a row has any number of labels: shares are then those of the rows.
    """
    counts = [seen.get(name, 0) + 1 for name in labels]
    total = sum(counts) if rows is None else rows + 2
    return tuple(count / total for count in counts)


def check_shares(labels: Sequence[str] | None, shares: Sequence[float] | None) -> None:
    """Refuse shares that are none, or that belong to no labels."""
    if shares is None:
        return
    if len(shares) != len(labels or ()):
        raise ValueError("shares go with labels: give both, one share for each label")
    if not all(0 < share < 1 for share in shares):
        raise ValueError("a share is a number between 0 and 1, the ends left out")


def balanced_weights(labels: Sequence[str], seen: Mapping[str, int]) -> dict[str, float]:
    """Weight of each of ``labels``: rows / (classes * rows of its class), as scikit-learn's "balanced".

    The mean weight of a row is 1. A class without rows has weight 1, and counts as none. None is above
    :data:`LARGEST_WEIGHT`.
    """
    counts = {name: seen[name] for name in labels if seen.get(name)}
    mean = sum(counts.values()) / max(1, len(counts))
    return {
        name: min(mean / counts[name], LARGEST_WEIGHT) if name in counts else 1.0 for name in labels
    }


def softmax_bias(shares: Sequence[float]) -> tuple[float, ...]:
    """Scores whose softmax are the shares; 0 for the most frequent, and for all of equal ones."""
    return tuple(math.log(share / max(shares)) for share in shares)


def sigmoid_bias(shares: Sequence[float]) -> tuple[float, ...]:
    """Scores whose sigmoids are the shares."""
    return tuple(math.log(share / (1 - share)) for share in shares)
