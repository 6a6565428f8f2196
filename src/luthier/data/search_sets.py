"""Test sets for search: documents, queries, and the relevant documents of each query.

The form is that of BEIR (Thakur et al. 2021, arXiv:2104.08663): a corpus and queries with ``_id``
and ``text``, and qrels. Without qrels, the rows have a query and a relevant text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.data.parsing import Record, quote
from luthier.data.rows import load_inputs, load_rows
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import QueryDocument, TextPair
from luthier.errors import DataError, Location, Problem
from luthier.types import Row

_ID_KEYS = ("_id", "id", "doc_id", "query_id")
_QRELS_FIX = "Write `query-id<TAB>corpus-id<TAB>score` per line, or TREC's four columns."


@dataclass(frozen=True)
class SearchSet:
    """Documents, and queries with their relevant documents."""

    documents: list[str]
    ids: list[str]
    """Ids of the documents; line numbers if the corpus has none."""
    rows: list[Row]
    """One row per query."""
    queries: list[str]
    gains: list[dict[int, float]]
    """Relevance of the relevant documents of each query, by index of the document."""
    added: int = 0
    """Number of relevant documents that the corpus lacked."""


def load_search_set(
    data: str | Path,
    corpus: str | Path,
    qrels: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
) -> SearchSet:
    """Read a test set: the documents of ``corpus``, and the queries of ``data``.

    With ``qrels``, the queries are those of the file with a relevant document.

    Raises:
        DataError: with all problems of a file.
    """
    documents, ids = [], []
    for number, (record, row) in enumerate(load_inputs(corpus), 1):
        title, text = record.get("title"), row.plain_text()
        documents.append(f"{title} {text}" if isinstance(title, str) and title else text)
        ids.append(_id_of(record) or str(number))
    if qrels is None:
        return _labelled_queries(data, columns, documents, ids)
    gains = _read_qrels(Path(qrels), {name: place for place, name in enumerate(ids)})
    named = {_id_of(record): row for record, row in load_inputs(data, columns)}
    if missing := next((name for name in gains if name not in named), None):
        message = f"the query {quote(missing)} of {qrels} is missing."
        fix = "Give the file of queries that belongs to the qrels, with `_id` and `text`."
        raise DataError([Problem("column.missing", message, fix, Location(str(data)))])
    rows = [named[name] for name in gains]
    return SearchSet(documents, ids, rows, [row.plain_text() for row in rows], [*gains.values()])


def _labelled_queries(
    data: str | Path, columns: Mapping[str, str] | None, documents: list[str], ids: list[str]
) -> SearchSet:
    place = {text: number for number, text in enumerate(documents)}
    size = len(documents)
    gains = defaultdict[str, dict[int, float]](dict)
    first: dict[str, Row] = {}
    for row in load_rows(data, columns):
        match row:
            case TextPair():
                query, text, gain = row.text, row.positive, 1.0
            case QueryDocument():
                query, text, gain = row.text, row.document, row.label or 0.0
            case AnsweredQuestion():
                query, text, gain = row.question, row.context, 1.0
            case _:
                message = "the row has no query with a relevant text."
                fix = 'Write {"query", "positive"}, or give `qrels`.'
                raise DataError([Problem("row.pair", message, fix, row.location)])
        if text not in place:
            place[text] = len(documents)
            documents.append(text)
            ids.append(str(row.location))
        if gain > 0:
            first.setdefault(query, row)
            gains[query][place[text]] = gain
    rows, queries = [*first.values()], [*gains]
    return SearchSet(documents, ids, rows, queries, [*gains.values()], len(documents) - size)


def _id_of(record: Record) -> str:
    return next((str(record[key]) for key in _ID_KEYS if record.get(key) is not None), "")


def _read_qrels(path: Path, place: Mapping[str, int]) -> dict[str, dict[int, float]]:
    """Return the relevance of documents for each query with a relevant document."""
    found = defaultdict[str, dict[int, float]](dict)
    problems: list[Problem] = []
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeError) as error:
        message, fix = f"the file cannot be read: {error}.", "Check the path of the qrels."
        raise DataError([Problem("file.unreadable", message, fix, Location(str(path)))]) from None
    for number, line in enumerate(lines, 1):
        cells = line.split()
        try:
            query, document, score = _cells(cells)
        except ValueError:
            if cells and number > 1:  # the first line may be a header
                message = f"{quote(line)} is not a query, a document and a score."
                where = Location(str(path), number)
                problems.append(Problem("table.cells", message, _QRELS_FIX, where))
            continue
        if document not in place:
            message = f"the corpus has no document {quote(document)}."
            fix = "Give the corpus that belongs to the qrels, with `_id`."
            problems.append(Problem("column.missing", message, fix, Location(str(path), number)))
        elif score > 0:
            found[query][place[document]] = score
    if not found and not problems:
        message = "no line has a score above 0."
        problems.append(Problem("file.empty", message, _QRELS_FIX, Location(str(path))))
    if problems:
        raise DataError(problems)
    return found


def _cells(cells: Sequence[str]) -> tuple[str, str, float]:
    """Return query, document and score of a line of BEIR, or of TREC with a second column of 0."""
    query, *others, document, score = cells
    if len(others) > 1:
        raise ValueError("too many cells")
    return query, document, float(score)
