"""A linear layer of which a few weights train.

The product is taken with a copy of the frozen weight that has the trained values in their places: one
dense product, as before, and rounding to bfloat16 is that of full fine-tuning, which the engine's
float32 masters and stochastic rounding take care of. The copy lives for one product and is made again
in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.wrapper import LayerWrapper


class SparseLinear(LayerWrapper):
    """``x W^T + b``, where the weights at ``places [k]`` are ``values [k]`` and train.

    Places count through the base layer's weight as it lies in memory, ascending: those of the largest
    magnitude, until :meth:`choose` is given other scores. They are kept beside the values, since which
    weights are largest depends on the type a base is loaded in, and on rows that are not at hand later.
    """

    places: Tensor

    def __init__(self, base: Any, share: float) -> None:
        super().__init__(base)
        weight = base.weight.detach()
        count = max(1, round(share * weight.numel()))
        self.values = nn.Parameter(weight.new_empty(count))
        self.register_buffer("places", torch.empty(count, dtype=torch.int32, device=weight.device))
        self.choose(weight.abs())
        # GPT-2's Conv1D keeps its weight as [in, out].
        self.transposed = not isinstance(base, nn.Linear)

    @torch.no_grad()
    def choose(self, score: Tensor) -> None:
        """Train the weights of the highest ``score``, of the base layer's shape, from its values."""
        chosen = torch.topk(score.reshape(-1), len(self.places)).indices.sort().values
        self.places.copy_(chosen)
        self.values.copy_(self.base_layer.weight.detach().reshape(-1)[chosen])

    def whole_weight(self) -> Tensor:
        """A new copy of the base layer's weight with the values in their places."""
        weight: Tensor = self.base_layer.weight.detach().clone(
            memory_format=torch.contiguous_format
        )
        weight.view(-1).index_copy_(0, self.places.long(), self.values.detach())
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        if self.base_layer.weight.requires_grad:  # all weights are being scored
            whole: Tensor = self.base_layer(x)
            return whole
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _SparseProduct.apply(flat, self.values, self)  # type: ignore[no-untyped-call]
        if self.base_layer.bias is not None:
            y = y + self.base_layer.bias
        return y.view(*x.shape[:-1], -1)

    def merge(self) -> nn.Module:
        """The base layer with the values in their places."""
        self.base_layer.weight.data = self.whole_weight()
        base: nn.Module = self.base_layer
        return base


class _SparseProduct(torch.autograd.Function):
    """``x W^T``; the gradient of the weight is taken whole and kept at the chosen places only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layer: SparseLinear) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        weight = layer.whole_weight()
        return torch.mm(x, weight if layer.transposed else weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, _ = ctx.saved_tensors
        layer: SparseLinear = ctx.layer
        dweight = torch.mm(x.t(), grad) if layer.transposed else torch.mm(grad.t(), x)
        dvalues = dweight.view(-1)[layer.places]
        if not ctx.needs_input_grad[0]:
            return None, dvalues, None
        weight = layer.whole_weight()
        return torch.mm(grad, weight.t() if layer.transposed else weight), dvalues, None
