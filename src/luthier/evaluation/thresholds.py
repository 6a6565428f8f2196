"""Decision thresholds for a target false-positive rate or precision, and error rates of a
threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.evaluation.retrieval import blocks, number_keys
from luthier.evaluation.significance import RowScores


def choose_threshold(ordinary: ArrayLike, false_alarms: float) -> float:
    """Return the threshold that at most the share ``false_alarms`` of ``ordinary`` scores exceeds.

    The threshold is the quantile; between two scores, the higher score.
    """
    return float(np.quantile(np.asarray(ordinary), 1 - false_alarms, method="higher"))


def precision_threshold(
    score_N: NDArray[Any], right_N: NDArray[np.bool_], precision: float
) -> float:
    """Return the lowest threshold above which the share ``precision`` of the predictions is right.

    The threshold is halfway to the next score. Without such a threshold, the result is above all
    scores.

    Args:
        score_N: probability of the predicted label.
        right_N: true for right predictions.
    """
    order = np.argsort(-score_N, kind="stable")
    score_N, right_N = score_N[order], right_N[order]
    share_N = np.cumsum(right_N) / np.arange(1, len(right_N) + 1)
    # Equal scores pass together, so only the last of them counts.
    is_last_N = np.append(score_N[1:] != score_N[:-1], True)[: len(score_N)]
    good = np.flatnonzero(is_last_N & (share_N >= precision))
    if not len(good):
        return float(np.nextafter(score_N[0], np.inf)) if len(score_N) else 1.0
    last = good[-1]
    return float(score_N[last : last + 2].mean())


def unrelated_pairs(
    anchor_P: NDArray[Any], partner_P: NDArray[Any], part: slice = slice(None)
) -> NDArray[np.bool_]:
    """Return ``[C, P]`` True for anchors of ``part`` and partners of unrelated pairs.

    Args:
        anchor_P, partner_P: text number of each pair, from :func:`number_keys`. Pairs with a common
            anchor or partner are related.
    """
    apart_CP: NDArray[np.bool_] = anchor_P[part][:, None] != anchor_P
    apart_CP &= partner_P[part][:, None] != partner_P
    return apart_CP


def threshold_scores(
    anchors: ArrayLike,
    partners: ArrayLike,
    anchor_texts: Sequence[str],
    partner_texts: Sequence[str],
    threshold: float,
) -> dict[str, RowScores]:
    """Return the shares of matching pairs and of unrelated pairs with a cosine above ``threshold``.

    Unrelated pairs have no text in common.
    """
    anchor_PH, partner_PH = np.asarray(anchors), np.asarray(partners)
    anchor_P, partner_P = number_keys(anchor_texts), number_keys(partner_texts)
    alarms, others = [np.empty(0)], [np.empty(0)]
    for part, scores_CP in blocks(anchor_PH, partner_PH):
        apart_CP = unrelated_pairs(anchor_P, partner_P, part)
        alarms.append(((scores_CP > threshold) & apart_CP).sum(1))
        others.append(apart_CP.sum(1))
    own_P = (anchor_PH * partner_PH).sum(1)
    return {
        "similar": RowScores.of(own_P > threshold),
        "false_alarms": RowScores.of(np.concatenate(alarms), np.concatenate(others)),
    }
