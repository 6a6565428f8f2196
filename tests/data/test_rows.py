"""Records to rows: each rule by example, and the promises that hold for any file."""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luthier.data import (
    checker,
    containers,
    content,
    documents,
    labels,
    parsing,
    read,
    rows,
    s3,
    sources,
    tables,
)
from luthier.data.rows import RULES, load_rows
from luthier.errors import DataError, Problem
from luthier.types import Message, Row

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def write(folder: Path, *records: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"".join(as_line(record) + b"\n" for record in records))
    return path


def as_line(record: object) -> bytes:
    return record if isinstance(record, bytes) else json.dumps(record).encode()


def problems_of(path: Path) -> list[Problem]:
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert all(p.file == str(path) and p.message and p.fix for p in caught.value.problems)
    str(caught.value).encode()
    return list(caught.value.problems)


def chat(*turns: str, **extra: object) -> dict[str, object]:
    """``chat("user: hi", ...)`` as a record."""
    pairs = [turn.split(": ", 1) for turn in turns]
    return {"messages": [{"role": role, "content": text} for role, text in pairs], **extra}


PAIR = {"prompt": "2+2", "completion": "4"}
CHAT = chat("user: hi", "assistant: hello")
TEXT = {"text": "once"}
USER = {"role": "user", "content": "a"}

# --- what is accepted ----------------------------------------------------------------------------


def test_three_shapes(folder: Path) -> None:
    path = write(folder, PAIR)
    assert load_rows(path) == [Row(str(path), 1, prompt="2+2", completion="4")]
    path = write(folder, chat("system: be kind", "user: hi", "assistant: hello"), CHAT)
    hi = (Message("user", "hi"), Message("assistant", "hello"))
    assert load_rows(path) == [
        Row(str(path), 1, messages=(Message("system", "be kind"), *hi)),
        Row(str(path), 2, messages=hi),
    ]
    path = write(folder, TEXT)
    assert load_rows(path) == [Row(str(path), 1, text="once")]


def test_plain_text_file_is_one_row(folder: Path) -> None:
    path = folder / "book.md"
    path.write_bytes(b" a\r\nb \n")
    assert load_rows(path) == [Row(str(path), 1, text=" a\r\nb \n")]


def test_extra_keys_are_ignored_and_ids_kept_apart_by_type(folder: Path) -> None:
    ids = [1, "1", True, True, 1.0, 1.0, None, None, ["x"], ["x"], "2"]
    path = write(folder, *({**PAIR, "id": i, "score": 0.5, "tags": ["a"]} for i in ids))
    assert [row.line for row in load_rows(path)] == list(range(1, 12))


def test_blank_lines_do_not_shift_the_numbers(folder: Path) -> None:
    path = write(folder, b"", PAIR, b" \r", PAIR, b"")
    assert [row.line for row in load_rows(path)] == [2, 4]


# --- each rule by example ------------------------------------------------------------------------

EXAMPLES: list[tuple[str, list[object], int, str, str]] = [
    # rule, rows, line, part of the message, part of the fix
    ("row.unknown_shape", [{"title": "x", "n": 1}], 1, '"title", "n"', '{"messages"}'),
    ("row.unknown_shape", [{}], 1, "no keys", '{"text"}'),
    (
        "row.unknown_shape",
        [{"Question": "a", "answer": "b"}],
        1,
        '{"prompt", "completion"}, {"messages"}, {"text"}',
        'Rename "Question" to "prompt" and rename "answer" to "completion". Or say which column',
    ),
    (
        "row.unknown_shape",
        [{"instruction": "a", "input": "b", "result": "c"}],
        1,
        '"instruction", "input", "result"',
        'Join "instruction", "input" into "prompt" and add "completion".',
    ),
    ("row.unknown_shape", [{"input": "b", "target": "c"}], 1, '"input", "target"', "--map"),
    ("row.unknown_shape", [{"question": "b"}], 1, '"question"', "--map prompt=COLUMN"),
    (
        "row.ambiguous",
        [{"instruction": "a", "input": "b", "output": "c", "text": "all of it"}],
        1,
        'as Alpaca or as "text"',
        "--map text=",
    ),
    (
        "row.ambiguous",
        [{"question": "a", "answer": "b", "response": "c"}],
        1,
        "as question and answer or as question and response",
        "--map text=",
    ),
    (
        "row.mixed_shapes",
        [{"question": "a", "answer": "b"}, {"instruction": "a", "output": "b"}],
        2,
        "The row is Alpaca, but the first row (line 1) is question and answer",
        "as question and answer",
    ),
    ("field.empty", [{"instruction": "a", "output": ""}], 1, '"output" is empty', '"output"'),
    (
        "field.missing",
        [{"instruction": "a", "output": "b"}, {"instruction": "a"}],
        2,
        '"output" is missing',
        'Add "output"',
    ),
    (
        "message.part",
        [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}],
        1,
        'Message 1: a part of the content is "image_url"',
        "Keep the parts",
    ),
    (
        "message.weight",
        [{"messages": [USER, {"role": "assistant", "content": "b", "weight": 0}]}],
        1,
        "Every turn of the assistant has the weight 0",
        "Remove the weight",
    ),
    ("row.unknown_shape", [{"Text": "x"}], 1, '"Text"', 'Rename "Text" to "text".'),
    ("row.unknown_shape", [{f"k{n}": 1 for n in range(12)}], 1, '"k9" and 2 more', "shapes"),
    ("row.ambiguous", [PAIR | CHAT], 1, '"prompt", "completion", "messages"', "one shape"),
    ("row.ambiguous", [PAIR | CHAT | TEXT], 1, "mixes 3 shapes", "one shape"),
    ("row.ambiguous", [{"completion": "a", "text": "b"}], 1, '"completion", "text"', "one shape"),
    (
        "row.mixed_shapes",
        [b"", PAIR, PAIR, CHAT],
        4,
        'is {"messages"}, but the first row (line 2) is {"prompt", "completion"}',
        "own shape",
    ),
    ("row.mixed_shapes", [CHAT, TEXT], 2, 'is {"text"}', 'as {"messages"}'),
    ("field.missing", [PAIR, {"prompt": "a"}], 2, '"completion" is missing', 'Add "completion"'),
    (
        "field.type",
        [{"prompt": "a", "expected": 4}],
        1,
        '"expected" must be a string',
        "one string",
    ),
    (
        "row.mixed_shapes",
        [{"prompt": "a"}, PAIR],
        2,
        'is {"prompt", "completion"}, but the first row (line 1) is {"prompt"}',
        "of its own shape",
    ),
    ("field.missing", [{"completion": "a"}], 1, '"prompt" is missing', 'Add "prompt"'),
    (
        "field.missing",
        [{"prompt": "a", "response": "b"}],
        1,
        'the keys are "prompt", "response"',
        'Rename "response" to "completion".',
    ),
    (
        "field.missing",
        [{"messages": [{"role": "user"}]}],
        1,
        '"content" of message 1 is missing',
        'Add "content"',
    ),
    (
        "field.missing",
        [{"messages": [USER, {"from": "gpt", "content": "b"}]}],
        1,
        '"role" of message 2 is missing',
        'Rename "from" to "role".',
    ),
    (
        "field.type",
        [{"prompt": 7, "completion": "a"}],
        1,
        '"prompt" must be a string, but is a number',
        "double quotes",
    ),
    ("field.type", [{"prompt": "a", "completion": None}], 1, "but is null", '"completion"'),
    ("field.type", [{"text": True}], 1, "but is true or false", '"text"'),
    ("field.type", [{"text": {}}], 1, "but is an object", '"text"'),
    (
        "field.type",
        [{"messages": [{"role": "user", "content": ["a"]}]}],
        1,
        '"content" of message 1 must be a string, but is an array',
        "message 1",
    ),
    ("field.type", [{"messages": [{"role": 1, "content": "a"}]}], 1, '"role" of message 1', "role"),
    ("field.empty", [{"prompt": "", "completion": "a"}], 1, '"prompt" is empty.', "remove the row"),
    (
        "field.empty",
        [{"prompt": "a", "completion": " \n\u2028"}],
        1,
        '"completion" holds only white space: there would be nothing to learn.',
        "remove the row",
    ),
    ("field.empty", [{"text": ""}], 1, '"text" is empty: there would be nothing', '"text"'),
    ("field.empty", [chat("user: ", "assistant: a")], 1, '"content" of message 1 is empty.', "1"),
    (
        "field.empty",
        [chat("user: a", "assistant: ")],
        1,
        '"content" of message 2 is empty: there would be nothing to learn.',
        "message 2",
    ),
    (
        "field.empty",
        [{"messages": [{"role": "", "content": "a"}]}],
        1,
        '"role" of message 1',
        "role",
    ),
    (
        "id.duplicate",
        [PAIR | {"id": "a"}, PAIR, PAIR | {"id": "a"}],
        3,
        '"a" was already used on line 1',
        "own id",
    ),
    ("id.duplicate", [PAIR | {"id": 7}, PAIR | {"id": 7}], 2, "line 1", "own id"),
    ("messages.type", [{"messages": "hi"}], 1, "but is a string", '"messages": ['),
    ("messages.type", [{"messages": {"role": "user"}}], 1, "but is an object", '"messages": ['),
    (
        "messages.type",
        [{"messages": ["hi"]}],
        1,
        "Message 1 must be an object, but is a string",
        "role",
    ),
    ("messages.empty", [{"messages": []}], 1, "empty array", "at least one user"),
    (
        "message.role",
        [chat("user: a", "bot: b")],
        1,
        'role "bot"; allowed are system, user and assistant',
        'to "assistant"',
    ),
    (
        "message.role",
        [chat("Human: a", "assistant: b")],
        1,
        "Message 1",
        'Change the role "Human" to "user".',
    ),
    ("message.role", [chat("narrator: a")], 1, '"narrator"', "one of system, user and assistant"),
    (
        "message.role",
        [chat("user: a", "assistant: b", "tool: c", "assistant: d")],
        1,
        'Message 3 has the role "tool"; tool messages cannot be learned yet; allowed are',
        "user message",
    ),
    (
        "message.tool_calls",
        [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}],
        1,
        "Message 2 calls a tool",
        "as text",
    ),
    (
        "message.tool_calls",
        [
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": "b", "function_call": {"name": "f"}},
                ]
            }
        ],
        1,
        "Message 2 calls a tool",
        "remove the row",
    ),
    (
        "message.order",
        [chat("user: a", "user: b", "assistant: c")],
        1,
        "Messages 1 and 2 both have the role user",
        "Join the two",
    ),
    (
        "message.order",
        [chat("system: s", "user: a", "assistant: b", "assistant: c")],
        1,
        "Messages 3 and 4 both",
        "Join",
    ),
    (
        "message.order",
        [chat("assistant: b")],
        1,
        "Message 1 has the role assistant",
        "Add the user message",
    ),
    (
        "message.order",
        [chat("system: s", "assistant: b")],
        1,
        "Message 2 has the role assistant",
        "before message 2",
    ),
    (
        "message.order",
        [chat("user: a", "system: s", "assistant: b")],
        1,
        "Message 2 has the role system, which may only come first",
        "Join",
    ),
    (
        "message.order",
        [chat("system: s", "system: t", "user: a", "assistant: b")],
        1,
        "Message 2",
        "Join",
    ),
    ("message.last", [chat("user: a")], 1, "(message 1) has the role user", "remove the row"),
    (
        "message.last",
        [chat("user: a", "assistant: b", "user: c")],
        1,
        "nothing to learn after it",
        "remove message 3",
    ),
    ("message.last", [chat("system: a")], 1, "(message 1) has the role system", "remove the row"),
    # the rules of reading, through the same door
    (
        "line.too_long",
        [TEXT, b'{"text":"%s"}' % (b"x" * parsing.MAX_LINE_BYTES)],
        2,
        "16,777,216",
        "Split",
    ),
    ("encoding.utf8", [TEXT, b'{"text":"\xe9"}'], 2, "Byte 10", "UTF-8"),
    ("encoding.surrogate", [TEXT, b'{"text":"\\ud83d"}'], 2, "\\ud83d", "whole character"),
    ("json.invalid", [TEXT, b'{"text":"a",}'], 2, "column 13", "column"),
    ("json.not_object", [TEXT, [1]], 2, "an array", "object"),
    ("json.duplicate_key", [TEXT, b'{"text":"a","text":"b"}'], 2, '"text"', "Keep one"),
    ("json.not_finite", [TEXT, b'{"text":"a","score":NaN}'], 2, "NaN", "finite"),
    ("json.too_deep", [TEXT, b"[" * 100_000], 2, "nested", "Flatten"),
    ("file.empty", [], 0, "is empty", "Add rows"),
    ("file.binary", [b"\0"], 0, "binary data", ".jsonl"),
    ("label.type", [{"text": "x", "label": 1.5}], 1, "but is a number", '"label": "name"'),
    ("label.type", [{"text": "x", "label": True}], 1, "true or false", '"label": "name"'),
    ("label.type", [{"text": "x", "label": " "}], 1, "but is empty", '"label": "name"'),
    ("label.type", [{"text": "x", "label": ["a", None]}], 1, "but is null", '["a", "b"]'),
    ("label.duplicate", [{"text": "x", "label": ["a", "a"]}], 1, '"a" is named twice', "Keep one"),
    ("rating.type", [{"text": "x", "rating": "4"}], 1, "but is a string", "without quotes"),
    ("rating.type", [{"text": "x", "rating": True}], 1, "true or false", "without quotes"),
    ("tags.type", [{"tokens": ["a"]}], 1, '"tags" must be', '"tags": ["B-person", "O"]'),
    ("tags.type", [{"tokens": "a b", "tags": ["O"]}], 1, "but is a string", '"tokens": ["Rita"'),
    ("tags.type", [{"tokens": ["a", ""], "tags": ["O", "O"]}], 1, "something else", "Rita"),
    ("tags.type", [{"tokens": [], "tags": []}], 1, "an empty one", "Rita"),
    ("tags.length", [{"tokens": ["a", "b"], "tags": ["O"]}], 1, "2 tokens and 1 tags", "one tag"),
    ("tags.bio", [{"tokens": ["a"], "tags": ["person"]}], 1, 'Tag 1 is "person"', "B-name"),
    ("field.missing", [{"label": "a"}], 1, '"text" is missing', '"text"'),
    (
        "row.ambiguous",
        [{"text": "x", "label": "a", "rating": 1}],
        1,
        '"label", "rating"',
        "one shape",
    ),
]
WHOLE_FILE = {
    *("file.missing", "file.directory", "file.unreadable", "file.unknown_format"),
    *("file.damaged", "file.extra"),  # test_containers.py
    *("file.no_match", "file.remote"),  # test_sources.py
    *("table.header", "table.cells", "table.invalid"),  # test_tables.py
    "column.missing",  # test_forms.py
}


@pytest.mark.parametrize(("rule", "records", "line", "said", "fix"), EXAMPLES)
def test_rule(
    folder: Path, rule: str, records: list[object], line: int, said: str, fix: str
) -> None:
    found = [p for p in problems_of(write(folder, *records)) if p.rule == rule]
    assert [(p.line, p.rule) for p in found] == [(line, rule)]
    assert said in found[0].message
    assert fix in found[0].fix


# Whole files that this module's examples cannot write as rows; their texts are in test_read.py.
def test_paths_that_cannot_be_read_are_data_errors(folder: Path) -> None:
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "table.bin").write_bytes(b"one,two\n")
    (folder / "empty").mkdir(exist_ok=True)
    names = {"no.jsonl": "missing", "empty": "directory", "loop.jsonl": "unreadable"}
    for name, rule in {**names, "table.bin": "unknown_format"}.items():
        found = [(p.line, p.rule) for p in problems_of(folder / name)]
        assert found == [(0, f"file.{rule}")]
        assert f"file.{rule}" in WHOLE_FILE


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
    assert row == Row(row.file, 1, **fields)


def test_every_rule_is_listed_used_and_shown_by_an_example() -> None:
    used = set()
    modules = (
        read,
        rows,
        labels,
        checker,
        containers,
        content,
        documents,
        parsing,
        s3,
        sources,
        tables,
    )
    for module in modules:
        assert module.__file__ is not None
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "RULES":
                continue
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            used |= {t for t in texts if isinstance(t, str) and re.fullmatch(r"[a-z]+\.\w+", t)}
    assert used == set(RULES)
    assert {rule for rule, *_ in EXAMPLES} | WHOLE_FILE == set(RULES)
    assert all(text.endswith(".") and "\n" not in text for text in RULES.values())


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


def test_problems_of_reading_and_of_rows_come_in_line_order(folder: Path) -> None:
    found = problems_of(write(folder, {"text": ""}, b"{", PAIR, {"text": 1}, b"\xff"))
    assert [(p.line, p.rule) for p in found] == [
        (1, "field.empty"),
        (2, "json.invalid"),
        (3, "row.mixed_shapes"),
        (4, "field.type"),
        (5, "encoding.utf8"),
    ]


def test_twenty_five_bad_rows_are_counted_and_twenty_listed(folder: Path) -> None:
    path = write(folder, *[PAIR, {"prompt": "a", "completion": ""}] * 25)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert [p.line for p in caught.value.problems] == list(range(2, 51, 2))
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert lines[0] == "25 problems in the data; nothing was trained."
    assert len(lines) == 22
    assert lines[1] == (
        f'  {path}:2: [field.empty] "completion" is empty: there would be nothing to learn.'
        ' Fix: Write the text of "completion", or remove the row.'
    )
    assert lines[20].startswith(f"  {path}:40: [field.empty]")
    assert lines[21] == "  … and 5 more."


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
    if row.messages is not None:
        return {"messages": [{"role": m.role, "content": m.content} for m in row.messages]}
    if row.text is not None:
        return {"text": row.text}
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
    """The lines of a valid file with some spoiled, and the 0-based indices of those."""
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


# --- speed ---------------------------------------------------------------------------------------


def test_ten_thousand_rows_are_quick(folder: Path) -> None:
    words = "the quick brown fox jumps over the lazy dog " * 5
    path = write(
        folder, *({"id": n, "prompt": f"{n} {words}", "completion": words} for n in range(10_000))
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(load_rows(path)) == 10_000
        times.append(time.perf_counter() - start)
    # Several times what it takes on an idle machine, so that only a real slip fails here.
    assert min(times) < 0.5
