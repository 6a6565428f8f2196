"""What is written of a changed row: the same form, every further key, the texts that were meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.data.rows import load_rows
from luthier.errors import DataError
from luthier.gate.clean import changes_path

Z = "\u200b"


def both(tmp_path: Path, *rows: Any, **fixes: Any) -> list[Any]:
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    luthier.clean(source, target, overwrite=True, **(fixes or {"strip": True}))
    return [json.loads(line) for line in target.read_text().split("\n") if line]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a?", "completion": "b", "tags": ["x"]},
        {"text": "a?", "label": "b"},
        {"text": "a?", "label": ["b", "c"], "n": 1},
        {"text": "a?", "rating": 3},
        {"anchor": "a?", "positive": "b"},
        {"prompt": "a?", "expected": "b"},
        {"prompt": "a?", "chosen": "b", "rejected": "c", "score": None},
        {"prompt": "a?", "completion": "b", "label": True},
        {"messages": [{"role": "user", "content": "a?", "name": "n"},
                      {"role": "assistant", "content": "b", "weight": 1}], "k": "x"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a?"}]},
                      {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}],
         "system": "s"},
        {"instruction": "a?", "input": "more", "output": "b", "source": "s"},
        {"question": "a?", "answer": "b"},
        {"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "s"}],
         "messages": [{"role": "user", "content": [{"text": "a?"}]},
                      {"role": "assistant", "content": [{"text": "b"}]}]},
        {"input": {"messages": [{"role": "user", "content": "a?"}]},
         "preferred_output": [{"role": "assistant", "content": "b"}],
         "non_preferred_output": [{"role": "assistant", "content": "c"}]},
        {"input": "a?"},
        {"query": "a?", "positive": "b"},
    ],
)  # fmt: skip
def test_every_form_stays_what_it_is(tmp_path: Path, row: Any) -> None:
    damaged = json.loads(json.dumps(row).replace("a?", f"a?{Z}"))
    assert damaged != row
    made = both(tmp_path, row, damaged)
    assert made[0] == row
    source = load_rows(tmp_path / "a.jsonl")
    target = load_rows(tmp_path / "b.jsonl")
    assert len(target) == 2 and source[1] != source[0]
    if "instruction" in row:  # two keys are one text: written anew
        joined = {"instruction": "a?\n\nmore", "input": "", "output": "b", "source": "s"}
        assert made[1] == joined
    else:
        assert made[1] == row


def test_words_and_tags_are_redacted_together(tmp_path: Path) -> None:
    row = {"tokens": ["call", "+84", "912", "345", "678", "now"], "tags": ["O", *["B-p"] * 4, "O"]}
    (made,) = both(tmp_path, row, redact=["phone"])
    assert made == {"tokens": ["call", "[PHONE_1]", "now"], "tags": ["O", "B-p", "O"]}


def test_a_form_that_cannot_say_it_is_refused_with_what_to_do(tmp_path: Path) -> None:
    row = {"instruction": "mail", "response": "b", "context": f"c{Z}"}
    with pytest.raises(DataError, match="luthier convert"):
        both(tmp_path, row, {**row, "context": "c"})
    assert not (tmp_path / "b.jsonl").exists() and not changes_path(tmp_path / "b.jsonl").exists()


def test_columns_of_another_name_become_ours(tmp_path: Path) -> None:
    rows = [{"ask": f"a{Z}", "say": "b", "k": 1}, {"ask": "c", "say": "d", "k": 2}]
    columns = {"prompt": "ask", "completion": "say"}
    made = both(tmp_path, *rows, strip=True, columns=columns)
    assert made == [
        {"k": 1, "prompt": "a", "completion": "b"}, {"k": 2, "prompt": "c", "completion": "d"}
    ]  # fmt: skip


def test_what_a_table_cannot_hold_is_refused_with_its_row(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    rows = [{"text": "a", "label": "b", "more": {"x": 1}}, {"text": f"c{Z}", "label": "d"}]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match=r"a.jsonl:1: \[convert.container\]"):
        luthier.clean(source, tmp_path / "b.csv", strip=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
