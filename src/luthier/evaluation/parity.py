"""The parity gate: a custom model is stored only if what is on disk is what was trained.

The saved files are loaded as serving loads them, adapters merged, and the loss on held-out rows is
compared with that of the network in memory. A whole network must give the same loss. A merged
adapter differs by the rounding of each merged weight, half a percent of the loss at most as seen so
far (rounding to nearest, which forgets, gives three to eleven). (The saved adapter itself is compared
bit for bit, by the engine.)
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import LuthierError

SAME = 0.005
"""Largest difference for a network saved as it is, in nats per token or as a share of the loss."""
ROUNDED = 0.03
"""The same for an adapter that is merged into weights of fewer than 32 bits."""


@dataclass(frozen=True)
class Parity:
    """Loss on the same rows before and after saving, in nats per learned token."""

    rows: int
    trained: float
    reloaded: float
    rounded: bool = False
    """Whether weights were merged and rounded on the way."""

    def check(self) -> None:
        """Refuse a model that does not answer as the trained network does."""
        allowed = ROUNDED if self.rounded else SAME
        if not abs(self.trained - self.reloaded) <= allowed * max(1.0, abs(self.trained)):
            raise LuthierError(
                f"the saved model is not the trained one: loss {self.reloaded:.4f} after reloading, "
                f"{self.trained:.4f} before, on {self.rows} rows. It was not stored; the run and its "
                "checkpoints are kept."
            )
