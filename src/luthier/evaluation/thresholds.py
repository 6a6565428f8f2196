"""Borders between answers from a budget of false alarms, and how often such a border is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.evaluation.retrieval import blocks, number_keys
from luthier.evaluation.significance import RowScores


def draw_threshold(ordinary: ArrayLike, false_alarms: float) -> float:
    """One of the ``ordinary`` scores that at most the share ``false_alarms`` is above.

    That is their quantile, and of the two scores beside it the higher one.
    """
    return float(np.quantile(np.asarray(ordinary), 1 - false_alarms, method="higher"))


def are_apart(
    anchor_P: NDArray[Any], partner_P: NDArray[Any], part: slice = slice(None)
) -> NDArray[np.bool_]:
    """Which anchors of ``part`` and partners ``[C, P]`` belong to pairs without a text in common.

    ``anchor_P`` and ``partner_P`` say which text each pair has, by :func:`number_keys`: pairs of one
    anchor, or of one partner, belong together as far as anybody knows.
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
    """The share of pairs whose cosine is above ``threshold``, and that of all other pairs of the rows.

    Others have neither text in common with a row of their own.
    """
    anchor_PH, partner_PH = np.asarray(anchors), np.asarray(partners)
    anchor_P, partner_P = number_keys(anchor_texts), number_keys(partner_texts)
    alarms, others = [np.empty(0)], [np.empty(0)]
    for part, scores_CP in blocks(anchor_PH, partner_PH):
        apart_CP = are_apart(anchor_P, partner_P, part)
        alarms.append(((scores_CP > threshold) & apart_CP).sum(1))
        others.append(apart_CP.sum(1))
    own_P = (anchor_PH * partner_PH).sum(1)
    return {
        "similar": RowScores.of(own_P > threshold),
        "false_alarms": RowScores.of(np.concatenate(alarms), np.concatenate(others)),
    }
