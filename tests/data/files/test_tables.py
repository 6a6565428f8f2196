"""Tests of tables: cell types by column, problems with the row's line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.files import parsing
from luthier.data.files.containers import container_of
from luthier.data.files.read import read_records
from luthier.data.rows import load_rows
from luthier.data.rules import RULES
from luthier.data.shapes.conversations import Conversation
from luthier.errors import DataError, Problem
from luthier.gate.scan import inspect_sources
from luthier.types import Message

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

Records = list[tuple[int, dict[str, object]]]


def read(path: Path) -> tuple[Records, list[Problem]]:
    problems: list[Problem] = []
    return list(read_records(path, problems)), problems


def read_csv(folder: Path, data: bytes, name: str = "a.csv") -> tuple[Records, list[Problem]]:
    path = folder / name
    path.write_bytes(data)
    return read(path)


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_cells_are_text_with_the_line_they_begin_on(tmp_path: Path) -> None:
    data = (
        b'\xef\xbb\xbf prompt ,completion\r\n"a, ""b""\r\nc",7\r\n\r\n'
        b"x\xe2\x80\xa8y,NaN\r\n last,\x85".replace(b"\x85", "\x85".encode())
    )
    assert read_csv(tmp_path, data) == (
        [
            (2, {"prompt": 'a, "b"\r\nc', "completion": "7"}),
            (5, {"prompt": "x\u2028y", "completion": "NaN"}),
            (6, {"prompt": " last", "completion": "\x85"}),
        ],
        [],
    )


cells = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"])
    | st.sampled_from('\r\n\t,;"\u2028\x85\ufeff'),
    max_size=6,
)


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=5),
    st.sampled_from([(",", "a.csv"), ("\t", "a.tsv"), (";", "a.csv")]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_any_cells_come_back_identical(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    kind: tuple[str, str],
    end: str,
) -> None:
    delimiter, name = kind
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("one", "two"), *rows])
    records, problems = read_csv(tmp_path_factory.getbasetemp(), text.getvalue().encode(), name)
    assert problems == []
    assert [(record["one"], record["two"]) for _, record in records] == rows


@pytest.mark.parametrize(
    ("header", "cells", "record"),
    [
        ("text,label", "x,3", {"text": "x", "label": "3"}),
        ("text,label", "x,true", {"text": "x", "label": "true"}),
        ("text,rating", "x,3.5", {"text": "x", "rating": 3.5}),
        ("text,rating", "x, -2e1 ", {"text": "x", "rating": -20.0}),
        ("text,rating", "x,good", {"text": "x", "rating": "good"}),
        ("text,rating", "x,nan", {"text": "x", "rating": "nan"}),
        ("text,rating", "x,", {"text": "x", "rating": ""}),
        ("text,rating", "x,1e999", {"text": "x", "rating": "1e999"}),
        ("id,prompt,expected", ",x,", {"prompt": "x"}),
        ("prompt,completion", "x,", {"prompt": "x", "completion": ""}),
        (
            "text,answers",
            "x,\"{'text': array(['a\\nb', 'c'], dtype=object), 'answer_start': array([1, 2],\n"
            '      dtype=int32)}"',
            {"text": "x", "answers": {"text": ["a\nb", "c"], "answer_start": [1, 2]}},
        ),
        (
            "messages",
            "\"[{'role': 'user', 'content': \"\"it's\"\"}]\"",
            {"messages": [{"role": "user", "content": "it's"}]},
        ),
        ("prompt,completion", '"[1]","{""a"": 1}"', {"prompt": "[1]", "completion": '{"a": 1}'}),
        ("tokens,tags", '"[""a""]","[""O""]"', {"tokens": ["a"], "tags": ["O"]}),
        ("messages,x", 'words,"[1]"', {"messages": "words", "x": "[1]"}),
    ],
)
def test_only_known_columns_are_parsed_beyond_text(
    tmp_path: Path, header: str, cells: str, record: dict[str, object]
) -> None:
    assert read_csv(tmp_path, f"{header}\n{cells}\n".encode()) == ([(2, record)], [])


def test_messages_in_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    cell = '[{"role": "user", "content": "a ""b"""}, {"role": "assistant", "content": "c\u2028"}]'
    path.write_text('messages\n"' + cell.replace('""', '\\"').replace('"', '""') + '"\n')
    assert load_rows(path) == [
        Conversation(
            str(path), 2, messages=(Message("user", 'a "b"'), Message("assistant", "c\u2028"))
        )
    ]


@pytest.mark.parametrize(
    ("data", "line", "rule"),
    [
        (b"a,b\n1,2\n1,2,3\n1,2\n", 3, "table.cells"),
        (b"a,b\n1,2\n1\n1,2\n", 3, "table.cells"),
        (b'a,b\n1,2\n"x"y,2\n1,2\n', 3, "table.invalid"),
        (b"a,b\n1,2\nx\rz,2\n1,2\n", 3, "table.invalid"),
        (b"a,b\n1,2\n\xff,2\n1,2\n", 3, "encoding.utf8"),
        (b'messages,b\n1,2\n"[{",2\n1,2\n', 3, "json.invalid"),
        (b'messages,b\n1,2\n"[NaN]",2\n1,2\n', 3, "json.not_finite"),
        (b'messages,b\n1,2\n"[""\\ud83d""]",2\n1,2\n', 3, "encoding.surrogate"),
    ],
)  # fmt: skip
def test_bad_table_row_between_good_rows(tmp_path: Path, data: bytes, line: int, rule: str) -> None:
    records, problems = read_csv(tmp_path, data)
    assert [number for number, _ in records] == [2, 4]
    assert [(p.line, p.rule) for p in problems] == [(line, rule)]
    assert rule in RULES


@pytest.mark.parametrize(
    ("data", "line", "rule"),
    [
        (b"a,a\n1,2\n", 1, "table.header"),
        (b"a,,\n1,2,3\n", 1, "table.header"),
        (b"%s,b\n1,2\n" % (b"x" * 300), 1, "table.header"),
        (b'a,"b\n1,2\n', 1, "table.invalid"),
        (b"a,b\r1,2\r3,4\r", 1, "table.invalid"),
        (b"a,b\n", 0, "file.empty"),
        (b"a,b\n\xff,2\n", 2, "encoding.utf8"),
        (b"", 0, "file.empty"),
        (b"\xef\xbb\xbf\n", 0, "file.empty"),
    ],
)
def test_invalid_table_is_refused(tmp_path: Path, data: bytes, line: int, rule: str) -> None:
    records, problems = read_csv(tmp_path, data)
    assert records == []
    assert [(p.line, p.rule) for p in problems] == [(line, rule)]


CARDS = [
    ("1", "I lost my card", "lost_card"),
    ("2", "My card has not arrived yet", "card_arrival"),
    ("3", "Where is my card?", "card_arrival"),
    ("4", "My card was stolen", "lost_card"),
]


@pytest.mark.parametrize("delimiter", ["\t", ",", ";"])
@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ((1, 2), ("text", "label")),
        ((2, 1), ("label", "text")),
        ((0, 1, 2), ("id", "text", "label")),
        ((1, 0), ("text", "rating")),
        ((1,), ("text",)),
    ],
)
@pytest.mark.parametrize("count", [2, 4, 40])
def test_table_without_header_names_the_missing_header(
    tmp_path: Path, delimiter: str, columns: Sequence[int], names: Sequence[str], count: int
) -> None:
    path = tmp_path / "rows.csv"
    rows = [[CARDS[at % 4][column] for column in columns] for at in range(count)]
    for number, row in enumerate(rows, 1):
        if 0 in columns:
            row[columns.index(0)] = str(number)
    written = "".join(delimiter.join(row) + "\n" for row in rows)
    path.write_text(written)
    problems: list[Problem] = []
    assert [*read_records(path, problems)] == []
    assert [(each.rule, each.line) for each in problems] == [("table.header", 1)]
    assert repr(f"{delimiter.join(names)}\n") in problems[0].advice
    path.write_text(delimiter.join(names) + "\n" + written)
    assert len([*read_records(path, [])]) == count


@pytest.mark.parametrize(
    "header",
    ["Satz,Klasse", "Utterance,Intent", "0,1", "How can we help you today?,Which department?"],
)
def test_header_of_unknown_names_is_no_row(tmp_path: Path, header: str) -> None:
    rows = "".join(f"{text},{label}\n" for _, text, label in CARDS * 5)
    records, problems = read_csv(tmp_path, f"{header}\n{rows}".encode())
    assert len(records) == 20
    assert problems == []


def test_mapped_column_names_a_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("Tell us in a few words,kind\nThe card is lost again,kind\nNo card,other\n")
    problems: list[Problem] = []
    assert [*read_records(path, problems)] == []
    assert [each.rule for each in problems] == ["table.header"]
    assert len([*read_records(path, [], columns={"label": "kind"})]) == 2


UNQUOTED = (
    b"text\tlabel\n"
    b'"great" movie, really\tpos\n'
    b'"It begins with a quote\tneg\n'
    b'plain "quoted" words\tpos\n'
    b'"whole"\tneg\n'
    b'and it ends with one"\tneg\n'
)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbfsep=\t\n", b"sep=|\n"])
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.csv.gz"])
def test_a_table_without_quoting_is_read_line_by_line(
    tmp_path: Path, end: bytes, start: bytes, name: str
) -> None:
    data = start + UNQUOTED.replace(b"\t", b"|" if b"|" in start else b"\t").replace(b"\n", end)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    records, problems = read(path)
    assert not problems and not container_of(path).quoted
    assert [each["text"] for _, each in records] == [
        '"great" movie, really', '"It begins with a quote', 'plain "quoted" words', '"whole"',
        'and it ends with one"',
    ]  # fmt: skip
    first = 3 if start.endswith(b"\n") else 2
    assert [line for line, _ in records] == [*range(first, first + 5)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("delimiter", [b"\t", b",", b";", b"|"])
@pytest.mark.parametrize(
    "cell",
    [
        b'"one\ntwo"',
        b'"""one""\ntwo"',
        b'"one\n\n"',
        b'"a ""b"" c"',
        b'"x\n""y"""',
        b'in "the" middle',
    ],
)
def test_quoted_cells_may_contain_line_breaks(
    tmp_path: Path, cell: bytes, delimiter: bytes, end: bytes
) -> None:
    lines = [b"text,other,label", cell + b",x,1", b"x," + cell + b",2", b"x,y," + cell]
    data = b"\n".join(lines).replace(b",", delimiter).replace(b"\n", end)
    path = tmp_path / "a.tsv"
    path.write_bytes(data)
    problems, warnings = list[Problem](), list[Problem]()
    records = [each for _, each in read_records(path, problems, warnings=warnings)]
    plain = cell[1:-1].replace(b'""', b'"') if cell.startswith(b'"') else cell
    text = plain.replace(b"\n", end).decode()
    assert problems == warnings == []
    assert [records[0]["text"], records[1]["other"], records[2]["label"]] == [text] * 3


def test_quoted_header_means_quoted_cells(tmp_path: Path) -> None:
    data = b'"text"\t"label"\n"a\tb\nc"\t"1"\n'
    assert read_csv(tmp_path, data, "a.tsv") == ([(2, {"text": "a\tb\nc", "label": "1"})], [])


def test_rows_joined_by_quotes_are_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\nx,1\n"a,1\nb,2\nc",1\ny,2\n"m\nn",1\n')
    problems, warnings = list[Problem](), list[Problem]()
    records = list(read_records(path, problems, warnings=warnings))
    assert [line for line, _ in records] == [2, 3, 6, 7] and not problems
    assert [(each.rule, each.line) for each in warnings] == [("table.joined", 3)]
    report = inspect_sources({"train": path}, [])
    assert {rule.id: report.findings.severity(rule) for rule in report.findings.rules()} == {
        "table.joined": "warning"
    }


@pytest.mark.parametrize(
    ("data", "lines", "bad"),
    [
        ('a,1\n"b,1\nc,2\nd" x,1\ne,2\n', [2, 4, 6], [3, 5]),
        ('a,1\n"b,1\nc,2\nd,1\n', [2, 4, 5], [3]),  # never closed
        ('"b,1\nc,2\n"d",1\n"e,1\nf,2\ng" x,1\n', [3, 4, 6], [2, 5, 7]),
        ('"b\nc\nd" x,1\ne,2\n', [5], [2]),  # one cell with line breaks
    ],
)
def test_rows_between_wrong_quotes(
    tmp_path: Path, data: str, lines: list[int], bad: list[int]
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + data)
    problems = list[Problem]()
    assert [line for line, _ in read_records(path, problems)] == lines
    assert [(each.rule, each.line) for each in problems] == [("table.invalid", n) for n in bad]


@pytest.mark.parametrize("first", [b"sep=;", b'"sep=;"', b"\xef\xbb\xbfsep=;\r"])
def test_excel_sep_line_sets_delimiter(tmp_path: Path, first: bytes) -> None:
    records = [(3, {"text": "x, y", "label": "1"})]
    for name in ("a.csv", "upload"):
        assert read_csv(tmp_path, first + b"\ntext;label\nx, y;1\n", name) == (records, [])
    _, problems = read_csv(tmp_path, first + b"\n")
    assert [each.rule for each in problems] == ["file.empty"]


def test_advised_command_converts_lone_carriage_returns(tmp_path: Path) -> None:
    _, problems = read_csv(tmp_path, b"a,b\n1,2\r3,4\n")
    assert (problems[0].line, problems[0].rule) == (2, "table.invalid")
    assert "universal-newline" not in problems[0].message
    command = problems[0].advice.split("LF: ")[1].split(";")[0]
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_bytes(b"a,b\r1,2\r3,4\r")
    subprocess.run(
        command.replace("OLD", str(old)).replace("NEW", str(new)), shell=True, check=True
    )
    records, problems = read_csv(tmp_path, new.read_bytes())
    assert [number for number, _ in records] == [2, 3] and not problems


def test_unclosed_quote_is_limited_to_line_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parsing, "MAX_LINE_BYTES", 1000)
    _, problems = read_csv(tmp_path, b'a,b\n1,2\n"x,2\n' + b"some words,2\n" * 1000)
    assert (problems[0].line, problems[0].rule) == (3, "table.invalid")
    assert "field limit" in problems[0].message
    _, problems = read_csv(tmp_path, b"a,b\n1,2\n" + b"x" * 200_000 + b",2\n3,4\n")
    assert [(p.line, p.rule) for p in problems] == [(3, "line.too_long")]
    monkeypatch.undo()
    csv.field_size_limit(parsing.MAX_LINE_BYTES)


# --- Parquet --------------------------------------------------------------------------------------


def test_parquet_rows(tmp_path: Path) -> None:
    rows = [
        {"id": None, "prompt": "a\u2028\r\n", "completion": "NaN"},
        {"id": 2, "prompt": "c", "completion": None},
    ]
    records, problems = read(parquet(tmp_path / "a.parquet", rows))
    assert problems == []
    assert records == [(1, {k: v for k, v in rows[0].items() if k != "id"}), (2, rows[1])]


def test_nested_parquet_columns_are_messages_tokens_and_tags(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = parquet(tmp_path / "a.parquet", [{"messages": turns}] * 1500, row_group_size=400)
    rows = load_rows(path)
    assert len(rows) == 1500 and rows[-1].line == 1500
    assert rows[0].messages == (Message("user", "a"), Message("assistant", "b"))
    path = parquet(tmp_path / "b.parquet", [{"tokens": ["a", "b"], "tags": ["O", "B-x"]}])
    assert load_rows(path)[0].tags == ("O", "B-x")


def test_parquet_rows_equal_json_rows_without_struct_padding(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    other = {"type": "object", "properties": {"n": {"type": "number", "description": "any"}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"type": "function", "function": {"name": name, "arguments": arguments}}
                    ],
                },
                {"role": "tool", "content": "c"},
                {"role": "assistant", "content": "d"},
            ],
            "tools": [
                {"type": "function", "function": {"name": name, "parameters": parameters}}
                for name, parameters in (("f", schema), ("g", other))
            ],
        }
        for name, arguments in (("f", {"city": "Hue"}), ("g", {"n": 1}), ("g", {}))
    ]
    assert read(parquet(tmp_path / "a.parquet", rows))[0] == [*enumerate(rows, 1)]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_rows = [
        [(row.messages, row.tools) for row in load_rows(path)]  # type: ignore[attr-defined]
        for path in (lines, tmp_path / "a.parquet")
    ]
    assert read_rows[0] == read_rows[1]


def test_nulls_of_columns_and_items_of_lists_stay(tmp_path: Path) -> None:
    rows = [
        {"a": None, "b": [None, {"x": 1, "y": None}], "c": ["t", None]},
        {"a": 1, "b": None, "c": []},
    ]
    records = [record for _, record in read(parquet(tmp_path / "a.parquet", rows))[0]]
    assert records == [{**rows[0], "b": [None, {"x": 1}]}, rows[1]]


@pytest.mark.parametrize("of_list", [None, "feature", "list"])
def test_classes_of_hugging_face_have_their_names(tmp_path: Path, of_list: str | None) -> None:
    import pyarrow.parquet

    feature: Any = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    if of_list:
        feature = [feature] if of_list == "list" else {"feature": feature, "_type": "Sequence"}
    numbers: list[Any] = [1, 0, -1, 7]
    metadata = json.dumps({"info": {"features": {"label": feature, "gone": feature}}})
    values = [[n, 0] for n in numbers] if of_list else numbers
    table = pyarrow.table({"text": ["x"] * 4, "label": values})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({b"huggingface": metadata.encode()}), path
    )
    names = ["pos", "neg", None, 7]
    expected = [[name, "neg"] for name in names] if of_list else names
    assert [record["label"] for _, record in read(path)[0]] == expected
    for broken in (
        b"{",
        b"[]",
        b'{"info": null}',
        b'{"info": {"features": {"label": {"names": 1}}}}',
    ):
        pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": broken}), path)
        assert [record["label"] for _, record in read(path)[0]] == values


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        ('["a", "b"]', ("a", "b")),
        (' ["é\\u00e9/"] ', ("éé/",)),
        ("['a', 'b']", ("a", "b")),
        ("['a' 'b c'\n \"it's\"]", ("a", "b c", "it's")),
        ("['a',]", ("a",)),
        ("[1, 2]", ("1", "2")),
        ("[1 20]", ("1", "20")),
        ("[]", ()),
        ("[ ]", ()),
        ("a;b", "a;b"),
        ("a|b", "a|b"),
        ("Food, drink", "Food, drink"),
        ("[UNK]", "[UNK]"),
        ("(a, b)", "(a, b)"),
        ("[a] or [b", "[a] or [b"),
        ("[a, b]", None),
        ("{a,b}", None),
        ("{'a', 'b'}", None),
        ('{"choices": ["a"]}', None),
        ("[0.5, 1.0]", None),
        ("[true]", ("true",)),
        ('["a", "a"]', None),
        ('["a', '["a'),
    ],
)
def test_several_labels_in_a_cell(
    tmp_path: Path, cell: str, label: str | tuple[str, ...] | None
) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), ("x", cell)])
    if label is None:
        with pytest.raises(DataError) as refused:
            load_rows(path)
        assert {each.rule for each in refused.value.problems} <= {"label.type", "label.duplicate"}
    else:
        assert load_rows(path)[0].label == label  # type: ignore[attr-defined]


def test_parquet_without_rows_damaged_or_with_broken_text(tmp_path: Path) -> None:
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    schema = pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([], schema=schema), path)
    assert [p.rule for p in read(path)[1]] == ["file.empty"]
    parquet(path, [{"text": f"words {n}"} for n in range(1000)])
    path.write_bytes(path.read_bytes()[:-50])
    assert [p.rule for p in read(path)[1]] == ["file.damaged"]
    bad = pyarrow.array([b"fine", b"\xff", b"fine"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), path)
    assert [p.rule for p in read(path)[1]] == ["file.damaged"]


def test_nan_rating_in_parquet_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{"text": "x", "rating": float("nan")}])
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert [p.rule for p in caught.value.problems] == ["rating.type"]


def test_parquet_with_long_lists_is_read(tmp_path: Path) -> None:
    tokens = [[str(number * each) for each in range(2_000)] for number in range(300)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"tokens": tokens}), path)
    assert [record["tokens"] for _, record in read(path)[0]] == tokens


def test_repeated_header_is_not_a_missing_header(tmp_path: Path) -> None:
    path = tmp_path / "joined.csv"
    path.write_text("utterance,intent\nwhere is my card,card\n" * 3)
    records = dict(read_records(path, []))
    assert [*next(iter(records.values()))] == ["utterance", "intent"]
