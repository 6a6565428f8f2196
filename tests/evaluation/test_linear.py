"""Linear models on fixed features, on points with a known solution."""

from __future__ import annotations

import pytest
import torch

from luthier.evaluation.linear import (
    PENALTIES,
    fit_centroids,
    fit_logistic,
    fit_ridge,
    select_penalty,
)


@pytest.fixture
def clusters() -> tuple[torch.Tensor, torch.Tensor]:
    """Three clusters far from the origin, as states of networks are."""
    generator = torch.Generator().manual_seed(0)
    classes_N = torch.arange(90) % 3
    points_NH = torch.randn(90, 8, generator=generator) + 4 * torch.eye(3, 8)[classes_N] + 50
    return points_NH, classes_N


def test_logistic_regression_separates_clusters_at_any_scale(
    clusters: tuple[torch.Tensor, torch.Tensor],
) -> None:
    points_NH, classes_N = clusters
    model = fit_logistic(points_NH, classes_N, 3)
    assert (model.scores(points_NH).argmax(-1) == classes_N).float().mean() > 0.97
    # The scale of the features changes nothing.
    model = fit_logistic(points_NH, classes_N, 3, 0.01)
    other = fit_logistic(points_NH * 1000, classes_N, 3, 0.01)
    torch.testing.assert_close(
        other.scores(points_NH * 1000), model.scores(points_NH), atol=0.02, rtol=0.02
    )


def test_logistic_regression_minimizes_penalized_loss(
    clusters: tuple[torch.Tensor, torch.Tensor],
) -> None:
    points_NH, classes_N = clusters
    model = fit_logistic(points_NH, classes_N, 3, penalty=1.0)
    spread = (points_NH - points_NH.mean(0)).square().mean().sqrt()

    def loss(weight_CH: torch.Tensor, bias_C: torch.Tensor) -> float:
        scores_NC = points_NH @ weight_CH.T + bias_C
        entropy = torch.nn.functional.cross_entropy(scores_NC, classes_N)
        return float(entropy + 0.5 * (weight_CH * spread).square().sum())

    least = loss(model.weight_CH, model.bias_C)
    for factor in (0.9, 1.1):
        assert loss(model.weight_CH * factor, model.bias_C * factor) > least


def test_logistic_regression_with_few_rows_per_class_warns_of_nothing() -> None:
    model = fit_logistic(torch.eye(24), torch.arange(24) % 14, 14, penalty=0.01)
    assert model.weight_CH.shape == (14, 24)


def test_multi_label_logistic_regression(
    clusters: tuple[torch.Tensor, torch.Tensor],
) -> None:
    points_NH, classes_N = clusters
    targets_NC = torch.stack([classes_N == 0, classes_N != 2], 1).float()
    model = fit_logistic(points_NH, targets_NC, 2)
    right_NC = (model.scores(points_NH) > 0) == targets_NC.bool()
    assert right_NC.float().mean() > 0.97


def test_classes_without_rows_and_classes_of_all_rows(
    clusters: tuple[torch.Tensor, torch.Tensor],
) -> None:
    points_NH, classes_N = clusters
    for given_N, classes in ((classes_N, 5), (classes_N.clamp(max=1), 4), (classes_N * 0 + 2, 4)):
        model = fit_logistic(points_NH, given_N, classes)
        assert model.weight_CH.shape == (classes, 8)
        assert (model.scores(points_NH).argmax(-1) == given_N).float().mean() > 0.97
    always, never = torch.ones(90), torch.zeros(90)
    model = fit_logistic(points_NH, torch.stack([always, classes_N == 0, never], 1), 3)
    likely_NC = model.scores(points_NH) > 0
    assert likely_NC[:, 0].all() and not likely_NC[:, 2].any()


@pytest.mark.parametrize("classes", [2, 3])
def test_without_a_bias_the_scores_are_products_alone(
    clusters: tuple[torch.Tensor, torch.Tensor], classes: int
) -> None:
    points_NH, classes_N = clusters
    model = fit_logistic(points_NH - 50, classes_N.clamp(max=classes - 1), classes, bias=False)
    assert not model.bias_C.any()
    torch.testing.assert_close(model.scores(points_NH), points_NH @ model.weight_CH.T)


def test_centroids_answer_by_direction(clusters: tuple[torch.Tensor, torch.Tensor]) -> None:
    points_NH, classes_N = clusters
    found_N = fit_centroids(points_NH, classes_N, 3).scores(points_NH).argmax(-1)
    assert (found_N == classes_N).float().mean() > 0.95


def test_ridge_finds_a_line_and_ignores_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    points_NH = torch.randn(60, 40, generator=generator) + 10
    line_N = 3 * points_NH[:, 0] + 7
    found = fit_ridge(points_NH, line_N)
    torch.testing.assert_close(found.scores(points_NH)[:, 0], line_N, atol=0.5, rtol=0.05)
    noise_N = torch.randn(60, generator=generator)
    fresh_NH = torch.randn(200, 40, generator=generator) + 10
    guess_N = fit_ridge(points_NH, noise_N).scores(fresh_NH)[:, 0]
    assert (guess_N - noise_N.mean()).square().mean() < 0.5 * noise_N.var()


def noisy_clusters(share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return points of 3 classes in 100 dimensions, the classes, and labels with wrong ones."""
    generator = torch.Generator().manual_seed(3)
    classes_N = torch.arange(300) % 3
    points_NH = torch.randn(300, 100, generator=generator) + 4 * torch.eye(3, 100)[classes_N]
    wrong_N = torch.rand(300, generator=generator) < share
    return points_NH, classes_N, torch.where(wrong_N, (classes_N + 1) % 3, classes_N)


@pytest.mark.slow
def test_wrong_labels_select_a_larger_penalty() -> None:
    points_NH, classes_N, noisy_N = noisy_clusters(0.2)
    clean, noisy = (select_penalty(points_NH, each_N, 3) for each_N in (classes_N, noisy_N))
    assert clean < noisy

    def accuracy(penalty: float | None) -> float:
        model = fit_logistic(points_NH, noisy_N, 3, penalty)
        return float((model.scores(points_NH).argmax(-1) == classes_N).float().mean())

    assert accuracy(None) > accuracy(0.01) + 0.05


def test_selected_penalty_has_the_least_held_out_loss() -> None:
    points_NH, _, noisy_N = noisy_clusters(0.2)
    fold_N = torch.empty(300, dtype=torch.long)
    fold_N[noisy_N.argsort(stable=True)] = torch.arange(300) % 5
    losses = dict.fromkeys(PENALTIES, 0.0)
    for penalty in PENALTIES:
        for fold in range(5):
            held_N = fold_N == fold
            model = fit_logistic(points_NH[~held_N], noisy_N[~held_N], 3, penalty)
            loss = torch.nn.functional.cross_entropy(
                model.scores(points_NH[held_N]), noisy_N[held_N], reduction="sum"
            )
            losses[penalty] += float(loss)
    assert select_penalty(points_NH, noisy_N, 3) == min(losses, key=losses.__getitem__)


@pytest.mark.slow
def test_penalty_of_several_labels_grows_with_wrong_labels() -> None:
    points_NH, classes_N, noisy_N = noisy_clusters(0.2)
    clean, noisy = (
        select_penalty(points_NH, torch.eye(3)[each_N], 3) for each_N in (classes_N, noisy_N)
    )
    assert clean < noisy


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_few_rows_select_a_penalty(rows: int) -> None:
    points_NH, classes_N, _ = noisy_clusters(0.0)
    assert select_penalty(points_NH[:rows], classes_N[:rows], 3) in PENALTIES
