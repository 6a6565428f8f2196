"""Hard negatives mined by BM25 and by a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.errors import DataError, RefusedInput
from luthier.workflows.hard_negatives import MinedNegatives

ROWS = [
    {"query": "where is the fox", "positive": "the fox is here"},
    {"query": "where is the fox", "positive": "a fox is in the house"},
    {"query": "which dog sleeps", "positive": "the lazy dog sleeps"},
]
CORPUS = ["the fox is a quick animal", "where is it", "my card"]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("model", ["", "bert"])
def test_negatives_are_mined(
    model: str, tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    corpus = write(tmp_path / "corpus.jsonl", [{"text": text} for text in CORPUS])
    base = str(family_folder(model)) if model else None
    target = tmp_path / "mined.jsonl"
    found = luthier.convert(data, target, mine_negatives=2, corpus=str(corpus), model=base)
    assert isinstance(found, MinedNegatives)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert (found.rows, found.documents) == (3, 6)
    assert found.negatives == sum(len(line.get("negatives", [])) for line in lines) > 0
    own = {ROWS[0]["positive"], ROWS[1]["positive"]}
    for line, row in zip(lines, ROWS, strict=True):
        assert (line["anchor"], line["positive"]) == (row["query"], row["positive"])
        assert len(line.get("negatives", [])) <= 2
    for line in lines[:2]:  # no other positive of the query
        assert not own & {*line.get("negatives", [])}
    # No document is far enough from the positive.
    none = luthier.convert(data, target, mine_negatives=5, model=base, margin=1.0, overwrite=True)
    assert isinstance(none, MinedNegatives) and (model or none.negatives == 0)


def test_rows_without_a_positive_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n')
    with pytest.raises(DataError) as caught:
        luthier.convert(data, tmp_path / "out.jsonl", mine_negatives=5)
    assert caught.value.problems[0].rule == "row.pair"


@pytest.mark.parametrize("options", [{"corpus": "x.jsonl"}, {"mine_negatives": 1, "to": "chat"}])
def test_options_without_effect_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RefusedInput):
        luthier.convert(write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl", **options)
