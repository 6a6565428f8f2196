"""Tests of row checks, and properties that hold for any file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from written_rows import CHAT, PAIR, TEXT, chat, problems_of, row_of, write

from luthier.data.rows import RowReader, load_documents, load_rows
from luthier.data.rules import RULES
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.shapes.texts import RawText
from luthier.errors import DataError
from luthier.media.image_grid import encode_png
from luthier.types import Message, Row

LABELLED = {**TEXT, "label": "a"}
PROPERTY = settings(max_examples=150, deadline=None, database=None)
AWKWARD = [
    "\u2028",
    "\u2029",
    "\x85",
    "\r",
    "\r\n",
    "\n",
    "\t",
    "\\",
    '"',
    "\\ud800",
    "\ufeff",
    "\0",
]


# --- what is accepted ----------------------------------------------------------------------------


def test_three_shapes(folder: Path) -> None:
    path = write(folder, PAIR)
    assert load_rows(path) == [PromptCompletion(str(path), 1, prompt="2+2", completion="4")]
    path = write(folder, chat("system: be kind", "user: hi", "assistant: hello"), CHAT)
    hi = (Message("user", "hi"), Message("assistant", "hello"))
    assert load_rows(path) == [
        Conversation(str(path), 1, messages=(Message("system", "be kind"), *hi)),
        Conversation(str(path), 2, messages=hi),
    ]
    path = write(folder, TEXT)
    assert load_rows(path) == [RawText(str(path), 1, text="once")]


def test_plain_text_file_is_a_single_row(folder: Path) -> None:
    path = folder / "book.md"
    path.write_bytes(b" a\r\nb \n")
    assert load_rows(path) == [RawText(str(path), 1, text=" a\r\nb \n")]


def test_extra_keys_and_duplicate_ids_are_ignored(folder: Path) -> None:
    ids = [1, "1", True, True, 1.0, 1.0, None, None, ["x"], ["x"], "2"]
    path = write(folder, *({**PAIR, "id": i, "score": 0.5, "tags": ["a"]} for i in ids))
    assert [row.line for row in load_rows(path)] == list(range(1, 12))


def test_blank_lines_do_not_shift_the_numbers(folder: Path) -> None:
    path = write(folder, b"", PAIR, b" \r", PAIR, b"")
    assert [row.line for row in load_rows(path)] == [2, 4]


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ({"text": "x", "label": "a"}, {"text": "x", "label": "a"}),
        ({"text": "x", "label": 3}, {"text": "x", "label": "3"}),
        ({"text": "x", "label": ["b", "a"]}, {"text": "x", "label": ("b", "a")}),
        ({"text": "x", "label": []}, {"text": "x", "label": ()}),
        ({"text": "x", "rating": 4}, {"text": "x", "rating": 4.0}),
        (
            {"tokens": ["a", "b"], "tags": ["O", "B-x"]},
            {"tokens": ("a", "b"), "tags": ("O", "B-x")},
        ),
        ({"prompt": "p", "completion": "c", "label": "a"}, {"prompt": "p", "completion": "c"}),
        ({"text": "x", "tags": ["news"]}, {"text": "x"}),
    ],
)
def test_annotated_rows(folder: Path, record: dict[str, Any], fields: dict[str, Any]) -> None:
    (row,) = load_rows(write(folder, record))
    assert row == row_of(row.file, 1, **fields)


# --- several problems at once --------------------------------------------------------------------


def test_all_problems_of_a_row_are_reported(folder: Path) -> None:
    bad = chat("user: ", "robot: x", "assistant: ")
    found = problems_of(
        write(folder, bad, {"messages": [1, {"content": 2}]}, chat("user: a", "user: b"))
    )
    assert [(p.line, p.rule) for p in found] == [
        (1, "field.empty"),
        (1, "message.role"),
        (1, "field.empty"),
        (2, "messages.type"),
        (2, "field.missing"),
        (2, "field.type"),
        (3, "message.order"),
        (3, "message.last"),
    ]
    found = problems_of(write(folder, {"prompt": 1, "completion": ""}))
    assert [p.rule for p in found] == ["field.type", "field.empty"]


def test_parsing_and_row_problems_are_in_line_order(folder: Path) -> None:
    found = problems_of(write(folder, {"text": ""}, b"{", PAIR, {"text": 1}, b"\xff"))
    assert [(p.line, p.rule) for p in found] == [
        (1, "field.empty"),
        (2, "json.invalid"),
        (3, "row.mixed_shapes"),
        (4, "field.type"),
        (5, "encoding.utf8"),
    ]


def test_equal_problems_are_printed_with_shared_cause(folder: Path) -> None:
    path = write(folder, *[PAIR, {"prompt": "a", "completion": ""}] * 25)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert [p.line for p in caught.value.problems] == list(range(2, 51, 2))
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        f'  {path}:2: [field.empty] "completion" is empty: there would be nothing to learn.'
        ' Fix: Write the text of "completion", or remove the row. (also lines 4, 6, 8 and 21 more)'
    ]


# --- for any file --------------------------------------------------------------------------------

texts = st.lists(
    st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(AWKWARD),
    min_size=1,
    max_size=4,
).map("".join)
filled = texts.filter(lambda text: text.strip() != "")
pair_records = st.fixed_dictionaries({"prompt": filled, "completion": filled})
text_records = st.fixed_dictionaries({"text": filled})


@st.composite
def chat_records(draw: st.DrawFn) -> dict[str, object]:
    system = draw(st.booleans())
    rounds = draw(st.integers(1, 3))
    roles = ["system"] * system + ["user", "assistant"] * rounds
    return {"messages": [{"role": role, "content": draw(filled)} for role in roles]}


files = st.one_of(
    *(
        st.lists(kind, min_size=1, max_size=5)
        for kind in (pair_records, chat_records(), text_records)
    )
)


def as_record(row: Row) -> dict[str, object]:
    if isinstance(row, Conversation):
        return {"messages": [{"role": m.role, "content": m.content} for m in row.messages]}
    if isinstance(row, RawText):
        return {"text": row.text}
    assert isinstance(row, PromptCompletion)
    return {"prompt": row.prompt, "completion": row.completion}


@PROPERTY
@given(files, st.booleans(), st.sampled_from([b"\n", b"\r\n", b"\n\n"]), st.booleans())
@example([{"text": "".join(AWKWARD) + "\x1c\x1e"}], False, b"\n", False)
def test_valid_rows_come_back_identical(
    folder: Path, records: list[dict[str, object]], ascii_only: bool, end: bytes, mark: bool
) -> None:
    lines = [json.dumps(record, ensure_ascii=ascii_only).encode() for record in records]
    path = folder / "valid.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + end.join(lines))
    loaded = load_rows(path)
    assert [as_record(row) for row in loaded] == records
    assert [row.line for row in loaded] == [n * end.count(b"\n") + 1 for n in range(len(records))]


tokens = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b'"',
        b"\n",
        b"\r",
        b"\\u",
        b"d800",
        b"1e999",
        b"NaN",
        b"null",
    ]
    + [b'"prompt"', b'"completion"', b'"messages"', b'"role"', b'"user"', b'"content"', b'"text"']
    + [
        b'{"text":"a"}\n',
        b'{"messages":[{"role":"user","content":"a"}]}\n',
        b"\xff",
        b"\0",
        b"\xef\xbb\xbf",
    ]
)
junk = st.binary(max_size=200) | st.lists(tokens | st.binary(max_size=2), max_size=30).map(b"".join)


@settings(PROPERTY, max_examples=400)
@given(junk, st.sampled_from(["junk.jsonl", "junk.txt", "junk.bin"]))
def test_arbitrary_bytes_give_rows_or_a_data_error(folder: Path, data: bytes, name: str) -> None:
    path = folder / name
    path.write_bytes(data)
    try:
        loaded = load_rows(path)
    except DataError as error:
        assert len(error.problems) > 0
        for problem in error.problems:
            assert problem.rule in RULES
            assert 0 <= problem.line <= data.count(b"\n") + 1
            assert len(str(problem).encode().splitlines()) == 1
    else:
        assert len(loaded) > 0


CORRUPTIONS: list[Callable[[bytes], bytes]] = [
    lambda line: line[:-1],
    lambda line: line + b"}",
    lambda line: b"\xff" + line,
    lambda line: b"[[" + line + b"]]",
    lambda line: line[:-1] + b',"x":NaN}',
    lambda line: line[:-1] + b',"x":1,"x":2}',
    lambda line: line[:-1] + b',"x":"\\udc00"}',
    lambda line: line[:-1] + b',"x":' + b"[" * 10_000,
    lambda line: b"{}",
    lambda line: b"nonsense",
]


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[list[bytes], list[int]]:
    """Draw the lines of a file with some damaged lines, and the 0-based indices of these lines."""
    lines = [json.dumps(record).encode() for record in draw(files)]
    spoiled = draw(st.sets(st.sampled_from(range(len(lines))), min_size=1))
    for index in spoiled:
        lines[index] = draw(st.sampled_from(CORRUPTIONS))(lines[index])
    return lines, sorted(spoiled)


@PROPERTY
@given(damaged_files(), st.sampled_from([b"\n", b"\n\n"]))
def test_exactly_the_corrupted_lines_are_reported(
    folder: Path, plan: tuple[list[bytes], list[int]], end: bytes
) -> None:
    lines, spoiled = plan
    path = folder / "damaged.jsonl"
    path.write_bytes(end.join(lines))
    assert [p.line for p in problems_of(path)] == [n * len(end) + 1 for n in spoiled]


def test_ignored_columns_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "Hello there", "sentiment": "good"}) + "\n")
    reader = RowReader(path)
    assert len(list(reader)) == 1 and reader.recognition.unread == ("sentiment",)


def test_all_documents_without_text_are_reported(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("the fox")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert load_documents([tmp_path / "good.txt", rows]) == ["the fox", "a", "b"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("the dog")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "empty.md").write_text("")
    image = tmp_path / "image.png"
    image.write_bytes(encode_png(np.zeros((4, 4, 3), dtype=np.uint8)))
    with pytest.raises(DataError) as refused:
        load_documents([tmp_path / "good.txt", folder, tmp_path / "empty.md", image])
    said = {Path(each.file).name: each for each in refused.value.problems}
    assert set(said) == {"binary.txt", "empty.md", "image.png"}
    for each in said.values():
        assert "Documents are plain text" in each.advice and "images" not in each.advice
    with pytest.raises(DataError) as refused:
        load_documents([tmp_path / "none.txt"])
    assert refused.value.rule == "file.missing"


def test_boolean_labels(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": true}\n{"label": [false, true], "text": "b"}\n')
    assert [row.record()["label"] for row in load_rows(path)] == ["true", ["false", "true"]]


@pytest.mark.parametrize("rows", [[TEXT, LABELLED], [LABELLED, TEXT]])
def test_row_without_a_key_of_the_other_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The message names the key, in the row or in the first row."""
    (problem,) = problems_of(write(folder, *rows))
    (absent,) = rows[0].keys() ^ rows[1].keys()
    assert (problem.rule, problem.line) == ("row.mixed_shapes", 2)
    assert f'"{absent}" is missing' in problem.message and f'Add "{absent}"' in problem.advice
    assert ("the first row" in problem.advice) == (absent in rows[1])


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"query": "a", "passage": "b", "relevance": 1}, "`data.columns.document=passage`"),
        ({"query": "a", "passage": "b", "label": 1}, "`data.columns.document=passage`"),
        ({"query": "a", "positives": ["b", "c"]}, '{"query", "positive"}'),
        ({"hypothesis": "a", "label": "x"}, '"premise"'),
        ({"image_path": "a.jpg", "label": "x"}, "`data.columns.image=image_path`"),
        ({"prompt": "a", "completion": None, "response": "b"}, '"completion"'),
        ({"Instruction": "a", "response": "b"}, "`data.columns.completion=response`"),
        ({"en": "a", "vi": "b"}, "`data.columns.completion=vi`"),
        (
            {"Id": "7", "erster Satz": "a b", "zweiter Satz": "b a", "gleich": "no"},
            "`data.columns.text_b=zweiter Satz`, `data.columns.label=gleich`",
        ),
        ({"review": "a", "sentiment": "b"}, "`data.columns.label=sentiment`"),
        ({"document": "a", "minutes": "b"}, "`data.columns.prompt=document`"),
    ],
)
def test_advice_for_unknown_keys(folder: Path, row: dict[str, Any], advice: str) -> None:
    problems = problems_of(write(folder, row))
    assert advice in problems[0].advice and len(problems) == 1
