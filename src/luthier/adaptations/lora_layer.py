"""The LoRA layer itself: one autograd node for the frozen product and its low-rank update.

The order of the two products matters in bfloat16. The update is a thousandth of the output in the
first steps and near the end of a schedule; added to an output that is already rounded, it falls below
half of the distance to the next number and most of it is lost (28 % of it at B = 2e-4, which is one
step of Adam). So the update comes first and the frozen product is added to it, in float32 inside the
matrix product, and rounded once. Same cost.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.rounding import Rounding


class _LowRankLinear(torch.autograd.Function):
    """``x W^T + b + s (x A^T) B^T``, ``W`` frozen; ``x [N, in]``, ``A [r, in]``, ``B [out, r]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        z = torch.mm(x, a.t())
        y = torch.mm(z * scale, b.t()).addmm_(x, weight.t())
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, z, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, z, weight, a, b = ctx.saved_tensors
        dz = torch.mm(grad, b).mul_(ctx.scale)
        db = torch.mm(grad.t(), z).mul_(ctx.scale)
        da = torch.mm(dz.t(), x)
        dx = torch.mm(dz, a).addmm_(grad, weight) if ctx.needs_input_grad[0] else None
        return dx, None, None, da, db, None


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank branch. Weight names are PEFT's."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        like: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **like)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        # Drawn in float32, as PEFT does, so that a seed gives the same start in every precision.
        start = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        with torch.no_grad():
            self.lora_A.weight.copy_(start)
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        a, b, base = self.lora_A.weight, self.lora_B.weight, self.base_layer
        flat = x.reshape(-1, x.shape[-1])
        if self.training and self.dropout.p > 0:
            z = nn.functional.linear(self.dropout(flat), a) * self.scale
            y = torch.addmm(torch.mm(z, b.t()), flat, base.weight.t())
            y = y if base.bias is None else y + base.bias
        else:
            y = _LowRankLinear.apply(flat, base.weight, base.bias, a, b, self.scale)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)

    def merged(self, rounding: Rounding) -> nn.Linear:
        """The base layer with the branch added to its weight; ``rounding`` brings it to its type."""
        with torch.no_grad():
            weight = self.base_layer.weight
            a, b = self.lora_A.weight.float(), self.lora_B.weight.float()
            sum_ = weight.to(torch.float32, copy=True).addmm_(b, a, alpha=self.scale)
            # New memory: writing into weights that are mapped from their file costs a page fault
            # and a copy for each 4 kB, half a second for SmolLM2-135M.
            self.base_layer.weight.data = rounding(sum_, weight.dtype)
        return self.base_layer
