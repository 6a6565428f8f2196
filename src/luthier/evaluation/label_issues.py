"""Detection of suspicious labels, from the states of a frozen network.

Two methods must agree on the same other label:

* *Confident learning* (Northcutt, Jiang and Chuang 2021, arXiv:1911.00068) on out-of-sample
  probabilities. A logistic regression on each half of the rows predicts the other half. The
  probability of the row's label is below the mean for rows of that label, and the probability of
  the other label is at least the mean for rows of the other label.
* None of the *nearest rows* by cosine has the row's label.

Each method alone names too many correct labels (``docs/log/data.md``). In data with few wrong
labels, most reported labels are correct too: the rows lie between two classes. The result is
therefore a list to review, not a list of errors. Labels with a recall below one half in the
regression are skipped. If the accuracy of the regression is below one half, the list is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes import of_shape
from luthier.data.shapes.base import Labelled
from luthier.evaluation.linear import fit_logistic
from luthier.types import Row

if TYPE_CHECKING:
    from torch import Tensor

LEAST_ROWS = 200
"""Minimum number of rows. Of 100 rows, only two of five reports were right."""
NEIGHBOURS = 10
"""Number of nearest rows. Labels with at most as many rows are skipped."""
PENALTY = 1e-2
"""Penalty of the regression. A penalty for noisy labels flattens the probabilities: with 12 % wrong
labels in SMS spam, cross-validation names no row, and this penalty names 54 rows with one error."""
LEAST_RECALL = 0.5
"""Minimum recall of a label, and minimum accuracy, of the regression."""
LARGEST_TABLE = 20_000_000
"""Maximum size of the table of probabilities. Larger data is skipped."""


@dataclass(frozen=True)
class LabelIssue:
    """A row with a suspicious label."""

    row: Labelled
    likely_label: str
    """Label that both methods prefer."""
    probability: float
    """Out-of-sample probability of the likely label."""


@dataclass(frozen=True)
class LabelIssueCounts:
    """Counts of the search for label issues."""

    issues: int
    rows: int
    """Number of inspected rows, training and held-out."""


@dataclass(frozen=True)
class LabelIssues:
    """The label issues of some rows."""

    issues: Sequence[LabelIssue]
    """The surest first."""
    rows: int
    """Number of inspected rows."""

    @property
    def counts(self) -> LabelIssueCounts:
        """Return the counts without the rows."""
        return LabelIssueCounts(len(self.issues), self.rows)


def find_label_issues(rows: Sequence[Row], states_NH: Tensor) -> LabelIssues | None:
    """Find label issues among ``rows`` with states ``states_NH``.

    Returns:
        ``None`` for too few rows, or for rows without exactly one label each.
    """
    labelled = of_shape(Labelled, rows)
    if len(rows) < LEAST_ROWS or not labelled or not all(row.has_one_label for row in labelled):
        return None
    names, class_N = np.unique([row.labels[0] for row in labelled], return_inverse=True)
    if len(names) < 2 or len(labelled) * len(names) > LARGEST_TABLE:
        return None
    found = likely_classes(states_NH, class_N, len(names))
    issues = [LabelIssue(labelled[n], str(names[other]), chance) for n, other, chance in found]
    return LabelIssues(issues, len(labelled))


def likely_classes(
    states_NH: Tensor, class_N: NDArray[np.int64], classes: int
) -> list[tuple[int, int, float]]:
    """Return rows that resemble a different class, with this class and the probability.

    Rows are sorted by the margin between the probabilities of the other class and of the row's
    class.
    """
    rows_N = np.arange(len(class_N))
    chance_NC = out_of_sample(states_NH, class_N, classes)
    own_N, count_C = chance_NC[rows_N, class_N], np.bincount(class_N, minlength=classes)
    # Mean probability of the own class: the threshold of a likely class.
    threshold_C = np.bincount(class_N, own_N, classes) / np.maximum(count_C, 1)
    likely_NC = np.where(chance_NC >= threshold_C, chance_NC, -1.0)
    other_N = likely_NC.argmax(1)
    right_N = chance_NC.argmax(1) == class_N
    recall_C = np.bincount(class_N, right_N, classes) / np.maximum(count_C, 1)
    known_C = (recall_C >= LEAST_RECALL) & (count_C > NEIGHBOURS)
    known_C &= right_N.mean() >= LEAST_RECALL
    votes_NC = neighbour_votes(states_NH, class_N, classes)
    is_issue_N = (
        (likely_NC.max(1) > 0)
        & (other_N != class_N)
        & (own_N < threshold_C[class_N])
        & (votes_NC[rows_N, class_N] == 0)
        & (votes_NC.argmax(1) == other_N)
        & known_C[class_N]
        & known_C[other_N]
    )
    sure_N = chance_NC[rows_N, other_N] - own_N
    order = sorted(np.flatnonzero(is_issue_N).tolist(), key=lambda place: -sure_N[place])
    return [(n, int(other_N[n]), float(chance_NC[n, other_N[n]])) for n in order]


def out_of_sample(
    states_NH: Tensor, class_N: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """Probabilities ``[N, C]`` of each half of the rows, by logistic regression on the other half.

    Every class is halved; two halves cost about one fit of all rows, where five folds cost four and
    name no more.
    """
    import torch

    half_N = np.empty(len(class_N), np.int64)
    half_N[np.argsort(class_N, kind="stable")] = np.arange(len(class_N)) % 2
    chance_NC = np.empty((len(class_N), classes))
    target_N = torch.from_numpy(class_N)
    for half in (0, 1):
        held_N = torch.from_numpy(half_N == half)
        model = fit_logistic(states_NH[~held_N], target_N[~held_N], classes, PENALTY)
        chance_NC[held_N.numpy()] = model.scores(states_NH[held_N]).double().softmax(-1).numpy()
    return chance_NC


def neighbour_votes(
    states_NH: Tensor, class_N: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Return how many of the nearest other rows are of each class, ``[N, C]``, by cosine of states."""
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    count = min(NEIGHBOURS, len(class_N) - 1)
    search = NearestNeighbors(n_neighbors=count, algorithm="brute")
    # Without rows to look up, each row is left out of its own neighbours.
    near_NK = search.fit(normalize(states_NH.numpy())).kneighbors(return_distance=False)
    votes_NC = np.zeros((len(class_N), classes), np.int64)
    np.add.at(votes_NC, (np.arange(len(class_N))[:, None], class_N[near_NK]), 1)
    return votes_NC
