"""Errors of scores and of their differences, by the formulas of the papers and by drawing again."""

from __future__ import annotations

import math

import numpy as np
import pytest

from luthier.evaluation.significance import RowScores, Statistic, differ, standard_error
from luthier.tasks.tagging import tag_scores


def accuracy(right: int, wrong: int) -> RowScores:
    return RowScores.of([1] * right + [0] * wrong)


def test_a_perfect_score_on_few_rows_is_no_certainty() -> None:
    # Agresti and Coull's interval for 16 of 16: 18 of 20.
    assert standard_error(1.0, 16) == pytest.approx((0.9 * 0.1 / 20) ** 0.5)
    assert standard_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    for right, wrong in ((16, 0), (30, 10), (0, 7)):
        found = accuracy(right, wrong)
        assert found.error == pytest.approx(standard_error(found.value, right + wrong))


def test_the_interval_of_a_share_stays_between_none_and_all() -> None:
    error = standard_error(1.0, 16)
    assert accuracy(16, 0).interval == (pytest.approx(0.9 - 2 * error), 1.0)
    assert accuracy(0, 16).interval == (0.0, pytest.approx(0.1 + 2 * error))
    low, high = accuracy(2400, 600).interval
    assert low < 0.8 < high and high - low == pytest.approx(4 * (0.16 / 3000) ** 0.5, rel=0.01)


def test_unpaired_scores_differ_beyond_two_standard_errors() -> None:
    assert not differ(0.80, 0.84, 200)
    assert differ(0.80, 0.84, 2000)
    assert differ(0.84, 0.80, 2000)


@pytest.mark.parametrize(
    ("won", "lost", "told_apart"), [(0, 0, False), (3, 0, False), (13, 3, True), (24, 16, False)]
)
def test_paired_error_counts_rows_with_different_results(
    won: int, lost: int, told_apart: bool
) -> None:
    rows = 200
    both = 150
    one = [1] * both + [1] * won + [0] * lost + [0] * (rows - both - won - lost)
    other = [1] * both + [0] * won + [1] * lost + [0] * (rows - both - won - lost)
    found, beside = RowScores.of(one), RowScores.of(other)
    error = found.difference_error(beside)
    # Bonett and Price: add a row to each of the two kinds.
    share = (won - lost) / (rows + 2)
    assert error == pytest.approx((((won + lost + 2) / (rows + 2) - share**2) / (rows + 2)) ** 0.5)
    assert (found.value - beside.value > 2 * error) is told_apart
    assert beside.difference_error(found) == pytest.approx(error)


def test_error_of_f1_matches_bootstrap() -> None:
    draw = np.random.default_rng(0)
    kinds = ["B-a", "B-b", "O", "O", "O"]
    wanted = [draw.choice(kinds, 12).tolist() for _ in range(400)]

    def changed(share: float) -> list[list[str]]:
        return [
            [str(draw.choice(kinds)) if draw.random() < share else tag for tag in tags]
            for tags in wanted
        ]

    one, other = (tag_scores(zip(changed(share), wanted, strict=True)) for share in (0.2, 0.3))
    places = [draw.integers(0, 400, 400) for _ in range(2000)]

    def drawn(scores: RowScores) -> np.ndarray:
        return np.array([scores.parts_R[p].sum() / scores.wholes_R[p].sum() for p in places])

    assert one.error == pytest.approx(drawn(one).std(), rel=0.1)
    assert one.difference_error(other) == pytest.approx((drawn(one) - drawn(other)).std(), rel=0.1)


def test_a_mean_error_has_the_error_of_a_mean() -> None:
    values, others = np.array([0.1, 0.5, 0.2, 0.9]), np.array([0.3, 0.5, 0.4, 0.8])
    found = RowScores.of(values, is_share=False)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std() / 2)
    beside = RowScores.of(others, is_share=False)
    assert found.difference_error(beside) == pytest.approx((values - others).std() / 2)


def test_concatenated_pieces_score_as_whole() -> None:
    pieces = [RowScores.of([1, 0], [2, 1]), RowScores.of([3], [4])]
    assert RowScores.concatenate(pieces).value == pytest.approx(4 / 7)
    assert RowScores.of([0], [0]).value == 0.0


def test_bootstrap_error_matches_error_of_mean() -> None:
    right_R = np.random.default_rng(0).random(400) < 0.8
    drawn = Statistic.of(lambda row_K: float(right_R[row_K].mean()), 400)
    known = RowScores.of(right_R)
    assert drawn.value == pytest.approx(known.value) and len(drawn) == 400
    assert drawn.error == pytest.approx(known.error, rel=0.1)
    assert drawn.error == Statistic.of(drawn.measure, 400).error  # the same each time
    part = np.arange(50)
    assert drawn.subset(part).value == known.subset(part).value == right_R[:50].mean()
    assert drawn.subset(part).error > 2 * drawn.error


def test_resamples_without_a_score_are_left_out_of_the_error() -> None:
    values_R = np.array([0.0, 1.0, 2.0])
    spread = Statistic.of(
        lambda row_K: float(np.ptp(values_R[row_K])) or math.nan, 3, is_share=False
    )
    assert spread.value == 2 and 0 < spread.error < 1
    assert math.isnan(Statistic.of(lambda _: math.nan, 3).error)


def test_bootstrap_of_perfect_share_has_error_of_accuracy() -> None:
    assert Statistic.of(lambda _: 1.0, 16).error == pytest.approx(RowScores.of([1] * 16).error)
    assert Statistic.of(lambda _: 0.0, 16, is_share=False).error == 0
