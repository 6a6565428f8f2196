"""Sparse tuning: training a few weights of each linear layer (Sung, Nair & Raffel 2021,
arXiv:2111.09839).

Only weights under a fixed mask are trained and stored. The paper's mask has the weights with the
largest empirical Fisher information: the squared gradient of ``log p(y | x)`` with the labels of
the data, summed over training rows, one row at a time. The other mask has the largest magnitudes
(Han et al. 2015, arXiv:1506.02626) and needs no data. The paper ranks the weights of the whole
network. Here each layer gets an equal share, so that the share alone determines the file size.

The trained weights start at their base values, and merging writes them back: trained, reloaded and
merged networks have identical bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from luthier.adaptations.base import Adaptation, Gradients, full_rate
from luthier.adaptations.targets import ALL_LINEAR, linear_targets
from luthier.models.networks.layers import modules_of, replace_modules

if TYPE_CHECKING:
    from torch import nn

    from luthier.models.networks.network import Network


class Sparse(Adaptation):
    """Train a few weights of each chosen linear layer: the largest, or the most informative.

    Use ``lora`` to share one served base model, or to shard the network over processes.
    """

    method: Literal["sparse"] = "sparse"
    share: float = Field(default=0.005, gt=0, le=1)
    """Fraction of trained weights in each layer (at least one weight)."""
    mask: Literal["magnitude", "fisher"] = "magnitude"
    """Choice of trained weights: largest magnitude, or largest Fisher information on the data."""
    fisher_rows: int = Field(default=256, ge=1, le=1_000_000)
    """Number of training rows for the Fisher information."""
    targets: str | tuple[str, ...] = ALL_LINEAR
    """Adapted linear layers: ``all-linear``, or name endings such as ``q_proj``."""

    def adapt(self, model: nn.Module) -> None:
        """Wrap the chosen layers; freeze everything else."""
        from luthier.adaptations.sparse_layer import SparseLinear

        names = linear_targets(model, self.targets)
        model.requires_grad_(False)
        replace_modules(model, names, lambda base: SparseLinear(base, self.share))

    def calibrate(self, network: Network, gradients: Gradients) -> None:
        """Choose the weights by Fisher information, if the mask is ``fisher``."""
        if self.mask != "fisher":
            return
        import torch

        layers = self._layers(network.model)
        # While the base weight requires a gradient, SparseLinear computes the plain product.
        weights = [layer.base_layer.weight.requires_grad_(True) for layer in layers]
        scores = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        # Empirical Fisher information: F = sum over rows of (d log p(y | x) / dW)^2.
        for _ in gradients(self.fisher_rows):
            for weight, score in zip(weights, scores, strict=True):
                if weight.grad is not None:
                    score.add_(weight.grad.float().square_())
        for layer, score in zip(layers, scores, strict=True):
            layer.base_layer.weight.requires_grad_(False)
            layer.choose(score)

    @property
    def calibration_rows(self) -> int:
        """Number of rows for the Fisher information."""
        return self.fisher_rows if self.mask == "fisher" else 0

    def calibration_bytes(self, model: nn.Module) -> int:
        """Return the bytes of the gradients of all chosen layers, and of the squares in float32."""
        if self.mask != "fisher":
            return 0
        weights = [layer.base_layer.weight for layer in self._layers(model)]
        return sum(weight.numel() * (weight.itemsize + 4) for weight in weights)

    @staticmethod
    def _layers(model: nn.Module) -> list[Any]:
        from luthier.adaptations.sparse_layer import SparseLinear

        return [module for module in model.modules() if isinstance(module, SparseLinear)]

    def merge(self, model: nn.Module) -> None:
        """Write the trained weights back and remove the wrappers."""
        from luthier.adaptations.sparse_layer import SparseLinear

        replace_modules(model, modules_of(model, SparseLinear), SparseLinear.merge)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Return ten times the rate of full fine-tuning; not fitted, measured in
        ``docs/results.md``."""
        reason = "few weights must move further: ten times the rate of full fine-tuning"
        return float(f"{10 * full_rate(hidden):.1e}"), reason
