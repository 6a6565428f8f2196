"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

Each chosen linear layer ``y = x W^T`` becomes ``y = x W^T + (alpha / r) (x A^T) B^T`` with ``A``
Gaussian-like and ``B`` zero at the start; only ``A`` and ``B`` move. The product and its gradient
are one autograd node that keeps ``x`` and ``x A^T``: written as separate modules, as PEFT does,
the same layer keeps three more tensors and adds about 20 small operations. Weights, names and
``adapter_config.json`` are PEFT's, so PEFT loads the result unchanged. Left out: per-layer ranks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from luthier.adaptations.base import Adaptation
from luthier.adaptations.targets import ALL_LINEAR, linear_targets

if TYPE_CHECKING:
    from torch import nn


class LoRA(Adaptation):
    """Train two thin matrices beside each chosen linear layer."""

    method: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    """Columns of the two added matrices, ``r`` in the paper."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by ``alpha / rank``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs of the added branch that is dropped in training."""
    targets: str | tuple[str, ...] = ALL_LINEAR
    """Linear layers to adapt: ``all-linear``, or ends of their names such as ``q_proj``."""

    def attach(self, model: nn.Module) -> None:
        """Wrap the chosen layers; freeze everything else."""
        from luthier.adaptations.lora_layer import LoRALinear

        names = linear_targets(model, self.targets)
        model.requires_grad_(False)
        for name in names:
            parent, child = _parent(model, name)
            base = getattr(parent, child)
            setattr(
                parent, child, LoRALinear(base, self.rank, self.alpha / self.rank, self.dropout)
            )

    def merge(self, model: nn.Module) -> None:
        """Add ``(alpha / r) B A`` to each weight and take the wrappers away. Always the same bits."""
        from luthier.adaptations.lora_layer import LoRALinear
        from luthier.models.rounding import Rounding

        rounding = Rounding()
        wrapped = [n for n, module in model.named_modules() if isinstance(module, LoRALinear)]
        for name in wrapped:
            parent, child = _parent(model, name)
            setattr(parent, child, getattr(parent, child).merged(rounding))

    def peft_config(self, model: nn.Module, base: str) -> dict[str, Any]:
        """The configuration PEFT itself writes for this adapter."""
        from peft import LoraConfig

        ends = {name.rpartition(".")[2] for name in linear_targets_attached(model)}
        config = LoraConfig(
            r=self.rank,
            # PEFT types this as a whole number, but takes and stores any.
            lora_alpha=int(self.alpha) if self.alpha == math.floor(self.alpha) else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=sorted(ends if self.targets == ALL_LINEAR else _ends(self.targets)),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=True,
        )
        plain = config.to_dict()
        return {key: sorted(v) if isinstance(v, set) else v for key, v in plain.items()}

    def learning_rate(self) -> tuple[float, str]:
        """Ten times the full rate (Schulman et al. 2025, "LoRA Without Regret")."""
        return 5e-4, "LoRA learns best at about ten times the rate of full fine-tuning (5e-5)"


def linear_targets_attached(model: nn.Module) -> list[str]:
    """Names of the layers that carry a LoRA branch."""
    from luthier.adaptations.lora_layer import LoRALinear

    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def _ends(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else targets


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child
