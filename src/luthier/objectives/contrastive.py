"""Contrastive learning of embeddings: a text near its partner, far from the others of the batch.

InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) on the cosines of all pairs of a batch. With
pairs of texts the partner is given; with single texts it is the same text under other dropout
(SimCSE, Gao et al. 2021, arXiv:2104.08821). A batch larger than memory is computed in
micro-batches: embeddings first without gradient, then the gradient of each embedding, then each
micro-batch again with that gradient (gradient caching, Gao et al. 2021, arXiv:2101.06983), so that
the loss is that of the whole batch. Left out: hard negatives, and SimCSE's extra layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.shapes import RawText, TextPair
from luthier.errors import RecipeError
from luthier.models.heads import Task
from luthier.objectives.base import Objective
from luthier.objectives.classification import cut_text
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch


@dataclass(frozen=True)
class _Cached:
    """What the second pass over a micro-batch needs of the first."""

    gradient_RH: Tensor
    """Gradient of the loss by the embeddings."""
    loss: float
    """The part of the loss that is counted with this micro-batch."""
    metrics: dict[str, float]
    """The parts of the metrics."""
    random: tuple[Tensor, list[Tensor]]
    """State of the random numbers before the first pass: dropout must fall alike."""


class Contrastive(Objective):
    """Embeddings that bring partners together."""

    method: Literal["contrastive"] = "contrastive"
    temperature: float = Field(default=0.05, gt=0, le=1000)
    """Cosines are divided by it; smaller presses harder on the nearest others."""
    symmetric: bool = True
    """Look for the partner in both directions."""
    pooling: Literal["auto", "mean", "first", "last"] = "auto"
    """What stands for a text; ``auto``: the mean if the network sees both ways, else the last token."""

    task: ClassVar[Task] = "embedding"
    shapes: ClassVar[frozenset[str]] = frozenset({"pair", "text"})
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"pair"})
    contrasts_rows: ClassVar[bool] = True
    allows_augmentation: ClassVar[bool] = True

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Check that single texts can have two views."""
        if (
            not all(isinstance(row, TextPair) for row in rows)
            and chat.tokenizer.mask_token_id is None
        ):
            raise RecipeError(
                "single texts are learned from two views under dropout, which this kind of network "
                'has none of. Give pairs: {"anchor": "...", "positive": "..."}.'
            )
        return self

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """The anchor; ``target`` holds the ids of its partner."""
        example = chat.encode_input(row, index)
        partner = example
        if isinstance(row, TextPair):
            partner = chat.encode_input(RawText(row.file, row.line, row.positive), index)
        return replace(example, target=partner.ids_T)

    def truncate(self, example: Example, context: int) -> Example:
        """Keep start and closing token of both sides."""
        anchor, partner = (
            cut_text(side, context) if len(side) > context else side
            for side in self.sequences(example)
        )
        return replace(anchor, row=example.row, target=partner.ids_T)

    def sequences(self, example: Example) -> list[Example]:
        """Both sides as rows of their own, numbered ``2 row`` and ``2 row + 1``."""
        assert example.target is not None
        ids_T, empty = np.asarray(example.target, dtype=np.int64), np.zeros(0)
        nothing = np.zeros(len(ids_T), dtype=np.float32)
        return [
            replace(example, row=2 * example.row, target=empty),
            Example(ids_T, nothing, 2 * example.row + 1, target=empty),
        ]

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """For batches of several micro-batches: all embeddings, and the gradient of each."""
        import torch

        batches = super().annotate(network, examples, budget)
        if len(batches) == 1:
            return batches
        states, parts = [], []
        for batch in batches:
            states.append(_random_state(network))
            parts.append(self.embed(network, batch))
        with torch.enable_grad():
            all_RH = torch.cat(parts).detach().requires_grad_()
            order = [example for batch in batches for example in batch.tree.examples]
            whole = self._info_nce(all_RH, order)
            (gradient_RH,) = torch.autograd.grad(whole.total, all_RH)
        found = []
        split = gradient_RH.split([len(part) for part in parts])
        for batch, gradient, state in zip(batches, split, states, strict=True):
            share = len(gradient) / len(order)
            total = float(whole.total.detach()) * share
            metrics = {name: value * share for name, value in whole.metrics.items()}
            right = float(np.sum(whole.ratios["accuracy"][0])) * share
            cached = _Cached(gradient, total, {**metrics, "accuracy": right}, state)
            found.append(replace(batch, extra=cached))
        return found

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed InfoNCE over the anchors of the batch."""
        cached = batch.extra
        if cached is None:
            embeddings_RH = self.embed(network, batch)
            return self._info_nce(embeddings_RH, batch.tree.examples)
        with _random_numbers(network, cached.random):
            embeddings_RH = self.embed(network, batch)
        product = (embeddings_RH * cached.gradient_RH).sum()
        # The value is the loss, the gradient that of the embeddings.
        value = product + (cached.loss - product.detach())
        return Loss(value, cached.metrics)

    def embed(self, network: Network, batch: TreeBatch) -> Tensor:
        """Embeddings ``[R, H]`` of length 1 in float32, in the order of the tree."""
        from torch.nn.functional import normalize

        pooling = self.pooling
        if pooling == "auto":
            pooling = "mean" if network.both_ways else "last"
        return normalize(network.row_states(batch, pooling).float(), dim=-1)

    def _info_nce(self, embeddings_RH: Tensor, sides: Sequence[Example]) -> Loss:
        """Summed loss over the pairs, and how many anchors are nearest to their own partner.

        Pairs of one anchor, or of one partner, are not told from each other: what the file calls right
        would else count as wrong. ``chance_loss`` is that of embeddings which are all alike.
        """
        import torch
        from torch.nn.functional import cross_entropy

        place = {side.row: index for index, side in enumerate(sides)}
        anchors = sorted(row for row in place if row % 2 == 0)
        anchor_PH = embeddings_RH[[place[row] for row in anchors]]
        partner_PH = embeddings_RH[[place[row + 1] for row in anchors]]
        scores_PP = anchor_PH @ partner_PH.t() / self.temperature
        own_P = torch.arange(len(anchors), device=scores_PP.device)
        same_PP = np.zeros((len(anchors), len(anchors)), dtype=bool)
        for side in (0, 1):
            texts = [sides[place[row + side]].ids_T.tobytes() for row in anchors]
            _, text_P = np.unique(np.array(texts, dtype=object), return_inverse=True)
            same_PP |= text_P[:, None] == text_P
        np.fill_diagonal(same_PP, False)
        if same_PP.any():
            same = torch.from_numpy(same_PP).to(scores_PP.device)
            scores_PP = scores_PP.masked_fill(same, float("-inf"))
        each_P = cross_entropy(scores_PP, own_P, reduction="none")
        if self.symmetric:
            each_P = (each_P + cross_entropy(scores_PP.t(), own_P, reduction="none")) / 2
        right_P = (scores_PP.argmax(-1) == own_P).tolist()
        chance = float(np.log((~same_PP).sum(1)).sum())
        ratios = {"accuracy": (right_P, [1] * len(right_P))}
        return Loss.of_rows(each_P, {"chance_loss": chance}, ratios)

    def describe(self, example: Example) -> str:
        """How long the partner is; its text is in the file."""
        return f"with a partner of {len(np.asarray(example.target))} tokens"

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """For each row in the order of the tree: its embedding."""
        return [{"embedding": row.tolist()} for row in self.embed(network, batch)]


def _cuda(network: Network) -> list[Any]:
    """The device whose random numbers dropout draws, if it is not the processor."""
    return [network.device] if network.device.type == "cuda" else []


def _random_state(network: Network) -> tuple[Tensor, list[Tensor]]:
    import torch

    return torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in _cuda(network)]


@contextmanager
def _random_numbers(network: Network, state: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """Draw again what was drawn after ``state``; what follows is drawn as without this."""
    import torch

    with torch.random.fork_rng(devices=_cuda(network)):
        torch.set_rng_state(state[0])
        for device, numbers in zip(_cuda(network), state[1], strict=True):
            torch.cuda.set_rng_state(numbers, device)
        yield
