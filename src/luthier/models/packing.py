"""Weights in the order the processor's matrix kernels read them, for as long as a network decodes.

With a few rows a bfloat16 product takes as long as reading its weight, and oneDNN brings the weight
into the order it wants in each call. Done once ahead, a product of 1 to 16 rows takes half the time, of
32 two thirds; the sums are the same but for their order, and rounded once. A second copy of the weights
lives while :func:`packed` is open: they may be other ones afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

MOST_ROWS = 64
"""Products of more rows gain nothing, and take the plain weight."""
SMALLEST = 1 << 16
"""Weights of fewer numbers stay in the cache."""
_NAME = "packed_weight"


class PackedWeight:
    """The weight of a linear layer in the kernels' order."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._branch: tuple[Tensor, Tensor] | None = None

    @cached_property
    def _packed_weight(self) -> Tensor:
        return _reorder(self._layer.weight)

    def product(self, x: Tensor) -> Tensor:
        """The layer's ``x W^T + b`` for ``x [..., in]``."""
        layer = self._layer
        if x.numel() > MOST_ROWS * x.shape[-1]:
            return nn.functional.linear(x, layer.weight, layer.bias)
        return _product(x, self._packed_weight, layer.bias)

    def with_branch(self, x_NI: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float) -> Tensor:
        """``x W^T + scale x A^T B^T``, rounded once.

        Of a few rows it is one product, ``[x, x A^T] [W, scale B]^T``: each further one takes half as
        long as the whole. ``A`` and ``B`` are the same in every call.
        """
        if len(x_NI) > MOST_ROWS:
            update_NO = torch.mm(torch.mm(x_NI, a_rI.t()) * scale, b_Or.t())
            return update_NO.addmm_(x_NI, self._layer.weight.t())
        if self._branch is None:
            wide = torch.cat([self._layer.weight.detach(), b_Or.detach() * scale], 1)
            self._branch = _reorder(a_rI), _reorder(wide)
        packed_a, packed_wide = self._branch
        z_Nr = _product(x_NI, packed_a, None)
        return _product(torch.cat([x_NI, z_Nr], 1), packed_wide, None)


def _reorder(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)
    return packed


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def packed_weight(layer: Any) -> PackedWeight | None:
    """What :func:`packed` made for ``layer``; ``None`` outside of it."""
    found: PackedWeight | None = layer.__dict__.get(_NAME)
    return found


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Pack the linear layers of a network in bfloat16 on a CPU; other networks stay as they are.

    Without gradients only. Layers that wrap a linear one ask :func:`packed_weight` for it.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _gains(layer)]
    try:
        for layer in layers:
            weight = PackedWeight(layer)
            layer.__dict__[_NAME] = weight
            layer.__dict__["forward"] = weight.product
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop(_NAME, None)
            layer.__dict__.pop("forward", None)


def _gains(layer: nn.Linear) -> bool:
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.numel() >= SMALLEST
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
