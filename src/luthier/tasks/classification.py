"""Classification: a label, or several labels, for each row."""

from __future__ import annotations

from typing import ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Task


class Classification(Task):
    """Labels of texts, images and audio."""

    head: ClassVar[HeadKind] = "sequence_classification"
    learns_words: ClassVar[bool] = True


CLASSIFICATION = Classification()
