"""Full fine-tuning: training every weight of the network, also layer by layer from the top."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from luthier.adaptations.base import Adaptation, full_rate

if TYPE_CHECKING:
    from torch import nn


class Full(Adaptation):
    """Train every weight.

    Use ``lora`` for small files and little memory, with accuracy within one point on Banking77.
    """

    method: Literal["full"] = "full"

    unfreeze_every: int | None = Field(default=None, ge=1, le=1_000_000)
    """Steps until the next lower layer trains too (gradual unfreezing); all train by default."""

    stores_network: ClassVar[bool] = True
    new_head_rate: ClassVar[float] = 10.0

    @property
    def unfreeze_steps(self) -> int | None:
        """Steps until the next lower layer trains (Howard & Ruder 2018, arXiv:1801.06146)."""
        return self.unfreeze_every

    def adapt(self, model: nn.Module) -> None:
        """Mark every weight as trained."""
        model.requires_grad_(True)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Return :func:`~luthier.adaptations.base.full_rate`."""
        reason = f"every weight moves: 5e-5, more for small networks (width {hidden})"
        return float(f"{full_rate(hidden):.1e}"), reason
