"""The graph of the nearest and labels on it, against dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from luthier.objectives import propagation
from luthier.objectives.propagation import neighbour_graph, propagate


def points(count: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


def dense(points_NH: torch.Tensor, neighbours: int) -> torch.Tensor:
    cosine = (points_NH @ points_NH.t()).double().fill_diagonal_(-2)
    kept = cosine >= cosine.sort(dim=-1, descending=True).values[:, neighbours - 1 : neighbours]
    ties = torch.where(kept, cosine.clamp(min=0) ** 3, 0.0)
    ties = ties + ties.t()
    scale = ties.sum(-1).clamp(min=1e-12).rsqrt()
    return scale[:, None] * ties * scale


@pytest.mark.parametrize("neighbours", [1, 3, 11])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_the_graph_is_that_of_dense_algebra(
    neighbours: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(propagation, "CHUNK", chunk)
    found = neighbour_graph(points(12), neighbours).to_dense().double()
    assert torch.allclose(found, dense(points(12), neighbours), atol=1e-6)
    assert torch.equal(found, found.t())


@pytest.mark.parametrize("alpha", [0.1, 0.9, 0.99])
def test_labels_are_those_of_the_inverse(alpha: float) -> None:
    known = torch.full((30,), -1)
    known[:4] = torch.tensor([2, 0, 1, 2])
    one = torch.zeros(30, 3, dtype=torch.float64)
    one[torch.arange(4), known[:4]] = 1
    wanted = torch.linalg.solve(torch.eye(30) - alpha * dense(points(30), 4), one)
    wanted /= wanted.sum(-1, keepdim=True).clamp(min=1e-12)
    found = propagate(neighbour_graph(points(30), 4), known, 3, alpha)
    assert torch.allclose(found.double(), wanted, atol=5e-3)


def test_what_no_label_reaches_stays_empty() -> None:
    apart = torch.eye(6)[[0, 0, 1, 1]]
    found = propagate(neighbour_graph(apart, 1), torch.tensor([0, -1, -1, -1]), 2, 0.9)
    assert found.tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]]
