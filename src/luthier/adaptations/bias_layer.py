"""The layer of a network that shares all but its biases with another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from luthier.models.row_adapters import LayerWrapper, RowUpdate, Weight


class BiasLayer(LayerWrapper):
    """A layer that adds a bias to its output, with another bias; ``[..., in]`` to ``[..., out]``.

    It stands where models are served: in training the network's own biases move.
    """

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.bias = nn.Parameter(base.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives of ``x``, plus what the bias differs by."""
        y: Tensor = self.base_layer(x)
        return y + self._difference_O()

    def row_updates(self) -> Sequence[RowUpdate]:
        """The difference (see :mod:`luthier.models.row_adapters`)."""
        return [RowUpdate(_shift, (self._difference_O(),), BiasLayer, reads_output=True)]

    def _difference_O(self) -> Tensor:
        difference_O: Tensor = self.bias - self.base_layer.bias
        return difference_O


def _shift(y_RO: Tensor, difference_O: Weight) -> Tensor:
    return difference_O.at_rows().expand_as(y_RO)
