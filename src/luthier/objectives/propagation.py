"""Labels that spread from a few points to their neighbours (Zhou et al. 2004).

"Learning with Local and Global Consistency", NIPS 2003: points that lie close together, and points of
one cluster, should have one label. With ``W`` the symmetrically normalised similarities of near points
and ``Y`` a one for each known label, the labels are ``F = (I - alpha W)^-1 Y``.

The graph is that of Iscen et al. 2019 (arXiv:1904.04717, section 3.2): each point is tied to its ``k``
nearest by ``max(0, cosine)^3``. Left out: their conjugate gradient, as the plain iteration
``F <- alpha W F + Y`` is a few dozen sparse products (it converges, as no eigenvalue of ``W`` is
above 1), and Zhou's factor ``1 - alpha``, which is a scale.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

POWER = 3
"""gamma of Iscen et al."""
LEFT = 1e-3
"""The iteration ends when at most this share of the sum is missing."""
HOPS = 20
"""Iterations at least: a label reaches no farther, and what far points get is scaled up."""
CHUNK = 1024
"""Points whose similarities to all others exist at once."""


def neighbour_graph(points_NH: Tensor, neighbours: int) -> Tensor:
    """Sparse ``[N, N]``: similarities of near points, normalised to ``D^-1/2 A D^-1/2``.

    ``points_NH`` are float32 and of length 1; a point is no neighbour of itself. Takes ``N^2 H``
    multiplications and ``N`` times ``CHUNK`` numbers.
    """
    import torch

    count = len(points_NH)
    near = min(neighbours, count - 1)
    similarities, indices = [], []
    for start in range(0, count, CHUNK):
        cosine_MN = points_NH[start : start + CHUNK] @ points_NH.t()
        own_M = torch.arange(len(cosine_MN), device=points_NH.device)
        cosine_MN[own_M, start + own_M] = -math.inf
        best_MK, index_MK = cosine_MN.topk(near)
        similarities.append(best_MK.clamp(min=0) ** POWER)
        indices.append(index_MK)
    from_E = torch.arange(count, device=points_NH.device).repeat_interleave(near)
    to_E, weight_E = torch.cat(indices).flatten(), torch.cat(similarities).flatten()
    both_2E = torch.stack([torch.cat([from_E, to_E]), torch.cat([to_E, from_E])])
    shape = (count, count)
    ties_NN = torch.sparse_coo_tensor(both_2E, weight_E.repeat(2), shape, check_invariants=True)
    ties_NN = ties_NN.coalesce()
    degree_N = torch.sparse.sum(ties_NN, 1).to_dense().clamp(min=1e-12)
    one_E, other_E = ties_NN.indices()
    scaled_E = ties_NN.values() * (degree_N[one_E] * degree_N[other_E]) ** -0.5
    graph_NN = torch.sparse_coo_tensor(ties_NN.indices(), scaled_E, shape, check_invariants=True)
    return graph_NN.coalesce()


def propagate(graph_NN: Tensor, known_N: Tensor, classes: int, alpha: float) -> Tensor:
    """Probabilities ``[N, C]`` of each point, from ``known_N`` with -1 where nothing is known.

    Points that no known label reaches have zeros.
    """
    import torch

    known_NC = torch.zeros(len(known_N), classes, device=known_N.device)
    some_N = known_N >= 0
    known_NC[some_N, known_N[some_N]] = 1.0
    spread_NC = known_NC
    for _ in range(max(HOPS, math.ceil(math.log(LEFT) / math.log(alpha)))):
        spread_NC = alpha * torch.sparse.mm(graph_NN, spread_NC) + known_NC
    return spread_NC / spread_NC.sum(-1, keepdim=True).clamp(min=1e-12)
