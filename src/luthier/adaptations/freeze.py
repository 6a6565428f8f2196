"""Layer freezing: only some of the stacked layers move (Howard & Ruder 2018; Lee et al. 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from luthier.adaptations.base import Adaptation
from luthier.models.layers import layer_names, layer_positions

if TYPE_CHECKING:
    from torch import nn


class Freeze(Adaptation):
    """Keep a share of the layers as they are and train the rest."""

    method: Literal["freeze"] = "freeze"
    frozen: Literal["bottom", "top", "alternate"] = "bottom"
    """Which layers stay: the ones next to the input, next to the output, or spread evenly."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the layers that stays frozen."""

    def adapt(self, model: nn.Module) -> None:
        """Freeze the chosen layers, and what is below the stack unless the bottom layers train.

        What stands above it (final norm, output head) trains unless the top is frozen. A head tied
        to the input embedding follows the embedding.
        """
        layers = layer_names(model)
        frozen = {index + 1 for index in self._frozen(len(layers))}
        weights = dict(model.named_parameters())
        for name, position in layer_positions(weights, layers).items():
            weights[name].requires_grad_(min(max(position, 1), len(layers)) not in frozen)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """As for full fine-tuning: the layers that move are the network's own."""
        return 5e-5, "the layers that train are the network's own: 5e-5, as for full fine-tuning"

    def _frozen(self, count: int) -> list[int]:
        size = min(max(1, round(self.share * count)), count - 1)
        if self.frozen == "bottom":
            return list(range(size))
        if self.frozen == "top":
            return list(range(count - size, count))
        return sorted({index * count // size for index in range(size)})
