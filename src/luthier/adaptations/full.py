"""Full fine-tuning: every weight of the network moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from luthier.adaptations.base import Adaptation

if TYPE_CHECKING:
    from torch import nn


class Full(Adaptation):
    """Train every weight."""

    method: Literal["full"] = "full"

    stores_network: ClassVar[bool] = True

    def adapt(self, model: nn.Module) -> None:
        """Mark every weight as trained."""
        model.requires_grad_(True)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """5e-5, the middle of the range that Devlin et al. (2019) and Touvron et al. (2023) tune in."""
        return 5e-5, "every weight moves: 5e-5, the usual rate for full fine-tuning"
