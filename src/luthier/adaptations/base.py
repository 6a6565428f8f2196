"""The seam between a network and which of its weights move.

An adaptation changes a network in place and marks what trains by ``requires_grad``; everything
else follows from that mark: what gets an optimizer state, what a checkpoint holds, what is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import nn


class Adaptation(BaseModel):
    """Base of all adaptations. Subclasses are final: one method, one file, one class."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    method: str
    """Name of the adaptation in recipes and on the command line."""

    def attach(self, model: nn.Module) -> None:
        """Add what is added and set ``requires_grad`` on every weight of ``model``."""
        raise NotImplementedError

    def merge(self, model: nn.Module) -> None:
        """Fold what was added into the network's own weights, so that it is plain again."""

    def peft_config(self, model: nn.Module, base: str) -> dict[str, Any] | None:
        """PEFT's ``adapter_config.json`` where the added weights are an adapter, else ``None``.

        ``None`` means that the network's own weights moved, and the whole network is saved.
        """
        return None

    def learning_rate(self) -> tuple[float, str]:
        """Default rate and the reason for it."""
        raise NotImplementedError
