"""The bottlenecks of the adapters method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.models.wrapper import LayerWrapper


class _ResidualBottleneck(LayerWrapper):
    """A frozen layer followed by ``y + up(activation(down(y)))``."""

    new_layer: ClassVar[Callable[..., nn.Module]]
    """Constructor of the two layers, called with the numbers of inputs and outputs."""
    adapter_down: Any
    adapter_up: Any

    def __init__(self, base: Any, hidden: int, width: int, activation: str) -> None:
        super().__init__(base)
        like: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.adapter_down = self.new_layer(hidden, width, **like)
        self.adapter_up = self.new_layer(width, hidden, **like)
        self.activation = nn.GELU() if activation == "gelu" else nn.ReLU()
        # Drawn in float32, so that a seed gives the same start in every precision.
        start = torch.empty(self.adapter_down.weight.shape).normal_(std=0.02)
        with torch.no_grad():
            self.adapter_down.weight.copy_(start)
            self.adapter_down.bias.zero_()
            # up = 0: the network starts as the base network, to the bit.
            self.adapter_up.weight.zero_()
            self.adapter_up.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output plus the bottleneck's."""
        y: Tensor = self.base_layer(x)
        narrow = self.activation(self.adapter_down(y))
        widened: Tensor = self.adapter_up(narrow)
        return y + widened


class Bottleneck(_ResidualBottleneck):
    """After a projection; ``[..., in]`` to ``[..., hidden]``."""

    new_layer = nn.Linear


class ConvBottleneck(_ResidualBottleneck):
    """After a convolution, of 1 x 1 convolutions; ``[R, C, H, W]`` to ``[R, C', H', W']``."""

    new_layer = staticmethod(partial(nn.Conv2d, kernel_size=1))

    def __init__(self, base: Any, channels: int, width: int, activation: str) -> None:
        super().__init__(base, channels, width, activation)
        # MobileNetV2 reads these attributes before calling the layer, to pad the image.
        self.kernel_size, self.stride, self.dilation = base.kernel_size, base.stride, base.dilation


def bottleneck_after(
    base: Any, reduction_factor: float, activation: str
) -> Bottleneck | ConvBottleneck:
    """Return a bottleneck after ``base`` that is ``reduction_factor`` times narrower than the
    layer's output."""
    layer = base
    while isinstance(layer, LayerWrapper):  # the base of this model has bottlenecks of its own
        layer = layer.base_layer
    # GPT-2's Conv1D stores [in, out], so its outputs are `nf`, not the first dimension.
    outputs = int(getattr(layer, "nf", layer.weight.shape[0]))
    kind = ConvBottleneck if base.weight.dim() == 4 else Bottleneck
    return kind(base, outputs, max(1, round(outputs / reduction_factor)), activation)
