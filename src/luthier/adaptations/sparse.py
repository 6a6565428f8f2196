"""Sparse tuning: a few weights of each linear layer move, the others keep their bits.

Sung, Nair & Raffel (2021, arXiv:2111.09839) train the weights under a fixed mask and store only those.
Here the mask of a layer is its weights of largest magnitude, as Han et al. (2015, arXiv:1506.02626)
keep them when they prune. Left out: the paper's own choice, the largest Fisher information, which needs
gradients on the data before anything is attached.

What trains are the chosen weights themselves, from their base values, so merging puts them in their
places: trained, reloaded and merged networks have the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from luthier.adaptations.base import Adaptation
from luthier.adaptations.targets import ALL_LINEAR, linear_targets
from luthier.models.layers import modules_of, replace_modules

if TYPE_CHECKING:
    from torch import nn


class Sparse(Adaptation):
    """Train the few largest weights of each chosen linear layer."""

    method: Literal["sparse"] = "sparse"
    share: float = Field(default=0.005, gt=0, le=1)
    """Share of the weights of each layer that trains; at least one."""
    targets: str | tuple[str, ...] = ALL_LINEAR
    """Linear layers to adapt: ``all-linear``, or ends of their names such as ``q_proj``."""

    def adapt(self, model: nn.Module) -> None:
        """Wrap the chosen layers; freeze everything else."""
        from luthier.adaptations.sparse_layer import SparseLinear

        names = linear_targets(model, self.targets)
        model.requires_grad_(False)
        replace_modules(model, names, lambda base: SparseLinear(base, self.share))

    def merge(self, model: nn.Module) -> None:
        """Put the trained weights in their places and take the wrappers away."""
        from luthier.adaptations.sparse_layer import SparseLinear

        replace_modules(model, modules_of(model, SparseLinear), SparseLinear.merged)

    def adapter_config(self, model: nn.Module, base: str) -> dict[str, Any]:
        """Places and values are stored; PEFT has no such method, so the file is luthier's own."""
        return self.own_config(base)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Ten times that of full fine-tuning, not fitted."""
        return 5e-4, "few weights must move further: ten times the rate of full fine-tuning"
