"""Rerankers: a score of a query and a document in one pass (cross-encoders).

Nogueira & Cho 2019, arXiv:1901.04085, with one output and binary cross-entropy, the default of
sentence-transformers: a pair of a query and its positive has the target 1, a pair with a negative
0, and a labelled pair its own label from 0 to 1. The head is transformers' head for sequences with
one label, so the model loads in sentence-transformers' ``CrossEncoder`` with equal scores.

Query and document are the two texts of the tokenizer's own pair encoding, with separators and
BERT's ``token_type_ids``. Truncation removes the end of the document. Left out: losses over the
list of a query's documents, and distillation from a larger reranker.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.shapes.texts import QueryDocument, TextPair
from luthier.errors import RowRefused
from luthier.evaluation.retrieval import BM25Index, NegativeMiner
from luthier.models.networks.heads import Head
from luthier.objectives.base import Objective, TrainingDefaults
from luthier.tasks import RERANKING, Task
from luthier.types import Example, Loss, Row, weight_at_end

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


class Reranker(Objective):
    """Relevance of documents to a query.

    Use ``contrastive`` to search large collections, or if only a few hundred queries are available.
    """

    method: Literal["reranker"] = "reranker"
    hard_negatives: int = Field(default=4, ge=0, le=100)
    """Negatives for each pair without negatives, mined with BM25 among the positives."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Mean label; default: from the training rows."""

    task: ClassVar[Task] = RERANKING
    truncates_long_rows: ClassVar[bool] = True
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"pair", "relevance"})
    can_shard: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"relevance"})
    further_shapes: ClassVar[frozenset[str]] = frozenset({"pair"})
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(min_epochs=1, max_epochs=5)

    def head(self) -> Head:
        """Return a head with one output; a new head starts at the mean label.

        So a model that only learns how frequent relevant documents are shows no gain.
        """
        bias = () if self.share is None else (math.log(self.share / (1 - self.share)),)
        return Head(self.task.head, ("relevance",), "regression", bias)

    def regroup(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return a labelled pair for each positive and negative of the rows."""
        pairs = [row for row in rows if isinstance(row, TextPair)]
        mined = self._mine([row for row in pairs if not row.negatives])
        regrouped = [row for row in rows if not isinstance(row, TextPair)]
        for row in pairs:
            regrouped.append(QueryDocument(row.file, row.line, row.text, row.positive, 1.0))
            regrouped += [
                QueryDocument(row.file, row.line, row.text, text, 0.0)
                for text in (row.negatives or next(mined))
            ]
        return regrouped if pairs else rows

    def needs_other_rows(self, row: Row) -> bool:
        """Return whether negatives of the row are mined."""
        return isinstance(row, TextPair) and not row.negatives and self.hard_negatives > 0

    def _mine(self, rows: Sequence[TextPair]) -> Iterator[tuple[str, ...]]:
        """Yield the negatives of each row, from the positives of the other rows."""
        miner = NegativeMiner([(row.text, row.positive) for row in rows])
        searches = self.hard_negatives and len(miner.items) > 1
        index = BM25Index(miner.items) if searches else None
        for row in rows:
            found: list[str] = []
            if index is not None:
                score_N = index.scores(row.text)
                found = miner.negatives(row.text, row.positive, score_N, self.hard_negatives)
            yield tuple(found)

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Compute the mean label, and reject rows with equal labels."""
        all_labels = [row.label or 0.0 for row in rows if isinstance(row, QueryDocument)]
        labels = {*all_labels}
        if len(labels) == 1:
            raise RowRefused(
                "label.one_class",
                f"all pairs of query and document have the label {labels.pop()}.",
                'Add "negatives" to the rows, or pairs of other labels. '
                "`luthier convert --mine-negatives 5` finds negatives in a collection.",
            )
        if self.share is not None or not labels:
            return self
        return self.model_copy(update={"share": statistics.fmean(all_labels)})

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return query and document as one sequence, with the label as target."""
        if not isinstance(row, QueryDocument):
            raise RowRefused(
                "row.pair",
                "the row is one text, and a reranker scores a query with a document.",
                'Write {"query": "...", "document": "..."}.',
            )
        if chat.tokenizer.num_special_tokens_to_add(True) > 1:
            pair = chat.text_tokenizer.encode_pair(row.text, row.document)
            weight_T = weight_at_end(len(pair.ids_T))
            example = Example(pair.ids_T, weight_T, index, segment_T=pair.segment_T)
        else:  # decoders have no separator: an empty line
            example = chat.encode_input(row, index)
        label = 0.0 if row.label is None else row.label
        return replace(example, target=np.array([label], dtype=np.float32))

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed binary cross-entropy, with the share of correct decisions."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        score_R = network.row_scores(batch).float()[:, 0]
        label_R = torch.from_numpy(np.concatenate(batch.tree.targets)).to(score_R.device)
        each_R = binary_cross_entropy_with_logits(score_R, label_R, reduction="none")
        right_R = (score_R > 0) == (label_R > 0.5)
        return Loss.from_rows(each_R, {"accuracy": float(right_R.sum())})

    def describe(self, example: Example) -> str:
        """Return the label of the pair."""
        return f"{float(np.asarray(example.target)[0]):g}"

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the probability that each document is relevant, in tree order."""
        return [{"score": p} for p in network.row_scores(batch).float()[:, 0].sigmoid().tolist()]
