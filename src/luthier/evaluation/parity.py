"""The parity gate: a custom model is stored only if what is on disk is what was trained.

The saved files are loaded as serving loads them, adapters merged, and the loss on held-out rows is
compared with that of the network in memory. Merging rounds each weight once to the stored type, so
the two differ by rounding and no more.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import LuthierError

TOLERANCE = 0.02
"""Largest difference of the mean loss, in nats per token or as a share of it, whichever is more."""


@dataclass(frozen=True)
class Parity:
    """Loss on the same rows before and after saving, in nats per learned token."""

    rows: int
    trained: float
    reloaded: float

    def check(self) -> None:
        """Refuse a model that does not answer as the trained network does."""
        if not abs(self.trained - self.reloaded) <= TOLERANCE * max(1.0, abs(self.trained)):
            raise LuthierError(
                f"the saved model is not the trained one: loss {self.reloaded:.4f} after reloading, "
                f"{self.trained:.4f} before, on {self.rows} rows. It was not stored; the run and its "
                "checkpoints are kept."
            )
