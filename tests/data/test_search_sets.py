"""Test sets for search in the forms of BEIR, TREC and pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.data.rules import SEARCH_RULES
from luthier.data.search_sets import load_search_set
from luthier.errors import DataError

CORPUS = [
    {"_id": "d1", "title": "Fox", "text": "The fox is quick."},
    {"_id": "d2", "title": "", "text": "The dog sleeps."},
    {"_id": "7", "text": "A card."},
]
QUERIES = [{"_id": "q1", "text": "which animal is quick"}, {"_id": "q2", "text": "who sleeps"}]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "queries.jsonl", QUERIES), write(tmp_path / "corpus.jsonl", CORPUS)


@pytest.mark.parametrize(
    "qrels",
    [
        "query-id\tcorpus-id\tscore\nq2\td2\t2\nq2\t7\t1\nq2\td1\t0\n",
        "q2 0 d2 2\nq2 0 7 1\nq1 0 d1 0\n",
    ],
    ids=["BEIR", "TREC"],
)
def test_queries_of_qrels(qrels: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "qrels.tsv").write_text(qrels)
    found = load_search_set(*files, tmp_path / "qrels.tsv")
    assert found.documents == ["Fox The fox is quick.", "The dog sleeps.", "A card."]
    assert (found.ids, found.queries) == (["d1", "d2", "7"], ["who sleeps"])
    assert (found.gains, found.rows[0].line, found.added) == ([{1: 2.0, 2: 1.0}], 2, 0)


@pytest.mark.parametrize(
    "rows",
    [
        [{"query": "who", "positive": "The dog sleeps."}, {"query": "who", "positive": "A bird."}],
        [
            {"query": "who", "document": "The dog sleeps.", "label": 1},
            {"query": "who", "document": "A bird.", "label": 1},
        ],
        [
            {"question": "who", "context": text, "answers": {"text": [text], "answer_start": [0]}}
            for text in ("The dog sleeps.", "A bird.")
        ],
    ],
)
def test_relevant_texts_without_qrels(
    rows: list[dict[str, Any]], files: tuple[Path, Path], tmp_path: Path
) -> None:
    found = load_search_set(write(tmp_path / "rows.jsonl", rows), files[1])
    assert (found.queries, found.gains, found.added) == (["who"], [{1: 1.0, 3: 1.0}], 1)
    assert found.documents[3] == "A bird."


@pytest.mark.parametrize(
    ("qrels", "rule", "line"),
    [
        ("query-id\tcorpus-id\tscore\nq1\td9\t1\n", "qrels.document", 2),
        ("q1\td1\t1\nq1 d1 yes\n", "qrels.line", 2),
        ("q9\td1\t1\n", "qrels.query", 0),
        ("q1\td1\t0\n", "qrels.empty", 0),
    ],
)
def test_mismatching_qrels_are_refused(
    qrels: str, rule: str, line: int, files: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "qrels.tsv").write_text(qrels)
    with pytest.raises(DataError) as refused:
        load_search_set(*files, tmp_path / "qrels.tsv")
    (problem,) = refused.value.problems
    assert problem.location is not None
    assert (problem.rule, problem.location.line) == (rule, line)
    assert rule in SEARCH_RULES


def test_rows_without_relevant_text(files: tuple[Path, Path]) -> None:
    with pytest.raises(DataError) as refused:
        load_search_set(*files)
    assert refused.value.problems[0].rule == "row.pair"


@pytest.mark.parametrize("positive", ["The fox is quick.", "Fox The fox is quick."])
def test_titled_document_is_matched_by_text(
    positive: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"query": "who", "positive": positive}])
    found = load_search_set(rows, files[1])
    assert (found.gains, found.added) == ([{0: 1.0}], 0)


def test_equal_documents_are_merged(files: tuple[Path, Path], tmp_path: Path) -> None:
    corpus = write(tmp_path / "twice.jsonl", [*CORPUS, {"_id": "8", "text": "A card."}])
    (tmp_path / "qrels.tsv").write_text("q1\t8\t1\n")
    found = load_search_set(files[0], corpus, tmp_path / "qrels.tsv")
    assert (found.ids, found.gains) == (["d1", "d2", "7"], [{2: 1.0}])
    rows = write(tmp_path / "rows.jsonl", [{"query": "what", "positive": "A card."}])
    assert load_search_set(rows, corpus).gains == [{2: 1.0}]
