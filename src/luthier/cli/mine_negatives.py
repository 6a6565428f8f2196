"""``luthier mine-negatives``: hard negatives for rows of queries and positives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.console import check_output, heavy_imports, note, print_text
from luthier.cli.options import AtLeastOne, Mapped, RowSource
from luthier.errors import DataError, Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class MinedNegatives:
    """A file of rows with hard negatives."""

    rows: int
    negatives: int
    documents: int
    """Number of distinct documents that were searched."""
    output: Path


def mine_negatives(
    data: RowSource,
    output: Annotated[Path, typer.Option("--out")],
    *,
    corpus: str | None = None,
    model: str | None = None,
    count: AtLeastOne = 5,
    margin: Annotated[float, typer.Option(min=0, max=1)] = 0.05,
    columns: Mapped = None,
    overwrite: bool = False,
) -> MinedNegatives:
    """Find hard negatives for pairs of a query and a positive.

    The search covers the positives of all rows and the documents of --corpus. Negatives of the rows are
    replaced.

    Args:
        data: File of rows with anchor and positive.
        output: JSON Lines file for the rows with negatives.
        corpus: File of documents, one text per row.
        model: Id of an embedding model; BM25 by default.
        count: Maximum number of negatives per row.
        margin: Share of the positive's score that is too close.
        columns: Column of a key, e.g. prompt=question; repeatable.
        overwrite: Replace an existing file.

    Returns:
        The file and the number of rows and negatives.

    Raises:
        RefusedInput: for unreadable rows, or a model without embeddings.
    """
    with heavy_imports():
        from luthier.data.rows import load_inputs, load_rows
        from luthier.data.shapes.texts import TextPair
        from luthier.data.writers import to_json
        from luthier.evaluation.retrieval import BM25Index, NegativeMiner
        from luthier.files import write_bytes
        from luthier.inference.embeddings import check_embeds, gives_embeddings
        from luthier.inference.prediction import Predictor
        from luthier.library.models import check_active, find

    check_output(output, data, corpus, overwrite=overwrite)
    rows = load_rows(data, columns)
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
    write_bytes(output, "".join(f"{line}\n" for line in lines).encode())
    return MinedNegatives(len(pairs), mined, len(miner.items), output)


def show_mined(found: MinedNegatives, margin: float) -> None:
    """Print the file and the numbers, and the reason for the default margin."""
    from luthier.evaluation.retrieval import MARGIN, MARGIN_REASON

    print_text(
        f"{found.negatives:,} negatives for {found.rows:,} rows, out of {found.documents:,} documents, "
        f"written to {found.output}"
    )
    if margin == MARGIN:
        note(MARGIN_REASON)
