"""Tests of prompts with and without a reply."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.data.prompts import load_inputs, load_prompts
from luthier.data.rows import load_rows
from luthier.data.rules import PROMPT_RULES as RULES
from luthier.data.shapes.conversations import PromptCompletion, PromptOnly
from luthier.data.shapes.texts import RawText, TaggedWords
from luthier.errors import DataError
from luthier.types import Message

USER, REPLY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "p.jsonl"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompts_are_a_shape_of_rows(path: Path) -> None:
    write(path, {"prompt": "a", "expected": "b", "topic": "x"}, {"prompt": " c"})
    prompts = load_prompts(path)
    assert [row.members for row in prompts] == [
        {"prompt": "a", "expected": "b", "topic": "x"}, {"prompt": " c"}
    ]  # fmt: skip
    assert load_rows(path) == [replace(row, members=None) for row in prompts] == [
        PromptOnly(str(path), 1, prompt="a", expected="b"),
        PromptOnly(str(path), 2, prompt=" c"),
    ]  # fmt: skip


def test_completion_of_prompt_row_becomes_expected_reply(path: Path) -> None:
    write(
        path, {"prompt": "a", "completion": "b"}, {"prompt": "c"}, {"prompt": "d", "response": "e"}
    )
    assert [(type(r), r.prompt, r.expected) for r in load_prompts(path)] == [
        (PromptOnly, "a", "b"), (PromptOnly, "c", None), (PromptOnly, "d", None),
    ]  # fmt: skip
    write(path, {"prompt": "a", "completion": "b", "expected": "x"})
    assert load_prompts(path)[0].expected == "x"


def test_the_last_assistant_turn_is_left_out(path: Path) -> None:
    write(
        path,
        {"messages": [SYSTEM, USER, REPLY]},
        {"messages": [USER, REPLY, USER]},
        {"messages": [USER], "expected": "x"},
    )
    user, reply, system = (
        Message("user", "Why?"),
        Message("assistant", "So."),
        Message("system", "Be kind."),
    )
    rows = load_prompts(path)
    assert [row.messages for row in rows] == [(system, user), (user, reply, user), (user,)]
    assert [row.expected for row in rows] == ["So.", None, "x"]


def test_each_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("first\u2028still first\n\n  second \r\n", encoding="utf-8")
    assert [(r.line, r.prompt) for r in load_prompts(path)] == [
        (1, "first\u2028still first"), (3, "second"),
    ]  # fmt: skip
    path.write_text("\n \n")
    with pytest.raises(DataError) as refused:
        load_prompts(path)
    assert refused.value.rule == "file.empty"


def test_a_prompt_as_messages() -> None:
    assert PromptOnly("f", 1, prompt="a").turns() == (Message("user", "a"),)


@pytest.mark.parametrize(
    ("rule", "rows", "line"),
    [
        ("prompt.shape", [{"text": "a"}], 1),
        ("prompt.shape", [{"question": "a"}], 1),
        ("prompt.mixed", [{"prompt": "a"}, {"messages": [USER]}], 2),
        ("prompt.unasked", [{"messages": [SYSTEM]}], 1),
        ("message.order", [{"messages": [USER, USER]}], 1),
        ("field.empty", [{"prompt": "a"}, {"prompt": " "}], 2),
        ("field.type", [{"prompt": "a", "expected": 4}], 1),
        ("field.type", [{"prompt": 4}], 1),
        ("id.duplicate", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], 2),
    ],
)
def test_rows_without_usable_prompt_are_refused(
    path: Path, rule: str, rows: list[Any], line: int
) -> None:
    with pytest.raises(DataError) as caught:
        load_prompts(write(path, *rows))
    found = [problem for problem in caught.value.problems if problem.rule == rule]
    assert [problem.line for problem in found] == [line], caught.value
    assert rule in RULES or not rule.startswith("prompt.")


def test_load_inputs_reads_rows_of_any_kind(path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "label": None, "prompt": "b", "id": 1},
        {"text": " ", "prompt": "b", "completion": "", "id": 1},
        {"tokens": ["Rita", "sings"], "tags": ["X"]},
    ]
    file = str(write(path, *rows))
    assert load_inputs(path) == [
        (rows[0], RawText(file, 1, "a")),
        (rows[1], PromptCompletion(file, 2, "b", "")),
        (rows[2], TaggedWords(file, 3, ("Rita", "sings"), None)),
    ]
    row = {"text": 1, "question": "q"}
    write(path, row)
    assert load_inputs(path, {"text": "question"}) == [(row, RawText(file, 1, "q"))]
    write(path, row, {"text": "own"})
    with pytest.raises(DataError) as refused:
        load_inputs(path, {"text": "question"})
    assert refused.value.rule == "column.missing"
    table = path.with_suffix(".csv")
    table.write_text("label,text\nx,one\n")
    assert load_inputs(table) == [({"label": "x", "text": "one"}, RawText(str(table), 2, "one"))]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"question": "q", "n": 1}, "field.missing"),
        ({"a": "q", "b": "r"}, "field.missing"),
        ({"text": 5}, "field.type"),
        ({"text": " "}, "field.empty"),
        ({"prompt": " ", "completion": "x"}, "field.empty"),
        ({"tokens": []}, "tags.type"),
        ({"text": "a", "predicted": None}, "row.predicted"),
    ],
)
def test_rows_without_input_are_refused(path: Path, row: dict[str, Any], rule: str) -> None:
    with pytest.raises(DataError) as refused:
        load_inputs(write(path, {"text": "fine"}, row), reserved="predicted")
    (problem,) = refused.value.problems
    assert (problem.line, problem.rule) == (2, rule)


def test_advice_for_a_missing_text_names_no_label(path: Path) -> None:
    with pytest.raises(DataError) as refused:
        load_inputs(write(path, {"message": "fine", "topic": "b"}))
    assert refused.value.problems[0].advice == "Set `data.columns.text=message`."
