"""LoRA on the experts of a mixture with weights in a single tensor ``[experts, …, …]``.

The experts' own forward pass runs with a :class:`LowRankStack` in place of each weight. A product
with the stack is the frozen product plus two narrow products of the same kind: grouped by expert,
batched, or for one expert. Memory for ``W + s B A`` of all experts is never needed. Weights, names
and nesting are PEFT's ``target_parameters``. In bfloat16, product and update are rounded
separately, because grouped products cannot be added to a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.models.networks.fused import Dropout
from luthier.models.networks.layers import stacked_weights
from luthier.models.rounding import Rounding
from luthier.models.wrapper import LayerWrapper

RANK_STEP = 8
"""Rows of grouped products have a multiple of 16 bytes, so the rank is padded to this multiple."""
_LINEAR = functional.linear
_PRODUCTS = (
    functional.grouped_mm,
    torch._grouped_mm,
    torch.bmm,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
)


@dataclass(frozen=True)
class LowRankStack:
    """``W + s L R`` of a stack ``W [E, P, Q]``, with ``L [E, P, r]`` and ``R [E, r, Q]``.

    An operand of products only; other operations of torch raise an error.
    """

    frozen: Tensor
    left: Tensor
    right: Tensor
    scale: float
    dropout: nn.Module

    @property
    def shape(self) -> torch.Size:
        """Shape of ``W``."""
        return self.frozen.shape

    @property
    def dtype(self) -> torch.dtype:
        """Data type of ``W``."""
        return self.frozen.dtype

    @property
    def device(self) -> torch.device:
        """Device of ``W``."""
        return self.frozen.device

    def transpose(self, first: int, second: int) -> LowRankStack:
        """Return the stack with the last two dimensions swapped."""
        left, right = self.right.transpose(first, second), self.left.transpose(first, second)
        return replace(self, frozen=self.frozen.transpose(first, second), left=left, right=right)

    def __getitem__(self, expert: Any) -> LowRankStack:
        """Return the matrix of one expert."""
        parts = self.frozen[expert], self.left[expert], self.right[expert]
        return LowRankStack(*parts, self.scale, self.dropout)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return ``x W + s (x L) R``, or ``x W^T + s (x R^T) L^T`` for linear layers."""
        if len(args) != 2 or not isinstance(args[1], cls) or func not in (*_PRODUCTS, _LINEAR):
            return NotImplemented
        x, stack = args
        factors = (stack.right, stack.left) if func is _LINEAR else (stack.left, stack.right)
        update = func(
            func(stack.dropout(x), factors[0], **kwargs or {}), factors[1], **kwargs or {}
        )
        return func(x, stack.frozen, **kwargs or {}) + update * stack.scale


class ExpertsView:
    """Experts with other weights; all other attributes are the experts' own."""

    def __init__(self, experts: nn.Module, weights: Mapping[str, object]) -> None:
        self._experts = experts
        self.__dict__.update(weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts' own forward pass."""
        run: Callable[..., Any] = type(self._experts).forward
        return run(self, *args, **kwargs)


class LoRAExperts(LayerWrapper):
    """Experts with a trained low-rank branch on one of their stacked weights.

    Several weights need nested wrappers.
    """

    def __init__(
        self, base: nn.Module, parameter: str, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__(base)
        self.parameter, self.rank, self.scale = parameter, rank, scale
        weight = self._frozen
        count, outputs, inputs = weight.shape
        # PEFT's rule, which mistakes inputs for outputs in Llama 4. The product is the same.
        self._input_first = bool(getattr(self._experts, "is_transposed", False))
        if self._input_first:
            outputs, inputs = inputs, outputs
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.lora_A = nn.Linear(inputs, rank * count, bias=False, **like)
        self.lora_B = nn.Linear(rank * count, outputs, bias=False, **like)
        self.dropout = Dropout(dropout)
        start = torch.empty(rank * count, inputs)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        with torch.no_grad():
            self.lora_A.weight.copy_(start)
            self.lora_B.weight.zero_()

    @property
    def _experts(self) -> nn.Module:
        base: nn.Module = self.base_layer
        return base._experts if isinstance(base, LoRAExperts) else base

    @property
    def _frozen(self) -> Tensor:
        weight: Tensor = getattr(self._experts, self.parameter)
        return weight

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return ``L [E, P, r]`` and ``R [E, r, Q]``, whose product has the shape of the weight."""
        a_EIr = self.lora_A.weight.unflatten(0, (-1, self.rank)).mT
        b_EOr = self.lora_B.weight.unflatten(1, (self.rank, -1)).permute(2, 0, 1)
        return (a_EIr, b_EOr.mT) if self._input_first else (b_EOr, a_EIr.mT)

    def stacks(self) -> dict[str, LowRankStack]:
        """Return the adapted weights of this wrapper and of all wrappers inside, by name."""
        left, right = self._factors()
        spare = -self.rank % RANK_STEP
        stack = LowRankStack(
            self._frozen,
            functional.pad(left, (0, spare)).contiguous(),
            functional.pad(right, (0, 0, 0, spare)).contiguous(),
            self.scale,
            self.dropout,
        )
        inside = self.base_layer.stacks() if isinstance(self.base_layer, LoRAExperts) else {}
        return {**inside, self.parameter: stack}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts' own forward pass with the adapted weights."""
        return ExpertsView(self._experts, self.stacks()).run(*args, **kwargs)

    def merge(self, rounding: Rounding) -> nn.Module:
        """Return the experts with all branches added to their weights."""
        weight = self._frozen
        with torch.no_grad():
            merged = torch.empty_like(weight)
            for into, own, left, right in zip(merged, weight, *self._factors(), strict=True):
                whole = own.to(torch.float32, copy=True)
                rounding.into(into, whole.addmm_(left.float(), right.float(), alpha=self.scale))
            weight.data = merged
        base: nn.Module = self.base_layer
        return base.merge(rounding) if isinstance(base, LoRAExperts) else base


def adapted_experts(experts: nn.Module, rank: int, scale: float, dropout: float) -> nn.Module:
    """Return ``experts`` with a branch on each stacked weight, the first weight innermost."""
    for name in stacked_weights(experts):
        experts = LoRAExperts(experts, name, rank, scale, dropout)
    return experts
