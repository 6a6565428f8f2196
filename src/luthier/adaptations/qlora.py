"""QLoRA: LoRA on a base model in 4 bits (Dettmers et al. 2023, arXiv:2305.14314).

Every linear layer except the output head, and every expert of a mixture, is quantized in blocks to
NF4 (16 quantiles of the normal distribution, section 3 of the paper), FP4 or INT8, and the plain
weight is freed layer by layer. The scale of a block is a float32; ``double_quantization`` stores
scales in 8 bits. Each pass dequantizes the weights into the network's type. Embeddings, norms,
biases and the output head stay unchanged.

The trained update belongs to the *quantized* base model. Loading a custom model therefore quantizes
the base model again. Merging dequantizes, adds and rounds as LoRA, and the merged network is as
large as the plain network. The adapter file is LoRA's; on the plain base model, PEFT returns
slightly different numbers.

Omitted: paged optimizers (the master weights of LoRA are small), DoRA. Needs the extra ``qlora``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from luthier.adaptations.base import Adaptation
from luthier.adaptations.lora import LoRA
from luthier.adaptations.targets import ALL_LINEAR, linear_targets
from luthier.errors import RecipeError
from luthier.models.networks.layers import expert_stacks, modules_of, replace_modules

if TYPE_CHECKING:
    from torch import nn


class QLoRA(Adaptation):
    """Train two low-rank matrices next to quantized linear layers.

    Use ``lora`` if the base model fits into memory: quantization adds rounding errors and some time.
    """

    method: Literal["qlora"] = "qlora"
    quantization: Literal["nf4", "fp4", "int8"] = "nf4"
    """Levels of the stored base model: normal or floating-point in 4 bits, or even in 8 bits."""
    block_size: Literal[32, 64, 128, 256, 512, 1024] = 64
    """Number of weights per scale."""
    double_quantization: bool = True
    """Store the scales in 8 bits too: 0.37 bits a weight less at blocks of 64."""
    rank: int = Field(default=16, ge=1, le=65_536)
    """Columns of the two added matrices, ``r`` in the paper."""
    alpha: float = Field(default=32.0, gt=0, le=1e6)
    """The update is scaled by ``alpha / rank``."""
    rslora: bool = False
    """Scale by ``alpha / sqrt(rank)``, for ranks above 32."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the branch's inputs in training."""
    targets: str | tuple[str, ...] | None = None
    """Layers with a branch: all-linear or ends of names; as of LoRA if not given. All are quantized."""

    @property
    def lora(self) -> LoRA:
        """The same LoRA settings for a plain base model."""
        return LoRA(
            rank=self.rank,
            alpha=self.alpha,
            rslora=self.rslora,
            dropout=self.dropout,
            targets=self.targets,
        )

    def adapt(self, model: nn.Module) -> None:
        """Quantize the linear layers, wrap the chosen layers, and freeze everything else.

        Raises:
            RecipeError: if bitsandbytes is not installed, or ``targets`` names no layer.
        """
        if find_spec("bitsandbytes") is None:
            raise RecipeError(
                "qlora requires bitsandbytes, which is not installed: pip install "
                "'luthier[qlora]'. Or use lora.",
                rule="adapter.extra",
            )
        from luthier.adaptations.qlora_layer import (
            Packing,
            QLoRALinear,
            QuantizedExperts,
            QuantizedLinear,
        )

        # First, so that an unknown name is rejected before any layer is packed.
        branched = linear_targets(model, self.targets)
        model.requires_grad_(False)
        packing = Packing(self.quantization, self.block_size, self.double_quantization)
        every = linear_targets(model, ALL_LINEAR)
        replace_modules(model, every, lambda base: QuantizedLinear(base, packing))
        stacks = expert_stacks(model)
        replace_modules(model, stacks, lambda base: QuantizedExperts(base, packing))
        for weight in model.parameters():
            # Weights of one file are views of one mapping: while the network uses any view, pages of
            # the whole file stay resident (250 MB for SmolLM2-135M).
            weight.data = weight.data.clone()
        scale = self.lora.scale
        replace_modules(
            model, branched, lambda base: QLoRALinear(base, self.rank, scale, self.dropout)
        )

    def merge(self, model: nn.Module) -> None:
        """Dequantize, add ``(alpha / r) B A``, and restore plain layers. The result is
        deterministic."""
        from luthier.adaptations.qlora_layer import QuantizedExperts, QuantizedLinear

        replace_modules(model, modules_of(model, QuantizedExperts), QuantizedExperts.plain)
        self.lora.merge(model)
        # Merged layers are plain already; the packed layers without a branch remain.
        rest = modules_of(model, QuantizedLinear)
        replace_modules(model, rest, lambda layer: layer.plain(layer.weight_OI))

    def adapter_config(self, model: nn.Module, base: str) -> dict[str, Any]:
        """Return LoRA's configuration: PEFT's format does not describe the storage of the base."""
        return self.lora.adapter_config(model, base)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Return LoRA's rate; the paper finds that LoRA's settings suit a 4-bit base model."""
        return self.lora.learning_rate(hidden)
