"""Reranking: the relevance of documents to a query."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Task

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat


class Reranking(Task):
    """Relevance of documents."""

    head: ClassVar[HeadKind] = "sequence_classification"
    ranks: ClassVar[bool] = True

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Predict rows of a file, because a row has two texts."""
        return f"predict {model_id} --input pairs.jsonl"


RERANKING = Reranking()
