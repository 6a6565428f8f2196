"""Weights in the memory layout of CPU matrix kernels, for decoding.

With few rows, a product takes as long as reading the weight, and oneDNN reorders bfloat16 weights
in each call. With weights reordered in advance, products of 1 to 16 rows take half the time, of 32
rows two thirds. Only the summation order differs. :class:`PackedLinears` keeps a second copy of the
weights while active. The weights may change afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1 << 16
"""Weights of fewer numbers stay in the cache."""
_NAME = "packed_weight"


class _BranchedProduct:
    """``[x, x A^T] [W, B]^T + b``: a weight with a low-rank branch as one product, rounded once.

    With few rows, each additional product costs half of the whole.
    """

    def __init__(
        self, weight_OI: Tensor, a_rI: Tensor, b_Or: Tensor, bias: Tensor | None = None
    ) -> None:
        self._a = _reorder(a_rI)
        self._wide = _reorder(torch.cat([weight_OI.detach(), b_Or.detach()], 1))
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y = _product(torch.cat([x, _product(x, self._a, None)], -1), self._wide, None)
        return y if self._bias is None else y + self._bias


class PackedWeight:
    """The weight of a linear layer in the kernels' order."""

    def __init__(self, layer: nn.Linear, branched: bool) -> None:
        """Pack ``layer``; ``branched`` if the layer has one fixed low-rank branch."""
        self._layer, self.branched = layer, branched
        self._packed: Tensor | None = None
        self._branch: _BranchedProduct | None = None
        self.group: PackedGroup | None = None
        """The group that also has a copy of the weight, until another product is needed."""

    def release(self) -> None:
        """Free the copy. The next use creates a new copy."""
        self._packed = self._branch = None

    @property
    def _packed_weight(self) -> Tensor:
        packed = self._packed  # another thread may release the copy meanwhile
        if packed is None:
            self._release_group()
            packed = self._packed = _reorder(self._layer.weight)
        return packed

    def _release_group(self) -> None:
        if self.group is not None:
            self.group.release()

    def product(self, x: Tensor) -> Tensor:
        """The layer's ``x W^T + b`` for ``x [..., in]``."""
        return _product(x, self._packed_weight, self._layer.bias)

    def with_branch(self, x_NI: Tensor, a_rI: Tensor, b_Or: Tensor, scale: float) -> Tensor:
        """Return ``x W^T + scale x A^T B^T``, rounded once.

        The joint product copies the weight, so it applies to a constant branch only.
        """
        if not self.branched:
            # The branch comes first: added to an x W^T in bfloat16, a small branch would vanish.
            return self.plus(x_NI, torch.mm(torch.mm(x_NI, a_rI.t()) * scale, b_Or.t()))
        branch = self._branch
        if branch is None:
            self._release_group()
            branch = self._branch = _BranchedProduct(self._layer.weight, a_rI, b_Or * scale)
        return branch(x_NI)

    def plus(self, x_NI: Tensor, update_NO: Tensor) -> Tensor:
        """``x W^T + update``, rounded once."""
        return _product_plus(x_NI, self._packed_weight, update_NO)


class PackedGroup:
    """Linear layers with the same input as one product, each with an optional low-rank branch.

    Either the group or the layers own copies of the weights.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        """Group ``layers``: packed linear layers, or wrappers with a branch in PEFT's names."""
        self._layers = layers
        self._plain = [getattr(layer, "base_layer", layer) for layer in layers]
        self._members: list[PackedWeight] = []
        for plain in self._plain:
            member = packed_weight(plain)
            assert member is not None
            member.group = self
            self._members.append(member)
        self._outputs = [plain.weight.shape[0] for plain in self._plain]
        self._packed: Callable[..., Tensor] | None = None

    @staticmethod
    def takes(layer: Any) -> bool:
        """Return True if a layer can be part of a group."""
        if "lora_A" not in layer._modules:
            return packed_weight(layer) is not None
        packed = packed_weight(layer.base_layer)
        # More parameters, such as DoRA's magnitudes, are not a plain branch.
        own = {*layer._modules, *layer._parameters}
        branch_alone = own <= {"base_layer", "lora_A", "lora_B", "dropout"}
        return packed is not None and packed.branched and branch_alone

    def release(self) -> None:
        """Let go of the copies."""
        self._packed = None

    def product(self, x: Tensor, update: Tensor | None = None) -> Tensor:
        """Return the outputs for ``x [..., in]``, concatenated, plus ``update`` if given."""
        packed = self._packed
        if packed is None:
            # Freed before packing, so that a weight has at most one packed copy.
            for member in self._members:
                member.release()
            packed = self._packed = self._pack()
        return packed(x) if update is None else packed(x, update=update)

    def _pack(self) -> Callable[..., Tensor]:
        weight = torch.cat([plain.weight.detach() for plain in self._plain])
        bias = None
        if any(plain.bias is not None for plain in self._plain):
            bias = torch.cat(
                [
                    weight.new_zeros(outputs) if plain.bias is None else plain.bias.detach()
                    for plain, outputs in zip(self._plain, self._outputs, strict=True)
                ]
            )
        branches = [layer for layer in self._layers if "lora_A" in layer._modules]
        if not branches:
            return partial(_product, packed=_reorder(weight), bias=bias)
        # block_diag turns a block without columns into rows of zeros: a layer without a branch.
        b_blocks = [
            layer.lora_B.weight.detach() * layer.scale
            if layer in branches
            else weight.new_zeros(outputs, 0)
            for layer, outputs in zip(self._layers, self._outputs, strict=True)
        ]
        a_rI = torch.cat([layer.lora_A.weight for layer in branches])
        return _BranchedProduct(weight, a_rI, torch.block_diag(*b_blocks), bias)


def linear_plus(layer: Any, x_NI: Tensor, update_NO: Tensor) -> Tensor:
    """Return the output of a linear layer for ``x``, with ``update`` added before rounding.

    The weight of GPT-2's ``Conv1D`` is ``[in, out]``.
    """
    if (packed := packed_weight(layer)) is not None:
        y = packed.plus(x_NI, update_NO)
    else:
        weight_IO = layer.weight.t() if isinstance(layer, nn.Linear) else layer.weight
        y = torch.addmm(update_NO, x_NI, weight_IO)
    return y if layer.bias is None else y.add_(layer.bias)


def _reorder(weight: Tensor) -> Tensor:
    # oneDNN chooses the layout for the given number of rows.
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)
    return packed


def _product(
    x: Tensor, packed: Tensor, bias: Tensor | None, update: Tensor | None = None
) -> Tensor:
    y: Tensor
    if update is not None:  # rounded once
        y = _product_plus(x, packed, update)
        return y if bias is None else y.add_(bias)
    y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _product_plus(x: Tensor, packed: Tensor, update: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, update, packed, None, "add")
    return y


def packed_weight(layer: Any) -> PackedWeight | None:
    """Return the packed weight of ``layer``; ``None`` outside of :class:`PackedLinears`."""
    found: PackedWeight | None = layer.__dict__.get(_NAME)
    return found


class PackedLinears:
    """Packed linear layers of a network on a CPU, while the context is active.

    Requires disabled gradients. Layers that wrap a linear layer call :func:`packed_weight`. The
    context is reusable: changed weights are packed again.
    """

    def __init__(self, model: nn.Module) -> None:
        # A shared base network has no branches here: its adapters wrap layers in their own networks.
        branched = {
            module.base_layer
            for module in model.modules()
            if {"base_layer", "lora_A"} <= module._modules.keys()
        }
        self._packed = {
            layer: PackedWeight(layer, layer in branched)
            for layer in model.modules()
            if type(layer) is nn.Linear and _gains(layer)
        }

    def __enter__(self) -> None:
        for layer, packed in self._packed.items():
            layer.__dict__[_NAME] = packed
            # An instance attribute precedes the class's forward, without the cost of a hook.
            layer.__dict__["forward"] = packed.product

    def __exit__(self, *error: object) -> None:
        for layer, packed in self._packed.items():
            layer.__dict__.pop(_NAME, None)
            layer.__dict__.pop("forward", None)
            packed.release()
            if packed.group is not None:
                # Groups and members form a reference cycle. Without release, copies pile up
                # until the next garbage collection: 0.5 GB in five steps of GRPO.
                packed.group.release()


def _gains(layer: nn.Linear) -> bool:
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.numel() >= SMALLEST
        and torch.backends.mkldnn.is_available()
        and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )
