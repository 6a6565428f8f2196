"""The layers of LoRA and DoRA; for LoRA, one autograd node for the frozen product and the update.

The order of the two products matters in bfloat16. The update is a thousandth of the output in the
first steps and near the end of a schedule. Added to a rounded output, most of the update is below
half of the distance to the next number and is lost (28 % at B = 2e-4, one step of Adam). Therefore
the update is computed first, and the frozen product is added in float32 inside the matrix product
and rounded once, at the same cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.models.decoding.packing import packed_weight
from luthier.models.networks.fused import Dropout
from luthier.models.rounding import Rounding
from luthier.models.wrapper import LayerWrapper


class FrozenWeight(Protocol):
    """A layer with a frozen weight; a packed layer computes ``weight_OI`` at each use."""

    @property
    def weight_OI(self) -> Tensor:
        """The weight, ``[out, in]``."""
        ...


class LowRankLayer(FrozenWeight, Protocol):
    """A frozen layer with a low-rank branch."""

    @property
    def scale(self) -> float:
        """Factor of the branch's output."""
        ...


class _FrozenProduct(torch.autograd.Function):
    """``x W^T``, added to the optional ``onto [N, out]`` and rounded once.

    The backward pass keeps the layer instead of its weight, because the weight may be packed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenWeight, onto: Tensor | None) -> Tensor:
        ctx.layer = layer
        weight_IO = layer.weight_OI.t()
        return torch.mm(x, weight_IO) if onto is None else torch.addmm(onto, x, weight_IO)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        # dX = dY W; a packed weight is dequantized again here.
        dx = torch.mm(grad, ctx.layer.weight_OI) if ctx.needs_input_grad[0] else None
        return dx, None, grad if ctx.needs_input_grad[2] else None


def frozen_product(x: Tensor, layer: FrozenWeight, onto: Tensor | None = None) -> Tensor:
    """``x [N, in]`` times the transposed weight of ``layer``, added to ``onto [N, out]``."""
    y: Tensor = _FrozenProduct.apply(x, layer, onto)  # type: ignore[no-untyped-call]
    return y


class _LowRankLinears(torch.autograd.Function):
    """``x W^T + b + s (x A^T) B^T`` of layers with one input ``x [N, in]``; ``W`` and ``b`` are
    frozen.

    Arguments are ``A [r, in]`` of each layer, then ``B [out, r]`` of each layer. All ``x A^T`` are
    one product, and so are their gradients: a narrow product takes as long for three layers as for
    one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Sequence[LowRankLayer],
        biases: Sequence[Tensor | None],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        # Z = X A^T for all layers at once. Layer i has the columns Z_i of Z:
        # Y_i = X W_i^T + s Z_i B_i^T.
        a_ZI, b_each = _join_factors(weights[: len(layers)]), weights[len(layers) :]
        z_NZ = torch.mm(x, a_ZI.t())
        y_each = []
        for layer, bias, b, z in zip(layers, biases, b_each, _parts(z_NZ, b_each), strict=True):
            # addmm_ accumulates in float32 and rounds once (see the top of this file).
            y = torch.mm(z * layer.scale, b.t()).addmm_(x, layer.weight_OI.t())
            if bias is not None:
                y += bias
            y_each.append(y)
        # `x A^T` is rank numbers per token: storing is cheaper than computing again.
        ctx.save_for_backward(x, z_NZ, *weights)
        ctx.layers = layers
        return tuple(y_each)

    @staticmethod
    # Products with `out=` and in place record no graph, so a second derivative would be wrong.
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z_NZ, *weights = ctx.saved_tensors
        layers: Sequence[LowRankLayer] = ctx.layers
        a_ZI, b_each = _join_factors(weights[: len(layers)]), weights[len(layers) :]
        # dZ_i = s dY_i B_i, dB_i = s dY_i^T Z_i, dA = dZ^T X, dX = dZ A + sum_i dY_i W_i.
        # With one buffer for all dZ_i, dA and dZ A are one product each.
        dz_NZ = torch.empty_like(z_NZ)
        db_each = []
        for layer, b, grad, z, dz in zip(
            layers, b_each, grads, _parts(z_NZ, b_each), _parts(dz_NZ, b_each), strict=True
        ):
            torch.mm(grad, b, out=dz).mul_(layer.scale)
            db_each.append(torch.mm(grad.t(), z).mul_(layer.scale))
        da_each = torch.mm(dz_NZ.t(), x).split([b.shape[1] for b in b_each])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dz_NZ, a_ZI)
            for layer, grad in zip(layers, grads, strict=True):
                # In place: one buffer for the gradients of all layers with the same input.
                dx.addmm_(grad, layer.weight_OI)
        return dx, None, None, *da_each, *db_each


def _join_factors(a_each: Sequence[Tensor]) -> Tensor:
    return a_each[0] if len(a_each) == 1 else torch.cat([*a_each])


def _parts(z_NZ: Tensor, b_each: Sequence[Tensor]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = torch.split(z_NZ, [b.shape[1] for b in b_each], 1)
    return parts


def _low_rank_products(
    x_NI: Tensor, layers: Sequence[LoRALinear], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    weights = [layer.lora_A.weight for layer in layers] + [layer.lora_B.weight for layer in layers]
    y_each: tuple[Tensor, ...] = _LowRankLinears.apply(x_NI, layers, biases, *weights)  # type: ignore[no-untyped-call]
    return y_each


class LoRALinear(LayerWrapper):
    """A frozen linear layer with a trained low-rank branch. Weight names are PEFT's."""

    def __init__(self, base: Any, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        weight_OI = self.weight_OI
        like: dict[str, Any] = {"dtype": weight_OI.dtype, "device": weight_OI.device}
        outputs, inputs = weight_OI.shape
        self.lora_A = nn.Linear(inputs, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, outputs, bias=False, **like)
        self.scale = scale
        self.dropout = Dropout(dropout)
        # Drawn in float32, as PEFT does, so that a seed gives the same start in every precision.
        start = torch.empty(rank, inputs)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        with torch.no_grad():
            self.lora_A.weight.copy_(start)
            # B A = 0: training starts at the base model.
            self.lora_B.weight.zero_()

    @property
    def weight_OI(self) -> Tensor:
        """The frozen weight as ``[out, in]``; GPT-2's ``Conv1D`` stores the transposed weight."""
        weight: Tensor = self.base_layer.weight
        return weight if isinstance(self.base_layer, nn.Linear) else weight.t()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        y = self._product(x.reshape(-1, x.shape[-1]), self.base_layer.bias)
        return y.view(*x.shape[:-1], -1)

    @property
    def _drops(self) -> bool:
        """True if dropout gives the branch another input than the frozen layer."""
        return self.training and self.dropout.p > 0

    @property
    def _is_plain(self) -> bool:
        """True if :class:`_LowRankLinears` computes the layer's product."""
        hooks = (
            self._forward_pre_hooks,
            self._forward_hooks,
            self._backward_pre_hooks,
            self._backward_hooks,
        )
        # The joint product does not call the layer, so hooks of the layer would not run.
        return packed_weight(self.base_layer) is None and not self._drops and not any(hooks)

    @classmethod
    def read_together(cls, layers: Sequence[Any], x: Tensor) -> list[Tensor] | None:
        """See :func:`luthier.models.networks.layers.read_together`."""
        # The exact class: DoRA, a subclass, multiplies the product afterwards.
        if not all(type(layer) is LoRALinear and layer._is_plain for layer in layers):
            return None
        biases = [layer.base_layer.bias for layer in layers]
        y_each = _low_rank_products(x.reshape(-1, x.shape[-1]), layers, biases)
        return [y.view(*x.shape[:-1], -1) for y in y_each]

    def _product(self, flat: Tensor, bias: Tensor | None) -> Tensor:
        """Map ``[N, in]`` to ``[N, out]``, the update first (see the top of this file)."""
        a, b = self.lora_A.weight, self.lora_B.weight
        if (packed := packed_weight(self.base_layer)) is not None:  # decoding, without gradients
            y = packed.with_branch(flat, a, b, self.scale)
            return y if bias is None else y + bias
        if not self._drops:
            (y,) = _low_rank_products(flat, [self], [bias])
            return y
        z = nn.functional.linear(self.dropout(flat), a) * self.scale
        y = frozen_product(flat, self, torch.mm(z, b.t()))
        return y if bias is None else y + bias

    def merge(self, rounding: Rounding) -> nn.Module:
        """Return the base layer with the branch added to the weight; ``rounding`` casts to the
        weight's type."""
        with torch.no_grad():
            merged_OI = rounding(self._merged_OI(), self.weight_OI.dtype)
            # New memory: writing into weights that are mapped from their file costs a page fault
            # and a copy for each 4 kB, half a second for SmolLM2-135M.
            straight = isinstance(self.base_layer, nn.Linear)
            self.base_layer.weight.data = merged_OI if straight else merged_OI.t().contiguous()
        base: nn.Module = self.base_layer
        return base

    def _merged_OI(self) -> Tensor:
        """Weight plus update in float32."""
        a, b = self.lora_A.weight.float(), self.lora_B.weight.float()
        # `copy=True`: a float32 weight would be returned as is, and `addmm_` would change the base.
        return self.weight_OI.to(torch.float32, copy=True).addmm_(b, a, alpha=self.scale)


class LoRAConv2d(LayerWrapper):
    """A frozen convolution with a trained low-rank branch: the kernels of ``A``, then 1 x 1 kernels
    of ``B``, as in PEFT.

    Grouped convolutions have few weights and stay unchanged.
    """

    def __init__(self, base: nn.Conv2d, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        like: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        places: dict[str, Any] = {
            name: getattr(base, name) for name in ("stride", "padding", "dilation")
        }
        kernel: Any = base.kernel_size
        # The class of the base layer, because subclasses of Conv2d may pad in another way.
        self.lora_A = type(base)(base.in_channels, rank, kernel, bias=False, **places, **like)
        self.lora_B = nn.Conv2d(rank, base.out_channels, 1, bias=False, **like)
        self.scale = scale
        self.dropout = Dropout(dropout)
        # Drawn in float32, as in :class:`LoRALinear`.
        start = torch.empty(self.lora_A.weight.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        with torch.no_grad():
            self.lora_A.weight.copy_(start)
            self.lora_B.weight.zero_()
        # MobileNetV2 reads these attributes before calling the layer, to pad the image.
        self.kernel_size, self.stride, self.dilation = kernel, base.stride, base.dilation

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[R, C, H, W]`` to ``[R, C', H', W']``."""
        y: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scale
        return y

    def merge(self, rounding: Rounding) -> nn.Module:
        """Return the base layer with the branch added to the weight; ``rounding`` casts to the
        weight's type."""
        with torch.no_grad():
            a, b = self.lora_A.weight.float(), self.lora_B.weight.float()[:, :, 0, 0]
            # B has 1 x 1 kernels, so B A is one kernel: dW[o,i,k,l] = s sum_r B[o,r] A[r,i,k,l].
            update = torch.einsum("or,rikl->oikl", b, a) * self.scale
            whole = self.base_layer.weight.float() + update
            self.base_layer.weight.data = rounding(whole, self.base_layer.weight.dtype)
        base: nn.Module = self.base_layer
        return base


class DoRALinear(LoRALinear):
    """``y = m / |W + s B A| (W + s B A) x`` with row norms; ``m``, ``A`` and ``B`` are trained.

    The norm is a constant in the gradient, as in section 4.3 of arXiv:2402.09353. ``m`` and the
    quotient stay in float32: bfloat16 has no number between 1 and 1.0078.
    """

    def __init__(self, base: Any, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base, rank, scale, dropout)
        # B = 0, so m starts as the row norms |W|.
        length_O = torch.linalg.vector_norm(self.weight_OI, dim=1, dtype=torch.float32)
        self.lora_magnitude_vector = nn.Parameter(length_O)
        # |W|^2 is constant and follows from the base model, so PEFT's file does not contain it.
        self._square_O: Tensor
        self.register_buffer("_square_O", length_O.square(), persistent=False)
        self._fixed_O: Tensor | None
        self.register_buffer("_fixed_O", None, persistent=False)

    def _product(self, flat: Tensor, bias: Tensor | None) -> Tensor:
        # The quotient scales W + s B A, not the bias.
        y = super()._product(flat, None) * self._quotient_O()
        return (y if bias is None else y + bias).to(flat.dtype)

    def _quotient_O(self) -> Tensor:
        """``m / |W + s B A|``, cached during inference because the norm takes half as long as the
        product."""
        weights = self.lora_A.weight, self.lora_B.weight, self.lora_magnitude_vector
        if any(weight.requires_grad for weight in weights):
            return self.lora_magnitude_vector / self._length_O()
        if self._fixed_O is None:
            self._fixed_O = self.lora_magnitude_vector / self._length_O()
        return self._fixed_O

    @torch.no_grad()
    def _length_O(self) -> Tensor:
        """Return the row norms of ``W + s B A`` without building the matrix."""
        a, b = self.lora_A.weight, self.lora_B.weight.float()
        # Per row: |W + s B A|^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B.
        cross_Or = torch.mm(self.weight_OI, a.t()).float()
        gram_rr = torch.mm(a.float(), a.float().t())
        square_O = (2 * self.scale) * (cross_Or * b).sum(1)
        square_O += self.scale**2 * (torch.mm(b, gram_rr) * b).sum(1)
        length_O: Tensor = (square_O + self._square_O).sqrt()
        return length_O

    def _merged_OI(self) -> Tensor:
        whole_OI = super()._merged_OI()
        length_O = torch.linalg.vector_norm(whole_OI, dim=1)
        return whole_OI.mul_((self.lora_magnitude_vector.float() / length_O)[:, None])
