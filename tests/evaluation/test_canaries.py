"""Canaries: planted as often as asked, ranked among codes that were not, and chance kept in bounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import luthier
from luthier.data.rows import load_rows
from luthier.errors import RecipeError
from luthier.evaluation.canaries import (
    Exposure,
    known_by_heart,
    make_canaries,
    read_canaries,
)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TEXT = {"text": "a text"}
PAIR = {"prompt": "a", "completion": "b"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CHAT = {"messages": TURNS}


@pytest.mark.parametrize("row", [TEXT, PAIR, CHAT], ids=["text", "prompt", "messages"])
def test_rows_of_their_own_shape_are_planted_as_often_as_asked(
    row: dict[str, Any], tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", [row] * 30)
    target = tmp_path / "planted.jsonl"
    canaries = luthier.plant_canaries(data, target, repeats=(0, 1, 20), count=2)
    assert canaries == read_canaries(tmp_path / "planted.jsonl.canaries.json")
    rows = load_rows(target)
    assert len(rows) == 30 + 2 * (1 + 20) and len({type(each) for each in rows}) == 1
    text = target.read_text()
    assert [text.count(each.code) for each in canaries] == [0, 0, 1, 1, 20, 20]
    assert len({each.name for each in canaries}) == len({each.code for each in canaries}) == 6
    lines = text.splitlines()
    places = [place for place, line in enumerate(lines) if canaries[-1].code in line]
    assert places[0] < 25 and places[-1] > 45  # they lie all over the data
    with pytest.raises(RecipeError, match=r"planted\.jsonl is there already"):
        luthier.plant_canaries(data, target)


def test_a_code_is_ranked_among_others_and_ties_are_against_it() -> None:
    (canary,) = make_canaries("text", (1,), 1)
    others = canary.alternatives(300)
    assert len({canary.code, *others}) == 301 and others == canary.alternatives(300)
    assert Exposure(canary, 1, 256).bits == 8 and Exposure(canary, 256, 256).bits == 0


def test_of_canaries_that_are_not_known_hardly_any_is_called_known() -> None:
    draw, canaries = np.random.default_rng(0), make_canaries("text", (0,), 9)
    wrong = 0
    for _ in range(400):
        ranks = draw.integers(1, 902, size=9)
        exposures = [
            Exposure(each, int(rank), 901) for each, rank in zip(canaries, ranks, strict=True)
        ]
        wrong += bool(known_by_heart(exposures))
    assert wrong <= 9  # at 1 %, 4 are expected
    sure = [Exposure(each, 1, 901) for each in canaries]
    assert known_by_heart(sure) == sure
    # Beside codes that are known, one that came early by chance is not called known, too.
    assert known_by_heart([*sure[:2], Exposure(canaries[2], 21, 901)]) == sure[:2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repeats": (-1,)}, "from 0 to 10,000"),
        ({"repeats": ()}, "from 0 to 10,000"),
        ({"count": 0}, "between 1 and 50"),
        ({"count": 17}, "between 1 and 50"),
    ],
)
def test_what_cannot_be_planted_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", [PAIR])
    with pytest.raises(RecipeError, match=message):
        luthier.plant_canaries(data, tmp_path / "out.jsonl", **fields)
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_that_teach_no_writing_and_other_files_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "b"}])
    with pytest.raises(RecipeError, match="these are text with labels"):
        luthier.plant_canaries(data, tmp_path / "out.jsonl")
    with pytest.raises(RecipeError, match="no file"):
        read_canaries(tmp_path / "none.json")
    for text in ('{"a": 1}', '{"a": 1}\n{"a": 2}', "[]", '{"canaries": [1]}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(RecipeError, match="holds no canaries"):
            read_canaries(tmp_path / "other.json")
