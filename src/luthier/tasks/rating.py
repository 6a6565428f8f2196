"""Rating: a number for each text, in the scale of the data."""

from __future__ import annotations

from typing import ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Answer, Task


class Rating(Task):
    """Ratings of texts."""

    head: ClassVar[HeadKind] = "sequence_classification"
    learns_words: ClassVar[bool] = True

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the rating."""
        return f"{answer['rating']:.3f}"


RATING = Rating()
