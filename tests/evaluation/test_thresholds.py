"""Borders from a budget of false alarms."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.evaluation.retrieval import number_keys
from luthier.evaluation.significance import values
from luthier.evaluation.thresholds import (
    choose_threshold,
    precision_threshold,
    threshold_scores,
    unrelated_pairs,
)


@pytest.mark.parametrize(("share", "above"), [(0.0, 0), (0.01, 0), (0.05, 0), (0.2, 3), (0.99, 18)])
def test_threshold_respects_false_alarm_budget(share: float, above: int) -> None:
    scores = np.random.default_rng(0).permutation(20) / 7
    found = choose_threshold(scores, share)
    assert found in scores
    assert (scores > found).sum() == above <= share * 20


def test_pairs_with_a_text_in_common_belong_together() -> None:
    anchors, partners = number_keys(["a", "b", "a"]), number_keys([b"x", "y", "y"])
    apart = unrelated_pairs(anchors, partners)
    assert apart.tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    assert (unrelated_pairs(anchors, partners, slice(1, 3)) == apart[1:3]).all()


def test_threshold_scores_count_hits_and_false_alarms() -> None:
    partners = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
    anchors = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    found = values(threshold_scores(anchors, partners, ["a", "b", "c"], ["x", "y", "z"], 0.7))
    # Matching pairs: 1, 0.6, 1. Mismatched pairs: b-x 1, c-y 0.8, four pairs at most 0.6.
    assert found == {"similar": pytest.approx(2 / 3), "false_alarms": pytest.approx(2 / 6)}
    same = values(threshold_scores(anchors, partners, ["a", "a", "c"], ["x", "y", "y"], 0.7))
    assert same == {"similar": pytest.approx(2 / 3), "false_alarms": 0.0}


@pytest.mark.parametrize(
    ("scores", "right", "precision", "expected"),
    [
        ([0.9, 0.8, 0.6, 0.4], [True, True, False, True], 1.0, 0.7),
        ([0.9, 0.8, 0.6, 0.4], [True, True, False, True], 0.75, 0.4),
        ([0.5, 0.5, 0.5], [True, True, False], 0.9, 0.5),  # equal scores pass together
    ],
)
def test_precision_threshold(
    scores: list[float], right: list[bool], precision: float, expected: float
) -> None:
    found = precision_threshold(np.array(scores), np.array(right), precision)
    assert found == pytest.approx(expected)


def test_precision_threshold_without_reachable_precision_above_all_scores() -> None:
    assert precision_threshold(np.array([0.9, 0.2]), np.array([False, True]), 0.9) > 0.9
