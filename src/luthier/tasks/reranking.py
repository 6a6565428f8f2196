"""Reranking: the relevance of documents to a query."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from luthier.data.shapes.texts import QueryDocument
from luthier.errors import DataError, Problem
from luthier.evaluation.retrieval import Ranking, retrieval_scores
from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Answers, Reader, Task

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.evaluation.evaluate import Evaluation
    from luthier.evaluation.long_rows import FittingRows


class RerankingTask(Task):
    """Relevance of documents."""

    head: ClassVar[HeadKind] = "sequence_classification"
    ranks: ClassVar[bool] = True
    two_sided: ClassVar[bool] = False  # query and document are one input

    def evaluate(self, reader: Reader, rows: FittingRows, sides: Sequence[Answers]) -> Evaluation:
        """Score the order of each query's documents, for queries with a relevant document.

        Raises:
            DataError: if no query has relevant and other documents.
        """
        (first,) = sides
        pairs = cast("Sequence[QueryDocument]", rows.rows)
        queries = defaultdict[str, list[tuple[float, float]]](list)
        for row, answer in zip(pairs, first, strict=True):
            queries[row.text].append((answer["score"], row.label or 0.0))
        ranked = [Ranking.of(*zip(*scored, strict=True)) for scored in queries.values()]
        scored = [each for each in ranked if each is not None]
        if not scored:
            message = "no query has a relevant document and another document."
            fix = 'Add "negatives" to the rows: `luthier convert --mine-negatives 5`.'
            raise DataError([Problem("row.no_label", message, fix, pairs[0].location)])
        ranks, gains = ([each.rank for each in scored], [each.ndcg for each in scored])
        remark = (
            f"{len(scored):,} queries with {len(pairs) / len(queries):.1f} documents on average"
        )
        return rows.evaluation(retrieval_scores(ranks, gains), first, [remark])

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Predict rows of a file, because a row has two texts."""
        return f"predict {model_id} --input pairs.jsonl"


RERANKING = RerankingTask()
