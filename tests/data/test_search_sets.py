"""Test sets for search in the forms of BEIR, TREC and pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

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
        ("query-id\tcorpus-id\tscore\nq1\td9\t1\n", "column.missing", 2),
        ("q1\td1\t1\nq1 d1 yes\n", "table.cells", 2),
        ("q9\td1\t1\n", "column.missing", 0),
        ("q1\td1\t0\n", "file.empty", 0),
    ],
)
def test_qrels_that_do_not_fit(
    qrels: str, rule: str, line: int, files: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "qrels.tsv").write_text(qrels)
    with pytest.raises(DataError) as refused:
        load_search_set(*files, tmp_path / "qrels.tsv")
    (problem,) = refused.value.problems
    assert problem.location is not None
    assert (problem.rule, problem.location.line) == (rule, line)


def test_rows_without_relevant_text(files: tuple[Path, Path]) -> None:
    with pytest.raises(DataError) as refused:
        load_search_set(*files)
    assert refused.value.problems[0].rule == "row.pair"
