"""Classification: a label, or several labels, for each row."""

from __future__ import annotations

from typing import ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Answer, Task


class Classification(Task):
    """Labels of texts, images and audio."""

    head: ClassVar[HeadKind] = "sequence_classification"
    learns_words: ClassVar[bool] = True

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the likeliest labels with probabilities."""
        scores = sorted(answer["scores"].items(), key=lambda item: -item[1])[:top]
        return "\n".join(f"{p:6.1%}  {name}" for name, p in scores)


CLASSIFICATION = Classification()
