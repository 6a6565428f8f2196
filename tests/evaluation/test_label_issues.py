"""Suspicious labels: against written-out formulas, and data without a result."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from written_rows import row_of

from luthier.evaluation.label_issues import (
    LEAST_ROWS,
    PENALTY,
    find_label_issues,
    likely_classes,
    neighbour_votes,
    out_of_sample,
)
from luthier.evaluation.linear import fit_logistic
from luthier.types import Row

FLIPPED = (3, 50, 187)


def clusters(rows: int, spread: float = 1.0) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Return points around three corners, and the corner of each point."""
    generator = torch.Generator().manual_seed(1)
    class_N = torch.arange(rows) % 3
    corners_NH = 5 * torch.eye(3, 6)[class_N]
    return corners_NH + spread * torch.randn(rows, 6, generator=generator), class_N.numpy()


def flipped(rows: int = 240) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Return clusters with some points in the middle of a class but with a different class's label."""
    points_NH, class_N = clusters(rows)
    points_NH[[*FLIPPED]] = 6 * torch.eye(3, 6)[class_N[[*FLIPPED]]]
    class_N[[*FLIPPED]] = (class_N[[*FLIPPED]] + 1) % 3
    return points_NH, class_N


def labelled(class_N: NDArray[np.int64]) -> list[Row]:
    return [
        row_of("rows.jsonl", line, text=f"row {line}", label="abc"[name])
        for line, name in enumerate(class_N.tolist(), 1)
    ]


def test_flipped_labels_are_found_with_likely_label() -> None:
    points_NH, class_N = flipped()
    found = find_label_issues(labelled(class_N), points_NH)
    assert found is not None
    right = {line + 1: "abc"[line % 3] for line in FLIPPED}
    assert {each.row.line: each.likely_label for each in found.issues} == right
    assert all(each.probability > 0.5 for each in found.issues)
    assert (found.counts.issues, found.counts.rows) == (3, 240)


def test_correct_labels_have_no_issues() -> None:
    points_NH, class_N = clusters(240)
    found = find_label_issues(labelled(class_N), points_NH)
    assert found is not None
    assert found.issues == []


def test_label_issues_match_formulas() -> None:
    points_NH, class_N = clusters(240, spread=2.0)  # classes overlap: either method decides
    class_N[::17] = (class_N[::17] + 1) % 3
    chance_NC = out_of_sample(points_NH, class_N, 3)
    unit_NH = torch.nn.functional.normalize(points_NH, dim=-1).double()
    threshold = [np.mean([chance_NC[n, c] for n in np.flatnonzero(class_N == c)]) for c in range(3)]
    expected, left_out = {}, 0
    for n, own in enumerate(class_N.tolist()):
        likely = [c for c in range(3) if chance_NC[n, c] >= threshold[c]]
        if not likely or chance_NC[n, own] >= threshold[own]:
            continue
        other = max(likely, key=lambda c: chance_NC[n, c])
        cosine = [(float(unit_NH[n] @ unit_NH[m]), m) for m in range(240) if m != n]
        votes = Counter(int(class_N[m]) for _, m in sorted(cosine, reverse=True)[:10])
        if other == own or votes[own] or votes.most_common(1)[0][0] != other:
            left_out += 1
        else:
            expected[n] = other
    found = likely_classes(points_NH, class_N, 3)
    assert {n: other for n, other, _ in found} == expected
    assert len(expected) > 3 and left_out > 3
    margins = [chance_NC[n, other] - chance_NC[n, class_N[n]] for n, other, _ in found]
    assert margins == sorted(margins, reverse=True)
    assert [chance for *_, chance in found] == [chance_NC[n, other] for n, other, _ in found]


def test_probabilities_are_out_of_sample() -> None:
    points_NH, class_N = flipped()
    # The rows of a class fall alternately to either half, in their order.
    half_N = np.zeros(240, int)
    for name in range(3):
        half_N[np.flatnonzero(class_N == name)] = (
            np.arange((class_N == name).sum()) + (class_N < name).sum()
        ) % 2
    first = torch.from_numpy(half_N == 0)
    model = fit_logistic(points_NH[~first], torch.from_numpy(class_N)[~first], 3, PENALTY)
    expected = model.scores(points_NH[first]).softmax(-1).numpy()
    found_NC = out_of_sample(points_NH, class_N, 3)
    np.testing.assert_allclose(found_NC[first.numpy()], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found_NC.sum(1), 1, rtol=1e-5)


def test_rows_never_vote_for_own_label() -> None:
    points_NH, class_N = clusters(30)
    points_NH[:14] = points_NH[0]  # more copies than are looked at
    votes_NC = neighbour_votes(points_NH, class_N, 3)
    assert (votes_NC.sum(1) == 10).all()
    votes = neighbour_votes(points_NH[14:20], np.arange(6), 6)
    assert (np.diag(votes) == 0).all()


def test_label_issues_need_a_minimum_of_rows() -> None:
    points_NH, class_N = flipped()
    few = LEAST_ROWS - 1
    assert find_label_issues(labelled(class_N)[:few], points_NH[:few]) is None
    assert find_label_issues(labelled(class_N)[: few + 1], points_NH[: few + 1]) is not None


def test_labels_independent_of_states_have_no_issues() -> None:
    """10 % of the rows have the rare label, independent of the state, so neighbours never have the
    label."""
    generator = torch.Generator().manual_seed(0)
    points_NH = torch.randn(1000, 6, generator=generator)
    class_N = (np.random.default_rng(0).random(1000) < 0.1).astype(np.int64)
    assert (neighbour_votes(points_NH, class_N, 2)[class_N == 1, 1] == 0).sum() > 10
    assert likely_classes(points_NH, class_N, 2) == []


def test_states_separating_few_labels_have_no_issues() -> None:
    points_NH, class_N = flipped()
    assert len(likely_classes(points_NH, class_N, 3)) == 3
    generator = torch.Generator().manual_seed(2)
    noise_NH = torch.randn(360, 6, generator=generator) - 5 * torch.eye(6)[3]
    noise_N = 3 + np.random.default_rng(0).integers(0, 12, 360)
    all_NH, all_N = torch.cat([points_NH, noise_NH]), np.concatenate([class_N, noise_N])
    assert (out_of_sample(all_NH, all_N, 15).argmax(1) == all_N)[:240].mean() > 0.9
    assert likely_classes(all_NH, all_N, 15) == []


def test_a_label_of_few_rows_is_left_alone() -> None:
    points_NH, class_N = clusters(240)
    class_N[FLIPPED[0]] = 3  # the only row with this label
    assert likely_classes(points_NH, class_N, 4) == []


@pytest.mark.parametrize("label", [("a", "b"), ()])
def test_rows_of_several_labels_are_left_alone(label: tuple[str, ...]) -> None:
    points_NH, class_N = flipped()
    rows = labelled(class_N)
    rows[0] = replace(rows[0], label=label)
    assert find_label_issues(rows, points_NH) is None
    assert find_label_issues([row_of("a.jsonl", 1, text="a")] * 240, points_NH) is None
