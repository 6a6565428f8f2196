"""Layer freezing: training a part of the stacked layers (Howard & Ruder 2018; Lee et al. 2019).

``interval`` trains every ``n``-th layer and the last layer, at equal distances; ``n`` follows from
``share``. If no ``n`` gives the share, the error lists the possible shares. ``alternate`` accepts
any share and spreads the *frozen* layers at distances that differ by at most 1. With a share of 0.5
and an even number of layers, both freeze equal layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from luthier.adaptations.base import Adaptation, full_rate
from luthier.errors import RecipeError
from luthier.models.networks.layers import layer_names, layer_positions

if TYPE_CHECKING:
    from torch import nn


class Freeze(Adaptation):
    """Train a part of the layers and freeze a share of the layers.

    Use ``lora`` for small files: ``freeze`` stores the whole network.
    """

    method: Literal["freeze"] = "freeze"
    frozen: Literal["bottom", "top", "alternate", "interval"] = "bottom"
    """Frozen layers: bottom, top, spread evenly, or all but every n-th (equal at share 0.5)."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Fraction of frozen layers."""

    stores_network: ClassVar[bool] = True
    new_head_rate: ClassVar[float] = 10.0

    def adapt(self, model: nn.Module) -> None:
        """Freeze the chosen layers, and everything below the stack unless the bottom layers train.

        Layers above the stack (final norm, output head) train unless the top is frozen. A head tied
        to the input embedding follows the embedding.
        """
        layers = layer_names(model)
        frozen = {index + 1 for index in self._frozen(len(layers))}
        weights = dict(model.named_parameters())
        for name, position in layer_positions(weights, layers).items():
            # Weights below the stack (position 0) follow the bottom layer, above it the top layer.
            weights[name].requires_grad_(min(max(position, 1), len(layers)) not in frozen)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Return the rate of full fine-tuning, because trained layers are the network's own."""
        reason = f"the layers that train are the network's own: as for full tuning (width {hidden})"
        return float(f"{full_rate(hidden):.1e}"), reason

    def _frozen(self, count: int) -> list[int]:
        # At least one layer is frozen, and at least one layer trains.
        size = min(max(1, round(self.share * count)), count - 1)
        if self.frozen == "bottom":
            return list(range(size))
        if self.frozen == "top":
            return list(range(count - size, count))
        if self.frozen == "alternate":
            return sorted({index * count // size for index in range(size)})
        trained = _every(count, self._interval(count))
        return [index for index in range(count) if index not in trained]

    def _interval(self, count: int) -> int:
        """Return the ``n`` whose share is within half a layer of the requested share."""
        steps = range(2, count + 1)
        missed = {n: abs(count - len(_every(count, n)) - self.share * count) for n in steps}
        best = min(steps, key=missed.__getitem__)
        if missed[best] > 0.5:
            shares = dict.fromkeys(1 - len(_every(count, n)) / count for n in steps)
            raise RecipeError(
                f"`adaptation.share={self.share:g}` is not possible with frozen=interval and "
                f"{count} layers, only {', '.join(f'{share:.3g}' for share in shares)}. Use a "
                "possible share, or frozen=alternate.",
                rule="freeze.share",
            )
        return best


def _every(count: int, step: int) -> range:
    """Return every ``step``-th of ``count`` layers, counted from the last."""
    return range((count - 1) % step, count, step)
