"""Test sets for search: documents, queries, and the relevant documents of each query.

The form is that of BEIR (Thakur et al. 2021, arXiv:2104.08663): a corpus and queries with ``_id``
and ``text``, and qrels. Without qrels, the rows have a query and a relevant text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.data.files.parsing import Record, quote
from luthier.data.prompts import load_inputs
from luthier.data.rows import load_rows
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
    """Distinct documents, each with its title, if any."""
    ids: list[str]
    """Ids of the documents, of the first of equal documents; line numbers if the corpus has none."""
    rows: list[Row]
    """One row per query."""
    queries: list[str]
    gains: list[dict[int, float]]
    """Relevance of the relevant documents of each query, by index of the document."""
    added: int = 0
    """Number of relevant documents that the corpus lacked."""
    left_out: int = 0
    """Number of queries without a relevant document."""


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
    collection = _Collection()
    for number, (record, row) in enumerate(load_inputs(corpus), 1):
        title, text = record.get("title"), row.plain_text()
        titled = f"{title} {text}" if isinstance(title, str) and title else text
        collection.add(titled, _id_of(record) or str(number), text)
    documents, ids = collection.documents, collection.ids
    if qrels is None:
        return _labelled_queries(data, columns, collection)
    gains = _read_qrels(Path(qrels), collection.place_of_id)
    named = {_id_of(record): row for record, row in load_inputs(data, columns)}
    if missing := next((name for name in gains if name not in named), None):
        message = f"the query {quote(missing)} of {qrels} is missing."
        fix = "Give the file of queries that belongs to the qrels, with `_id` and `text`."
        raise DataError([Problem("qrels.query", message, fix, Location(str(data)))])
    rows = [named[name] for name in gains]
    queries = [row.plain_text() for row in rows]
    left_out = len(named) - len(rows)
    return SearchSet(documents, ids, rows, queries, [*gains.values()], left_out=left_out)


class _Collection:
    """Distinct documents: equal documents are a single document, so a hit on any copy is right."""

    def __init__(self) -> None:
        self.documents: list[str] = []
        self.ids: list[str] = []
        self.place_of_id: dict[str, int] = {}
        self._place: dict[str, int] = {}
        self._places_of_text = defaultdict[str, set[int]](set)

    def add(self, document: str, name: str, text: str) -> None:
        """Add a document with the id, and the text without the title."""
        place = self._place.setdefault(document, len(self.documents))
        if place == len(self.documents):
            self.documents.append(document)
            self.ids.append(name)
        self.place_of_id[name] = place
        self._places_of_text[text].add(place)

    def places(self, text: str) -> set[int]:
        """Return the documents with a text, with or without the title; none for a new text."""
        titled = self._place.get(text)
        return self._places_of_text.get(text, set()) if titled is None else {titled}


def _labelled_queries(
    data: str | Path, columns: Mapping[str, str] | None, collection: _Collection
) -> SearchSet:
    size = len(collection.documents)
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
        if not collection.places(text):
            collection.add(text, str(row.location), text)
        if gain > 0:
            first.setdefault(query, row)
            gains[query] |= dict.fromkeys(collection.places(text), gain)
    documents, rows, queries = collection.documents, [*first.values()], [*gains]
    added = len(documents) - size
    return SearchSet(documents, collection.ids, rows, queries, [*gains.values()], added)


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
                problems.append(Problem("qrels.line", message, _QRELS_FIX, where))
            continue
        if document not in place:
            message = f"the corpus has no document {quote(document)}."
            fix = "Give the corpus that belongs to the qrels, with `_id`."
            problems.append(Problem("qrels.document", message, fix, Location(str(path), number)))
        elif score > 0:
            at = place[document]
            found[query][at] = max(score, found[query].get(at, 0.0))
    if not found and not problems:
        message = "no line has a score above 0."
        problems.append(Problem("qrels.empty", message, _QRELS_FIX, Location(str(path))))
    if problems:
        raise DataError(problems)
    return found


def _cells(cells: Sequence[str]) -> tuple[str, str, float]:
    """Return query, document and score of a line of BEIR, or of TREC with a second column of 0."""
    query, *others, document, score = cells
    if len(others) > 1:
        raise ValueError("too many cells")
    return query, document, float(score)
