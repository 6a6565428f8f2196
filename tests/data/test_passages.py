"""Rows with passages and a cited answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.data.conversations.citations import DECLINED, add_passages, declines
from luthier.data.rows import load_rows
from luthier.data.shapes.passages import CitedAnswer, decline_some
from luthier.types import Message

ROW = {"question": "Who?", "passages": ["Ann did.", "Bob slept."], "answer": "Ann", "cited": [1]}


def read(folder: Path, *records: dict[str, Any]) -> list[CitedAnswer]:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    rows = [*load_rows(file)]
    assert all(isinstance(row, CitedAnswer) for row in rows)
    return rows  # type: ignore[return-value]


def test_prompt_is_that_of_ask_and_reply_cites(tmp_path: Path) -> None:
    (row,) = read(tmp_path, ROW)
    asked = add_passages([Message("user", "Who?")], ["Ann did.", "Bob slept."])
    assert [*row.turns()] == [*asked, Message("assistant", "Ann [1]")]
    assert row.record() == ROW


def test_citations_of_the_answer_stay_in_place(tmp_path: Path) -> None:
    cited = {**ROW, "answer": "Ann [1], while Bob slept [2]."}
    (row,) = read(tmp_path, {key: value for key, value in cited.items() if key != "cited"})
    assert (row.reply, row.cited) == ("Ann [1], while Bob slept [2].", (1, 2))
    assert row.expected_reply() == "Ann, while Bob slept."


def test_row_without_answer_declines(tmp_path: Path) -> None:
    rows = read(
        tmp_path, {**ROW, "answer": None, "cited": []}, {**ROW, "answer": DECLINED, "cited": []}
    )
    assert [row.reply for row in rows] == [DECLINED, DECLINED]
    assert declines(DECLINED) and not declines("Ann [1]")
    assert declines("T\u00e0i li\u1ec7u kh\u00f4ng tr\u1ea3 l\u1eddi c\u00e2u h\u1ecfi n\u00e0y.")
    assert not declines("The passages do not contain the price, but the fee is 5 euros.")


def test_declined_rows_have_no_passage_with_the_answer() -> None:
    rows = [
        CitedAnswer(
            "f", n, f"Word {n}?", (f"word{n}x", "nothing", f"also word{n}x"), f"word{n}x", (1,)
        )
        for n in range(10)
    ]
    made, count = decline_some(rows, 0.3, seed=1)
    declined = [row for row in made if isinstance(row, CitedAnswer) and row.answer is None]
    assert (len(made), count, len(declined)) == (10, 3, 3)
    for row in declined:
        assert row.cited == () and len(row.passages) == 3
        assert not any(f"word{row.line}x" in each for each in row.passages)
    again, count = decline_some(made, 0.3, seed=1)
    assert (again, count) == (made, 0)
