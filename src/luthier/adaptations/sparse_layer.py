"""A linear layer with a few trained weights.

The product uses a copy of the frozen weight with the trained values: one dense product, with the
rounding of full fine-tuning, for which the engine has float32 master weights and stochastic
rounding. The copy exists during one product, and the backward pass builds the copy again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.wrapper import LayerWrapper


class SparseLinear(LayerWrapper):
    """``x W^T + b`` with trained weights ``values [k]`` at the flat indices ``places [k]``.

    Indices are ascending and count through the base layer's contiguous weight. The default choice
    is the largest magnitudes; :meth:`choose` uses other scores. Indices are stored with the values,
    because the largest weights depend on the loaded type of the base model, and Fisher scores on
    training rows.
    """

    places: Tensor

    def __init__(self, base: Any, share: float) -> None:
        super().__init__(base)
        weight = base.weight.detach()
        count = max(1, round(share * weight.numel()))
        self.values = nn.Parameter(weight.new_empty(count))
        # int32 takes half of the memory and file size of int64.
        self.register_buffer("places", torch.empty(count, dtype=torch.int32, device=weight.device))
        self.choose(weight.abs())
        # GPT-2's Conv1D keeps its weight as [in, out].
        self.transposed = not isinstance(base, nn.Linear)

    @torch.no_grad()
    def choose(self, score: Tensor) -> None:
        """Train the weights with the highest ``score`` (shape of the base layer's weight), from
        their base values."""
        chosen = torch.topk(score.reshape(-1), len(self.places)).indices.sort().values
        self.places.copy_(chosen)
        self.values.copy_(self.base_layer.weight.detach().reshape(-1)[chosen])

    def whole_weight(self) -> Tensor:
        """Return a copy of the base layer's weight with the trained values."""
        weight: Tensor = self.base_layer.weight.detach().clone(
            memory_format=torch.contiguous_format
        )
        # `index_copy_` requires int64. Detached, because _SparseProduct computes the gradient.
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
        """Return the base layer with the trained values."""
        self.base_layer.weight.data = self.whole_weight()
        base: nn.Module = self.base_layer
        return base


class _SparseProduct(torch.autograd.Function):
    """``x W^T``; the weight's gradient is computed completely and stored at the chosen indices
    only."""

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
        # dW = dY^T X, or X^T dY for a weight [in, out]; dense, but for one layer at a time.
        dweight = torch.mm(x.t(), grad) if layer.transposed else torch.mm(grad.t(), x)
        dvalues = dweight.view(-1)[layer.places]
        if not ctx.needs_input_grad[0]:
            return None, dvalues, None
        weight = layer.whole_weight()
        return torch.mm(grad, weight.t() if layer.transposed else weight), dvalues, None
