"""Linear layers with a frozen weight in 4 or 8 bits, and LoRA's branch.

bitsandbytes quantizes and dequantizes on CPU and GPU; PyTorch computes the products in the
network's type. The backward pass dequantizes the weight again, because keeping dequantized weights
would keep the plain network in memory. As in ``lora_layer.py``, the update is computed first and
the frozen product is added, so that bfloat16 rounds once.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from luthier.adaptations.lora_experts import ExpertsView
from luthier.adaptations.lora_layer import LoRALinear, frozen_product
from luthier.models.networks.layers import stacked_weights
from luthier.models.rounding import Rounding

SCALES_IN_BLOCK = 256
"""Number of scales per second-level scale in double quantization, as in the paper."""

CHUNK = 1 << 18
"""Weights to pack at once, in whole blocks: bitsandbytes allocates about 20 bytes per weight."""


@cache
def _bitsandbytes() -> Any:
    """Import ``bitsandbytes.functional`` without the advice that the package logs (about 2 s)."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


@cache
def _even_levels() -> Tensor:
    """Return the 255 levels ``-1, -126/127 .. 1`` of INT8 in bitsandbytes' format: 256 sorted
    values."""
    levels: Tensor = _bitsandbytes().create_linear_map(signed=True, total_bits=8)
    return levels


@dataclass(frozen=True)
class Packing:
    """Storage format of quantized weights."""

    kind: str
    """``nf4``, ``fp4`` or ``int8``."""
    block_size: int
    """Number of consecutive weights of ``[out, in]`` that share a scale, the largest magnitude."""
    double: bool
    """True if scales are stored in 8 bits, minus their mean, in blocks of ``SCALES_IN_BLOCK``."""


class QuantizedLinear(nn.Module):
    """``x W^T + b`` with ``W [out, in]`` packed into ``uint8``, in place of a frozen linear layer.

    GPT-2's ``Conv1D`` is packed as ``[out, in]`` too, as in transformers. On the meta device, only
    the sizes are right.
    """

    bias: nn.Parameter | None
    packed: Tensor
    scales: Tensor
    scales_of_scales: Tensor
    mean_scale: Tensor

    def __init__(self, base: Any, packing: Packing) -> None:
        super().__init__()
        self.packing = packing
        self.transposed = not isinstance(base, nn.Linear)
        weight_OI = base.weight.detach()
        weight_OI = (weight_OI.t() if self.transposed else weight_OI).contiguous()
        self.shape, self.dtype = weight_OI.shape, weight_OI.dtype
        self.register_parameter("bias", base.bias)
        parts = self._sizes(weight_OI) if weight_OI.is_meta else self._pack(weight_OI)
        for name, part in parts.items():
            self.register_buffer(name, part)

    def _pack(self, weight_OI: Tensor) -> dict[str, Tensor]:
        # CHUNK is a multiple of every block size, so no block spans two parts.
        parts = [self._pack_part(part) for part in weight_OI.view(-1).split(CHUNK)]
        packed, largest = (torch.cat(part) for part in zip(*parts, strict=True))
        if not self.packing.double:
            return {"packed": packed, "scales": largest}
        # Scales are positive. Subtracting the mean uses the 8-bit levels of both signs (paper,
        # section 3).
        mean = largest.mean()
        scales, outer = _bitsandbytes().quantize_blockwise(
            largest - mean, blocksize=SCALES_IN_BLOCK
        )
        return {
            "packed": packed,
            "scales": scales,
            "scales_of_scales": outer.absmax,
            "mean_scale": mean,
        }

    def _pack_part(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Pack whole blocks; return the packed numbers, and the largest magnitude of each block."""
        bnb, size = _bitsandbytes(), self.packing.block_size
        if self.packing.kind == "int8":
            packed, state = bnb.quantize_blockwise(values, code=_even_levels(), blocksize=size)
        else:
            packed, state = bnb.quantize_4bit(values, blocksize=size, quant_type=self.packing.kind)
        return packed.view(-1), state.absmax

    def _sizes(self, weight_OI: Tensor) -> dict[str, Tensor]:
        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device="meta")

        packing, count = self.packing, weight_OI.numel()
        # Two numbers of 4 bits share a byte.
        size = count if packing.kind == "int8" else math.ceil(count / 2)
        blocks = math.ceil(count / packing.block_size)
        packed = empty(size, torch.uint8)
        if not packing.double:
            return {"packed": packed, "scales": empty(blocks, torch.float32)}
        return {
            "packed": packed,
            "scales": empty(blocks, torch.uint8),
            "scales_of_scales": empty(math.ceil(blocks / SCALES_IN_BLOCK), torch.float32),
            "mean_scale": empty(1, torch.float32),
        }

    weight = None
    """No plain weight. Networks read this attribute for its type."""

    @property
    def weight_OI(self) -> Tensor:
        """The weight ``[out, in]`` in the network's type, dequantized at each use."""
        if self.packed.is_meta:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        bnb, packing = _bitsandbytes(), self.packing
        scales = self.scales
        if packing.double:
            scales = bnb.dequantize_blockwise(
                scales, absmax=self.scales_of_scales, blocksize=SCALES_IN_BLOCK
            )
            scales += self.mean_scale
        even = packing.kind == "int8"
        # One row for each block: on a CPU, bitsandbytes 0.50 mixes up the scales of blocks that
        # begin in one row of the matrix and end in the next.
        count, size = self.shape.numel(), packing.block_size
        state = bnb.QuantState(
            absmax=scales,
            shape=(count // size, size) if count % size == 0 else (count,),
            code=_even_levels() if even else None,
            blocksize=size,
            quant_type=None if even else packing.kind,
            dtype=self.dtype,
        )
        dequantize = bnb.dequantize_blockwise if even else bnb.dequantize_4bit
        values: Tensor = dequantize(self.packed, state)
        return values.view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        y = frozen_product(x.reshape(-1, x.shape[-1]), self).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def plain(self, weight_OI: Tensor) -> nn.Module:
        """Return a plain frozen layer of the original kind with ``weight_OI`` and an equal bias."""
        from transformers.pytorch_utils import Conv1D

        outputs, inputs = self.shape
        # On the meta device, because the constructor would allocate a weight that is replaced next.
        with torch.device("meta"):
            layer: Any = Conv1D(outputs, inputs) if self.transposed else nn.Linear(inputs, outputs)
        weight = weight_OI.t().contiguous() if self.transposed else weight_OI
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = self.bias
        plain: nn.Module = layer.train(self.training)
        return plain


class QuantizedExperts(nn.Module):
    """Experts of a mixture with all stacked weights packed."""

    def __init__(self, experts: nn.Module, packing: Packing) -> None:
        super().__init__()
        self.experts, self.stacks = experts, nn.ModuleDict()
        for name in stacked_weights(experts):
            holder = nn.Linear(1, 1, bias=False, device="meta")
            holder.weight = getattr(experts, name)
            self.stacks[name] = QuantizedLinear(holder, packing)
            setattr(experts, name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts' own forward pass with dequantized weights."""
        packed: dict[str, Any] = dict(self.stacks.items())
        weights: dict[str, Tensor] = {name: each.weight_OI for name, each in packed.items()}
        names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}

        # Autograd stores the place of a weight, so that the plain weights of all layers are never
        # in memory at once. The backward pass dequantizes the weight again.
        def pack(tensor: Tensor) -> Any:
            name = names.get(tensor.untyped_storage().data_ptr())
            place = tensor.shape, tensor.stride(), tensor.storage_offset()
            return tensor if name is None else (packed[name], place)

        def unpack(stored: Any) -> Tensor:
            if isinstance(stored, Tensor):
                return stored
            layer, place = stored
            plain: Tensor = layer.weight_OI.as_strided(*place)
            return plain

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return ExpertsView(self.experts, weights).run(*args, **kwargs)

    def plain(self) -> nn.Module:
        """Return the experts with dequantized weights."""
        layers: dict[str, Any] = dict(self.stacks.items())
        for name, layer in layers.items():
            setattr(self.experts, name, nn.Parameter(layer.weight_OI, requires_grad=False))
        return self.experts


class QLoRALinear(LoRALinear):
    """LoRA's branch next to a :class:`QuantizedLinear`. Weight names are PEFT's."""

    base_layer: QuantizedLinear

    @property
    def weight_OI(self) -> Tensor:
        """The frozen weight as ``[out, in]``, dequantized at each use."""
        return self.base_layer.weight_OI

    def merge(self, rounding: Rounding) -> nn.Module:
        """Return a plain layer with the dequantized weight plus the branch."""
        with torch.no_grad():
            return self.base_layer.plain(rounding(self._merged_OI(), self.base_layer.dtype))
