"""Semi-supervised classification: few labelled texts and many texts without a label.

Label propagation (Iscen et al. 2019, arXiv:1904.04717): before the first step, the network encodes
all texts once, and labels spread to the neighbours in embedding space. A text whose likeliest label
has a share of at least ``threshold`` is trained with that label. With ``n_s`` labelled rows in a
step, and the set ``S`` of confident unlabelled rows, the loss is

    (sum_s H(y, p(x)) + w sum_{u in S} H(y~, p(x))) / (n_s + w |S|)

with the network's dropout, and with augmentation if ``data.augmentation`` is set. The additional
signal is that neighbours are alike, so the base model must embed texts well before training. Before
training, the run prints how many labelled texts recover a hidden label.

The propagation follows Zhou et al. 2004 ("Learning with Local and Global Consistency", NIPS 2003):
nearby points, and points of one cluster, should have one label. With the symmetrically normalised
similarities ``W`` of near points and a one-hot row in ``Y`` for each known label, the labels are
``F = (I - alpha W)^-1 Y``. The graph is from Iscen et al. 2019 (section 3.2): each point is linked
to the ``k`` nearest points with weight ``max(0, cosine)^3``. Left out: conjugate gradients, because
the iteration ``F <- alpha W F + Y`` takes a few dozen sparse products (no eigenvalue of ``W``
exceeds 1, so the iteration converges), and Zhou's factor ``1 - alpha``, which only scales.

Labelled rows are in the main file, unlabelled rows in ``data.mix``. Left out: new labels in each
epoch, and weights by entropy and class size; the threshold replaces the former. An earlier version
used FixMatch (Sohn et al. 2020, arXiv:2001.07685), which was worse than the labelled rows alone
(``docs/log/objectives.md``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.shapes.texts import LabelledText
from luthier.errors import RecipeError
from luthier.objectives.base import (
    Changes,
    Objective,
    PreparedRows,
    RunStart,
    TrainingDefaults,
)
from luthier.objectives.classification import NO_LABEL, Classification
from luthier.objectives.contrastive import Contrastive, read_embeddings
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch

POWER = 3
"""gamma of Iscen et al."""
LEFT = 1e-3
"""Share of the sum that the iteration may miss at the end."""
HOPS = 20
"""Minimum number of iterations: labels reach no farther, and shares of distant points are scaled
up."""
CHUNK = 1024
"""Number of points per block of similarities to all points."""
FOLDS = 5
"""Number of folds of the labelled rows, to measure the recovery of hidden labels."""


class SemiSupervised(Classification):
    """Classification with few labelled and many unlabelled texts.

    Use ``classification`` without unlabelled text, or if the base model embeds the text poorly.
    """

    method: Literal["semi_supervised"] = "semi_supervised"  # type: ignore[assignment]
    multi_label: Literal[False] = False
    """Always false: each text has one label."""
    class_weights: None = None
    """Always ``None``: all labels have equal weight."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Minimum share of the likeliest label of an unlabelled text."""
    unlabelled_weight: float = Field(default=1.0, gt=0, le=1e6)
    """Weight of an unlabelled row relative to a labelled row."""
    neighbours: int = Field(default=10, ge=1, le=1_000_000)
    """Number of nearest neighbours in the graph; k in the paper, with the value 50."""
    alpha: float = Field(default=0.9, gt=0, lt=1)
    """Share of a text's label that comes from neighbours; 0.99 in the paper."""

    can_shard: ClassVar[bool] = False
    shapes: ClassVar[frozenset[str]] = frozenset({"label"})
    evaluation_shapes: ClassVar[frozenset[str]] = shapes
    mixed_shapes: ClassVar[frozenset[str]] = frozenset({"label", "text"})
    defaults: ClassVar[TrainingDefaults] = Objective.defaults

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Collect the classes of the labelled rows, and check that unlabelled rows exist."""
        labelled = [row for row in rows if isinstance(row, LabelledText)]
        if len(labelled) == len(rows):
            raise RecipeError(
                f"all {len(rows)} rows have labels, and semi_supervised needs unlabelled text "
                "too. Give a file with `data.mix=FILE=10` (ten rows per labelled row), or use "
                "objective classification",
                rule="data.all_labelled",
            )
        return super().fit(labelled, chat)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the whole text; unlabelled rows have the target -100 and ``unlabelled_weight``."""
        if isinstance(row, LabelledText):
            return super().encode(row, index, chat)
        example = chat.encode_input(row, index)
        weight_T = example.weight_T * np.float32(self.unlabelled_weight)
        return replace(example, weight_T=weight_T, target=np.array([NO_LABEL]))

    def prepare(self, start: RunStart) -> PreparedRows:
        """Assign the propagated label to each text whose share reaches the threshold."""
        import torch

        prepared = super().prepare(start)
        network, examples = start.network, start.examples

        # Mean pooling, also for decoders. `prepare` runs without dropout.
        points_NH = read_embeddings(network, Contrastive(pooling="mean"), examples, start.budget)
        graph_NN = neighbour_graph(points_NH, self.neighbours)
        known_N = torch.tensor([_label(example) for example in examples], device=network.device)

        def spread(labels_N: Tensor) -> tuple[Tensor, Tensor]:
            share_NC = propagate(graph_NN, labels_N, len(self.labels or ()), self.alpha)
            share_N, label_N = share_NC.max(-1)
            return share_N, torch.where(share_N > 0, label_N, NO_LABEL)

        share_N, found_N = spread(known_N)
        bare_N = known_N == NO_LABEL
        sure_N = bare_N & (share_N >= self.threshold) & (found_N != NO_LABEL)
        again_N = torch.zeros_like(bare_N)
        for fold in range(FOLDS):
            # Each labelled row is hidden once: a measure of the base model before any training.
            hidden_N = _fold(known_N, fold)
            _, label_N = spread(torch.where(hidden_N, NO_LABEL, known_N))
            again_N |= hidden_N & (label_N == known_N)
        start.note(
            f"{int(sure_N.sum()):,} of {int(bare_N.sum()):,} texts have a label of "
            f"{self.threshold:g} or more from their neighbours; with a fifth of the labels "
            f"hidden, {int(again_N.sum()) / int((~bare_N).sum()):.0%} of the hidden labels are "
            "recovered"
        )
        labels = torch.where(sure_N, found_N, known_N).tolist()
        labelled = [
            replace(example, target=np.array([label]))
            for example, label in zip(examples, labels, strict=True)
        ]
        return replace(prepared, examples=labelled)

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return the labelled rows in steps and measurements; a step has at least one row."""
        if changes == "none":
            return list(examples)
        labelled = [example for example in examples if _label(example) != NO_LABEL]
        # The engine divides by the weight of a step, so one row stays, with a loss of 0.
        return labelled or list(examples[:1] if changes == "random" else ())

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the weighted sum of cross-entropies; rows without a label add 0."""
        import torch
        from torch.nn import functional as F

        scores_RC = network.row_scores(batch).float()
        target_R = torch.from_numpy(np.concatenate(batch.tree.targets)).to(scores_RC.device)
        weight_R = scores_RC.new_tensor([example.weight for example in batch.tree.examples])
        each_R = F.cross_entropy(
            scores_RC, target_R, reduction="none", label_smoothing=self.label_smoothing
        )
        right_R = scores_RC.argmax(-1) == target_R
        known_R = weight_R * (target_R != NO_LABEL)
        parts_R = known_R * right_R
        return Loss(
            (each_R * weight_R).sum(), ratios={"accuracy": (parts_R.tolist(), known_R.tolist())}
        )


def _label(example: Example) -> int:
    assert example.target is not None
    return int(example.target[0])


def _fold(known_N: Tensor, fold: int) -> Tensor:
    """Return every fifth row of each class, starting with row ``fold``."""
    import torch

    chosen_N = torch.zeros_like(known_N, dtype=torch.bool)
    for label in known_N.unique().tolist():
        if label != NO_LABEL:
            chosen_N[(known_N == label).nonzero()[fold::FOLDS, 0]] = True
    return chosen_N


def neighbour_graph(points_NH: Tensor, neighbours: int) -> Tensor:
    """Return the sparse graph ``[N, N]`` of near points, normalised to ``D^-1/2 A D^-1/2``.

    ``points_NH`` are float32 of length 1; a point is not its own neighbour. Costs ``N^2 H``
    multiplications and a buffer of ``N * CHUNK`` numbers.
    """
    import torch

    count = len(points_NH)
    near = min(neighbours, count - 1)
    similarities, indices = [], []
    # Blocks of CHUNK rows: N x N similarities of 100,000 texts would take 40 GB.
    for start in range(0, count, CHUNK):
        cosine_MN = points_NH[start : start + CHUNK] @ points_NH.t()
        own_M = torch.arange(len(cosine_MN), device=points_NH.device)
        # A point must not be its own neighbour: its label would only confirm itself.
        cosine_MN[own_M, start + own_M] = -math.inf
        best_MK, index_MK = cosine_MN.topk(near)
        # max(0, cosine)^gamma, Iscen et al. section 3.2.
        similarities.append(best_MK.clamp(min=0) ** POWER)
        indices.append(index_MK)
    from_E = torch.arange(count, device=points_NH.device).repeat_interleave(near)
    to_E, weight_E = torch.cat(indices).flatten(), torch.cat(similarities).flatten()
    # Both directions of each edge, A + A^T; `coalesce` adds the weights of equal edges.
    both_2E = torch.stack([torch.cat([from_E, to_E]), torch.cat([to_E, from_E])])
    shape = (count, count)
    ties_NN = torch.sparse_coo_tensor(both_2E, weight_E.repeat(2), shape, check_invariants=True)
    ties_NN = ties_NN.coalesce()
    # A point without similar neighbours has degree 0, and 0 * inf would be NaN.
    degree_N = torch.sparse.sum(ties_NN, 1).to_dense().clamp(min=1e-12)
    one_E, other_E = ties_NN.indices()
    scaled_E = ties_NN.values() * (degree_N[one_E] * degree_N[other_E]) ** -0.5
    graph_NN = torch.sparse_coo_tensor(ties_NN.indices(), scaled_E, shape, check_invariants=True)
    return graph_NN.coalesce()


def propagate(graph_NN: Tensor, known_N: Tensor, classes: int, alpha: float) -> Tensor:
    """Return class probabilities ``[N, C]`` of each point; ``known_N`` is negative for unknown
    labels.

    Points without a path to a known label have zeros.
    """
    import torch

    known_NC = torch.zeros(len(known_N), classes, device=known_N.device)
    some_N = known_N >= 0
    known_NC[some_N, known_N[some_N]] = 1.0
    spread_NC = known_NC
    # alpha^n <= LEFT for n >= log(LEFT) / log(alpha): the rest of the series is small enough.
    for _ in range(max(HOPS, math.ceil(math.log(LEFT) / math.log(alpha)))):
        spread_NC = alpha * torch.sparse.mm(graph_NN, spread_NC) + known_NC
    return spread_NC / spread_NC.sum(-1, keepdim=True).clamp(min=1e-12)
