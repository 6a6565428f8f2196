"""Sparse tuning: a few weights of each linear layer move, the others keep their bits.

Sung, Nair & Raffel (2021, arXiv:2111.09839) train the weights under a fixed mask and store only those.
The paper's mask is the weights of the largest Fisher information, estimated from the labels that the
data has (the empirical Fisher): the square of the gradient of ``log p(y | x)``, summed over a number
of training rows, one row at a time. The other mask takes the largest magnitudes, as Han et al. (2015,
arXiv:1506.02626) keep them when they prune, and needs no data. Unlike the paper, which ranks the
weights of the whole network against each other, each layer gets its share, so that the size of a file
follows from the share alone.

What trains are the chosen weights themselves, from their base values, so merging puts them in their
places: trained, reloaded and merged networks have the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from luthier.adaptations.base import Adaptation, Gradients, full_rate
from luthier.adaptations.targets import ALL_LINEAR, linear_targets
from luthier.models.layers import modules_of, replace_modules

if TYPE_CHECKING:
    from torch import nn

    from luthier.models.network import Network


class Sparse(Adaptation):
    """Train a few weights of each chosen linear layer, the largest or those that matter most."""

    method: Literal["sparse"] = "sparse"
    share: float = Field(default=0.005, gt=0, le=1)
    """Share of the weights of each layer that trains; at least one."""
    mask: Literal["magnitude", "fisher"] = "magnitude"
    """Which weights train: the largest, or those of the largest Fisher information on the data."""
    fisher_rows: int = Field(default=256, ge=1, le=1_000_000)
    """Training rows that Fisher information is estimated from."""
    targets: str | tuple[str, ...] = ALL_LINEAR
    """Linear layers to adapt: ``all-linear``, or ends of their names such as ``q_proj``."""

    def adapt(self, model: nn.Module) -> None:
        """Wrap the chosen layers; freeze everything else."""
        from luthier.adaptations.sparse_layer import SparseLinear

        names = linear_targets(model, self.targets)
        model.requires_grad_(False)
        replace_modules(model, names, lambda base: SparseLinear(base, self.share))

    def calibrate(self, network: Network, gradients: Gradients) -> None:
        """Choose the weights by Fisher information, where that is the mask."""
        if self.mask != "fisher":
            return
        import torch

        layers = self._layers(network.model)
        weights = [layer.base_layer.weight.requires_grad_(True) for layer in layers]
        scores = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        for _ in gradients(self.fisher_rows):
            for weight, score in zip(weights, scores, strict=True):
                if weight.grad is not None:
                    score.add_(weight.grad.float().square_())
        for layer, score in zip(layers, scores, strict=True):
            layer.base_layer.weight.requires_grad_(False)
            layer.choose(score)

    @property
    def calibration_rows(self) -> int:
        """Those whose gradients choose the weights."""
        return self.fisher_rows if self.mask == "fisher" else 0

    def calibration_bytes(self, model: nn.Module) -> int:
        """Gradients of all chosen layers, and their squares in float32."""
        if self.mask != "fisher":
            return 0
        weights = [layer.base_layer.weight for layer in self._layers(model)]
        return sum(weight.numel() * (weight.itemsize + 4) for weight in weights)

    @staticmethod
    def _layers(model: nn.Module) -> list[Any]:
        from luthier.adaptations.sparse_layer import SparseLinear

        return [module for module in model.modules() if isinstance(module, SparseLinear)]

    def merge(self, model: nn.Module) -> None:
        """Put the trained weights in their places and take the wrappers away."""
        from luthier.adaptations.sparse_layer import SparseLinear

        replace_modules(model, modules_of(model, SparseLinear), SparseLinear.merge)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Ten times that of full fine-tuning; not fitted, measured in ``docs/results.md``."""
        reason = "few weights must move further: ten times the rate of full fine-tuning"
        return float(f"{10 * full_rate(hidden):.1e}"), reason
