"""The bottleneck of the adapters method."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.row_adapters import LayerWrapper, RowUpdate


class Bottleneck(LayerWrapper):
    """A frozen projection and the residual bottleneck after it; ``[..., in]`` to ``[..., hidden]``."""

    def __init__(self, base: nn.Module, hidden: int, width: int, activation: str) -> None:
        super().__init__(base)
        like: dict[str, Any] = {"dtype": self.weight.dtype, "device": self.weight.device}
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

    def forward(self, x: Tensor) -> Tensor:
        """The projection of ``x`` plus the bottleneck of it."""
        y: Tensor = self.base_layer(x)
        narrow = self.activation(self.adapter_down(y))
        widened: Tensor = self.adapter_up(narrow)
        return y + widened

    def row_updates(self) -> Sequence[RowUpdate]:
        """The bottleneck of what the projection gives (see :mod:`luthier.models.row_adapters`)."""
        down, up = self.adapter_down, self.adapter_up
        weights = down.weight.t(), down.bias[None], up.weight.t(), up.bias[None]
        kind = Bottleneck, type(self.activation)
        return [RowUpdate(partial(_bottlenecks, self.activation), weights, kind, reads_output=True)]


def _bottlenecks(
    activation: nn.Module,
    y_PMH: Tensor,
    down_PHw: Tensor,
    down_P1w: Tensor,
    up_PwH: Tensor,
    up_P1H: Tensor,
) -> Tensor:
    """What ``P`` bottlenecks add to ``M`` outputs each, ``[P, M, hidden]``."""
    narrow = activation(torch.baddbmm(down_P1w, y_PMH, down_PHw))
    return torch.baddbmm(up_P1H, narrow, up_PwH)
