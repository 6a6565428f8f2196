"""What advice is given on: the data, the model, the machine, what is wanted, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.advice.evidence import Evidence

if TYPE_CHECKING:
    from luthier.planning.estimate import Estimate

Goal = Literal["quality", "cost", "latency", "knowledge", "style"]
"""``knowledge`` is facts from documents that answers must be true to."""


@dataclass(frozen=True)
class Wishes:
    """What is wanted. Nothing named is no limit."""

    goal: Goal = "quality"
    max_minutes: float | None = None
    """Of training."""
    max_seconds: float | None = None
    """For one answer."""
    max_megabytes: float | None = None
    """Of the model."""


@dataclass(frozen=True)
class Facts:
    """Everything that is known before the advice."""

    wishes: Wishes
    rows: int
    shape: str
    """As objectives name the shapes of rows."""
    objective: str
    labels: int
    """Classes, 0 where there are none."""
    smallest_class: int
    learned_tokens: int
    prompt_tokens: int
    document_tokens: int
    weights: int
    trained_weights: int
    megabytes: float
    """Of the base model in the working type."""
    writes: bool
    """Whether answers are written; labels are read off by a head."""
    refused: tuple[str, ...]
    """Rules of the data gate that refuse the data."""
    warned: tuple[str, ...]
    """Rules that warn."""
    cautions: tuple[str, ...]
    """What they say of the data as a whole."""
    estimate: Estimate | None
    """Of the recipe; ``None`` where it could not be made."""
    evidence: Evidence | None

    @property
    def epochs(self) -> float:
        """Passes over the rows that the recipe makes."""
        return self.estimate.epochs if self.estimate else 1.0

    @property
    def minutes(self) -> float | None:
        """Of training, where it was estimated."""
        return self.estimate.seconds.value / 60 if self.estimate else None

    def plain(self) -> dict[str, Any]:
        """What was counted, for JSON."""
        return {
            "rows": self.rows,
            "shape": self.shape,
            "objective": self.objective,
            "labels": self.labels,
            "smallest_class": self.smallest_class,
            "learned_tokens": self.learned_tokens,
            "document_tokens": self.document_tokens,
            "weights": self.weights,
            "trained_weights": self.trained_weights,
            "megabytes": round(self.megabytes, 1),
            "refused": list(self.refused),
            "warned": list(self.warned),
            "estimate": self.estimate.plain() if self.estimate else None,
            "evidence": self.evidence.plain() if self.evidence else None,
        }
