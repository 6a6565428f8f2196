"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

Each chosen linear layer ``y = x W^T`` becomes ``y = x W^T + (alpha / r) (x A^T) B^T``. ``A`` starts
with Kaiming-uniform numbers, ``B`` with zeros; only ``A`` and ``B`` are trained. The product and
the gradient are one autograd node that stores ``x`` and ``x A^T``. As separate modules (PEFT), the
same layer stores three more tensors and adds about 20 small operations. Weights, names and
``adapter_config.json`` are PEFT's, so PEFT loads the result unchanged. Left out: per-layer ranks.

``rslora`` scales by ``alpha / sqrt(r)`` (Kalajdzievski 2023, arXiv:2312.03732), so that large ranks
learn as fast as small ranks. ``dora`` trains the length of each row of ``W`` apart from the
direction (Liu et al. 2024, arXiv:2402.09353).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from luthier.adaptations.base import Adaptation, full_rate, peft_config
from luthier.adaptations.targets import linear_targets
from luthier.errors import RecipeError
from luthier.models.networks.layers import modules_of, replace_modules, stacked_weights

if TYPE_CHECKING:
    from torch import nn

_EXPERT_LAYERS = tuple(
    f".{name}" for name in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
)


class LoRA(Adaptation):
    """Train two low-rank matrices next to each chosen linear layer.

    Use ``qlora`` if the base model exceeds the memory, or ``feature_extraction`` for the shortest
    runs.
    """

    method: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=65_536)
    """Columns of the two added matrices, ``r`` in the paper."""
    alpha: float = Field(default=32.0, gt=0, le=1e6)
    """The update is scaled by ``alpha / rank``."""
    rslora: bool = False
    """Scale by ``alpha / sqrt(rank)``, for ranks above 32."""
    dora: bool = False
    """Train magnitudes and directions apart; slower, often better at small ranks."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the branch's inputs in training."""
    targets: str | tuple[str, ...] | None = None
    """Layers: all-linear, experts or ends of names (q_proj). Default: linear; pipelines: attention."""
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Indices of adapted blocks, 0 is the lowest (default: all). Lower blocks are computed once."""

    @property
    def shares_base(self) -> bool:
        """See :class:`Adaptation`; magnitudes of DoRA and branches of experts are merged."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets or ()
        return not self.dora and not any(t.rpartition(".")[2] == "experts" for t in targets)

    def adapt(self, model: nn.Module) -> None:
        """Wrap the chosen layers; freeze everything else."""
        from torch import nn

        from luthier.adaptations.lora_experts import adapted_experts
        from luthier.adaptations.lora_layer import DoRALinear, LoRAConv2d, LoRALinear

        names = linear_targets(
            model,
            self.targets,
            self.layers_to_transform,
            convolutions=True,
            experts=not self.dora,
        )
        kind = DoRALinear if self.dora else LoRALinear
        model.requires_grad_(False)

        def wrap(base: nn.Module) -> nn.Module:
            if stacked_weights(base):
                return adapted_experts(base, self.rank, self.scale, self.dropout)
            if not isinstance(base, nn.Conv2d):
                return kind(base, self.rank, self.scale, self.dropout)
            if self.dora:
                raise RecipeError(
                    "adaptation.dora requires linear layers, and the network has convolutions. "
                    "Remove the setting"
                )
            return LoRAConv2d(base, self.rank, self.scale, self.dropout)

        replace_modules(model, names, wrap)

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def merge(self, model: nn.Module) -> None:
        """Add ``(alpha / r) B A`` to each weight and remove the wrappers. The result is
        deterministic."""
        from luthier.adaptations.lora_experts import LoRAExperts
        from luthier.adaptations.lora_layer import LoRAConv2d, LoRALinear
        from luthier.models.rounding import Rounding

        # Rounding to nearest would drop most of a small update. One object for all layers, so that
        # no two layers share a noise pattern.
        rounding = Rounding()
        names = modules_of(model, (LoRALinear, LoRAConv2d, LoRAExperts))
        # A wrapper of experts merges the wrappers inside.
        names = [name for name in names if not name.endswith(".base_layer")]
        replace_modules(model, names, lambda layer: layer.merge(rounding))

    def adapter_config(self, model: nn.Module, base: str) -> dict[str, Any]:
        """Return PEFT's configuration of the adapter."""
        from luthier.adaptations.lora_experts import LoRAExperts
        from luthier.adaptations.lora_layer import LoRAConv2d, LoRALinear

        # Full names: PEFT would also adapt other layers whose names end the same way.
        layers = sorted(modules_of(model, (LoRALinear, LoRAConv2d)))
        base_layers = [model.get_submodule(name).base_layer for name in layers]
        wrapped = modules_of(model, LoRAExperts)
        parameters = [
            f"{name.removesuffix('.base_layer')}.{model.get_submodule(name).parameter}"
            for name in wrapped
        ]
        has_experts = any(n.rpartition(".")[2] == "experts" for n, _ in model.named_modules())
        if has_experts and not self.dora:
            # Next to experts, PEFT takes these names of dense layers for experts of earlier
            # versions of transformers and drops their weights. As parameters, the layers are loaded.
            dense = [name for name in layers if name.endswith(_EXPERT_LAYERS)]
            parameters += [f"{name}.weight" for name in dense]
            layers = [name for name in layers if name not in dense]
        return peft_config(
            "LORA",
            model,
            base,
            r=self.rank,
            # PEFT declares an integer, but accepts any number.
            lora_alpha=int(self.alpha) if self.alpha == math.floor(self.alpha) else self.alpha,
            # PEFT allows no dropout next to parameters; the weights are trained.
            lora_dropout=0.0 if parameters else self.dropout,
            bias="none",
            use_rslora=self.rslora,
            use_dora=self.dora,
            # PEFT's name for weights stored as [in, out], as in GPT-2's Conv1D, which has `nf`.
            fan_in_fan_out=any(
                getattr(base, "transposed", hasattr(base, "nf")) for base in base_layers
            ),
            target_modules=layers,
            target_parameters=parameters or None,
        )

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Return ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without
        Regret")."""
        rate = 10 * full_rate(hidden)
        reason = (
            f"ten times the rate of full fine-tuning, higher for small networks (width {hidden})"
        )
        return float(f"{rate:.1e}"), reason
