"""The base class of layers that wrap a frozen layer."""

from __future__ import annotations

from typing import Any

from torch import nn


class LayerWrapper(nn.Module):
    """A layer in the place of a frozen layer, which it holds under PEFT's name."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Any:
        """The frozen weight as the layer stores it.

        T5 and vision transformers read its type before they call a layer, and an output head may be
        tied to it.
        """
        return self.base_layer.weight
