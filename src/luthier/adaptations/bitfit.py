"""BitFit: training the biases only (Ben Zaken, Goldberg & Ravfogel 2022, arXiv:2106.10199)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from luthier.adaptations.base import Adaptation
from luthier.errors import RecipeError
from luthier.models.networks.heads import head_weights

if TYPE_CHECKING:
    from torch import nn


class BitFit(Adaptation):
    """Train the biases of the network, about 0.1 % of all weights.

    Use ``lora`` for networks without biases, such as Llama, or to share one served base model.
    """

    method: Literal["bitfit"] = "bitfit"

    def adapt(self, model: nn.Module) -> None:
        """Freeze everything but the biases of linear layers and norms."""
        model.requires_grad_(False)
        for name in _biases(model):
            model.get_parameter(name).requires_grad_(True)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Return a rate above the paper's range of 1e-4 to 1e-3, which suits a network 12 times as
        large.

        On four data sets a small encoder learned at least as much with 3e-3 as with 7e-4
        (docs/log/defaults.md).
        """
        return 3e-3, "biases alone: above the paper's 1e-3, where small networks stay behind"


def _biases(model: nn.Module) -> list[str]:
    new = head_weights(model)
    # Biases of a new head train anyway. Without any others, the method would train the head alone.
    names = [
        name
        for name, _ in model.named_parameters()
        if name.rpartition(".")[2] == "bias" and name not in new
    ]
    if not names:
        kind = getattr(getattr(model, "config", None), "model_type", "this type")
        raise RecipeError(
            f"bitfit trains biases, and networks of type {kind} have none. Use lora, which adds "
            "about as few weights.",
            rule="adapter.network",
        )
    return names
