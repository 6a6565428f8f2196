"""Tagging: a tag for each word, such as the kind of an entity."""

from __future__ import annotations

from typing import ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Task


class Tagging(Task):
    """Tags of words."""

    head: ClassVar[HeadKind] = "token_classification"


TAGGING = Tagging()
