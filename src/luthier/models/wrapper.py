"""Base class of layers that wrap a frozen layer."""

from __future__ import annotations

from typing import Any

from torch import nn


class LayerWrapper(nn.Module):
    """A layer that replaces a frozen layer and stores it under PEFT's name."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Any:
        """The frozen weight as stored.

        T5 and vision transformers read the weight's data type before calling a layer, and an output
        head may be tied to the weight.
        """
        return self.base_layer.weight
