"""Reranking: the relevance of documents to a query."""

from __future__ import annotations

from typing import ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Task


class Reranking(Task):
    """Relevance of documents."""

    head: ClassVar[HeadKind] = "sequence_classification"
    ranks: ClassVar[bool] = True


RERANKING = Reranking()
