"""Hard negatives for rows of queries and positives, found by BM25 or an embedding model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.data.files.writers import to_json
from luthier.data.prompts import load_inputs
from luthier.data.rows import load_rows
from luthier.data.shapes.texts import TextPair
from luthier.errors import DataError, Problem
from luthier.evaluation.retrieval import BM25Index, NegativeMiner
from luthier.files import write_bytes
from luthier.inference.embeddings import check_embeds, gives_embeddings
from luthier.inference.prediction import Predictor
from luthier.library.models import check_active, find


@dataclass(frozen=True)
class MinedNegatives:
    """A file of rows with hard negatives."""

    rows: int
    negatives: int
    documents: int
    """Number of distinct documents that were searched."""


def mine_negatives(
    source: str,
    target: Path,
    count: int,
    corpus: str | None,
    model: str | None,
    margin: float,
    columns: Mapping[str, str] | None,
) -> MinedNegatives:
    """Write the rows of ``source`` with at most ``count`` hard negatives each to ``target``.

    Args:
        source: Rows with a query and a positive. Negatives of the rows are replaced.
        target: JSON Lines file.
        count: Maximum number of negatives per row.
        corpus: Documents to search next to the positives of all rows.
        model: Id of an embedding model; BM25 if absent.
        margin: Share of the positive's score that is too close.
        columns: Columns of the keys.

    Raises:
        DataError: for rows without a positive.
        RefusedInput: for unreadable rows, or a model without embeddings.
    """
    rows = load_rows(source, columns)
    pairs = [row for row in rows if isinstance(row, TextPair)]
    if len(pairs) < len(rows):
        other = next(row for row in rows if not isinstance(row, TextPair))
        fix = 'Write {"query": "...", "positive": "..."}.'
        raise DataError([Problem("row.pair", "the row has no positive.", fix, other.location)])
    further = [] if corpus is None else [row.plain_text() for _, row in load_inputs(corpus)]
    miner = NegativeMiner([(row.text, row.positive) for row in pairs], further)
    scores: Iterable[NDArray[np.float32]]
    if model is None:
        index = BM25Index(miner.items)
        scores = (index.scores(row.text) for row in pairs)
    else:
        stored = check_active(find(model, is_able=gives_embeddings))
        check_embeds(stored, stored.objective)
        predictor = Predictor.open(stored)
        query_QH = predictor.embed([row.text for row in pairs])
        document_NH = predictor.embed(miner.items)
        scores = (document_NH @ query_H for query_H in query_QH)
    lines, mined = list[str](), 0
    for row, score_N in zip(pairs, scores, strict=True):
        negatives = miner.negatives(row.text, row.positive, score_N, count, margin)
        mined += len(negatives)
        lines.append(to_json(replace(row, negatives=tuple(negatives)).record()))
    write_bytes(target, "".join(f"{line}\n" for line in lines).encode())
    return MinedNegatives(len(pairs), mined, len(miner.items))
