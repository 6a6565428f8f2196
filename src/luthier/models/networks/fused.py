"""Fused replacements of slow modules.

transformers' ``RMSNorm`` needs eight passes over memory and stores two float32 copies of its input
for the backward pass. The replacement stores the input and one number per token. The fused SwiGLU
product does not store the activation. Both compute in float32 and round once, so results equal the
original up to rounding. :func:`fuse` compares both on random input first: similar modules with
other formulas (Gemma adds 1 to the weight) are not replaced. ``Dropout`` draws 16 bits per number
on a CPU; torch draws 32 bits with a slower kernel. A comparison is impossible there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.networks.layers import read_together


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Return the norm without the intermediate values that the gradient needs."""
    return _rms_norm(x, weight_H, epsilon)[0]


def _rms_norm(x: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x [..., H]`` and the reciprocal root mean square of each token."""
    rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    # rstd = (|x|^2 / H + epsilon)^(-1/2)
    rstd = rstd.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    if x.dtype == torch.float32:
        return (x * rstd).mul_(weight_H), rstd
    return x.float().mul_(rstd).mul_(weight_H).to(x.dtype), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        y, rstd = _rms_norm(x, weight_H, epsilon)
        ctx.save_for_backward(x, weight_H, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight_H, rstd = ctx.saved_tensors
        wide = x.float()
        scaled = grad.float() * weight_H
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (grad * wide.mul(rstd)).flatten(0, -2).sum(0).to(weight_H.dtype)
        # r g - r^3 x (g . x) / H, where g is the gradient times the weight
        along = torch.linalg.vecdot(scaled, wide)[..., None].mul_(rstd.pow(3)).div_(x.shape[-1])
        dx = scaled.mul_(rstd).addcmul_(wide, along, value=-1)
        return dx.to(x.dtype), dweight, None


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + epsilon)`` over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, weight_H: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight_H
        self.variance_epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``[..., H]``."""
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return normed


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        # y = silu(gate) * up: dgate = g * up * silu'(gate), dup = g * silu(gate).
        dgate = torch.ops.aten.silu_backward(grad * up, gate)
        return dgate, nn.functional.silu(gate).mul_(grad)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020), with the projections of the original."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` of shape ``[..., H]`` to the same shape."""
        inner = _SwiGLU.apply(*read_together([self.gate_proj, self.up_proj], x))  # type: ignore[no-untyped-call]
        down: Tensor = self.down_proj(inner)
        return down


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return torch.mul(x, kept).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return torch.mul(grad, kept).mul_(ctx.scale), None, None


class Dropout(nn.Dropout):
    """Dropout with a rate rounded to 1/65536.

    Random numbers come from torch's generator.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape."""
        share = round(self.p * 65536)
        if not (self.training and 0 < share < 65536 and x.device.type == "cpu"):
            return super().forward(x)
        # Each int64 contains four numbers of 16 bits. `random_` without an upper limit draws 64 bits.
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        # int16 is uniform in [-32768, 32767], so the probability to keep is 1 - share / 65536.
        kept = (bits.view(torch.int16)[: x.numel()] >= share - 32768).view(x.shape)
        dropped: Tensor = _Dropout.apply(x, kept, 65536 / (65536 - share))  # type: ignore[no-untyped-call]
        return dropped


def fuse(model: nn.Module) -> int:
    """Replace equivalent modules in place and return their number. Dropout layers are replaced but
    not counted."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # The exact class: subclasses may drop differently.
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p, child.inplace).train(child.training))
                continue
            fused = _fuse(child)
            if fused is not None and _same(child, fused):
                setattr(parent, name, fused)
                count += 1
    return count


def _fuse(module: nn.Module) -> nn.Module | None:
    kind = type(module).__name__
    if isinstance(module, RMSNorm | SwiGLU):
        return None
    # Each family has its own class, so the name selects and `_same` verifies the formula.
    if kind.endswith("RMSNorm") and isinstance(getattr(module, "variance_epsilon", None), float):
        return RMSNorm(module.weight, module.variance_epsilon)  # type: ignore[arg-type]
    activation = getattr(module, "act_fn", None)
    if kind.endswith("MLP") and type(activation).__name__ in ("SiLU", "SiLUActivation"):
        projections = [getattr(module, f"{part}_proj", None) for part in ("gate", "up", "down")]
        # Three projections and the activation: another child would change the formula.
        if len(list(module.children())) == 4 and all(isinstance(p, nn.Linear) for p in projections):
            return SwiGLU(*projections)  # type: ignore[arg-type]
    return None


def _same(original: nn.Module, fused: nn.Module) -> bool:
    """Return True if both modules agree on random input up to rounding."""
    weight = next(original.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 0.05
    with torch.no_grad():
        try:
            expected, got = original(x).float(), fused(x).float()
        except (RuntimeError, TypeError):
            return False
    if not expected.isfinite().all():
        return False
    return torch.allclose(
        expected, got, atol=tolerance * float(expected.abs().max()), rtol=tolerance
    )
