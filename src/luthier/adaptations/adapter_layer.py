"""The bottleneck of the adapters method."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A frozen projection and the residual bottleneck after it; ``[..., in]`` to ``[..., hidden]``."""

    reads_output: ClassVar[bool] = True

    def __init__(self, base: nn.Module, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        weight: Tensor = base.weight  # type: ignore[assignment]
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.base_layer = base
        self.adapter_down = nn.Linear(hidden, width, **like)
        self.adapter_up = nn.Linear(width, hidden, **like)
        self.activation = nn.GELU() if activation == "gelu" else nn.ReLU()
        # Drawn in float32, so that a seed gives the same start in every precision.
        start = torch.empty(width, hidden).normal_(std=0.02)
        with torch.no_grad():
            self.adapter_down.weight.copy_(start)
            self.adapter_down.bias.zero_()
            self.adapter_up.weight.zero_()
            self.adapter_up.bias.zero_()

    @property
    def weight(self) -> Tensor:
        """The frozen projection's weight, for networks that ask for its type (T5)."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """The projection of ``x`` plus the bottleneck of it."""
        y: Tensor = self.base_layer(x)
        narrow = self.activation(self.adapter_down(y))
        widened: Tensor = self.adapter_up(narrow)
        return y + widened

    def row_weights(self) -> tuple[Tensor, ...]:
        """Both matrices, transposed, and biases (see :mod:`luthier.models.row_adapters`)."""
        down, up = self.adapter_down, self.adapter_up
        return down.weight.t(), down.bias[None], up.weight.t(), up.bias[None]

    @property
    def row_kind(self) -> Hashable:
        """Bottlenecks that bend in the same way."""
        return Bottleneck, type(self.activation)

    def row_update(self, x_PMI: Tensor, *weights: Tensor) -> Tensor:
        """What ``P`` bottlenecks add to ``M`` outputs each, ``[P, M, hidden]``."""
        down_PHw, down_P1w, up_PwH, up_P1H = weights
        narrow = self.activation(torch.baddbmm(down_P1w, x_PMI, down_PHw))
        return torch.baddbmm(up_P1H, narrow, up_PwH)
