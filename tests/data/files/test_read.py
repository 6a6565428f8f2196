"""Tests of reading files: unreadable files are reported, readable files unchanged."""

from __future__ import annotations

import codecs
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.files import parsing
from luthier.data.files.parsing import json_kind, quote
from luthier.data.files.read import read_records
from luthier.errors import Problem

Records = list[tuple[int, dict[str, object]]]
# No example database and no deadline: the suite must not depend on earlier runs.
PROPERTY = settings(max_examples=150, deadline=None, database=None)


def read_bytes(
    folder: Path, data: bytes, name: str = "data.jsonl"
) -> tuple[Records, list[Problem]]:
    path = folder / name
    path.write_bytes(data)
    return read_path(path)


def read_path(path: Path) -> tuple[Records, list[Problem]]:
    problems: list[Problem] = []
    return list(read_records(path, problems)), problems


def only(problems: list[Problem], path: Path, line: int, rule: str) -> Problem:
    assert [(p.file, p.line, p.rule) for p in problems] == [(str(path), line, rule)]
    assert problems[0].advice.endswith((".", "NEW"))
    str(problems[0]).encode()
    return problems[0]


# --- content is read unchanged -------------------------------------------------------------------


def test_records_come_with_their_line_numbers(folder: Path) -> None:
    records, problems = read_bytes(folder, b'{"a":1}\n\n  \t\r\n{"b":[true,null,1.5]}')
    assert records == [(1, {"a": 1}), (4, {"b": [True, None, 1.5]})]
    assert problems == []


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newline_ends_a_line(folder: Path, separator: str) -> None:
    # JSON forbids raw control characters inside strings, so control characters arrive escaped.
    inside = separator if separator > "\x1f" else json.dumps(separator)[1:-1]
    records, problems = read_bytes(folder, f'{{"text":"a{inside}b"}}\n'.encode() * 2)
    assert records == [(n, {"text": f"a{separator}b"}) for n in (1, 2)]
    assert problems == []


def test_carriage_returns_remain_in_strings_only(folder: Path) -> None:
    records, problems = read_bytes(folder, b'{"a":"x\\r\\ny"}\r\n{"a":"z\\r"}\r\n')
    assert records == [(1, {"a": "x\r\ny"}), (2, {"a": "z\r"})]
    assert problems == []


def test_byte_order_mark_at_the_start_is_tolerated(folder: Path) -> None:
    assert read_bytes(folder, b'\xef\xbb\xbf{"a":1}\n') == ([(1, {"a": 1})], [])
    assert read_bytes(folder, b"\xef\xbb\xbfhi", "bom.txt") == ([(1, {"text": "hi"})], [])


def test_byte_order_mark_later_is_refused_by_name(folder: Path) -> None:
    records, problems = read_bytes(folder, b'{"a":1}\n\xef\xbb\xbf{"a":2}\n')
    assert records == [(1, {"a": 1})]
    only(problems, folder / "data.jsonl", 2, "json.invalid")


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json-lines", "a.JSONL", "a.b.jsonl"])
def test_names_of_json_lines(folder: Path, name: str) -> None:
    assert read_bytes(folder, b'{"a":1}', name) == ([(1, {"a": 1})], [])


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.text", "A.TXT"])
def test_plain_text_file_is_a_single_record(folder: Path, name: str) -> None:
    text = " # Title\r\n\r\nbody\u2028 \x85 end \n\n"
    assert read_bytes(folder, text.encode(), name) == ([(1, {"text": text})], [])


def test_escaped_pair_and_escaped_backslash_are_no_lone_surrogate(folder: Path) -> None:
    records, problems = read_bytes(folder, b'{"a":"\\ud83d\\ude00","b":"\\\\ud83d"}')
    assert records == [(1, {"a": "\N{GRINNING FACE}", "b": "\\ud83d"})]
    assert problems == []


@pytest.mark.slow
@PROPERTY
@given(
    st.lists(
        st.dictionaries(
            st.text(),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: (
                    st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
                ),
                max_leaves=5,
            ),
            max_size=4,
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_any_objects_come_back_identical(
    folder: Path, objects: list[dict[str, object]], ascii_only: bool, end: str
) -> None:
    lines = [json.dumps(value, ensure_ascii=ascii_only) for value in objects]
    records, problems = read_bytes(folder, "".join(line + end for line in lines).encode())
    assert problems == []
    assert [record for _, record in records] == objects
    assert [line for line, _ in records] == [n * end.count("\n") + 1 for n in range(len(objects))]


# --- unreadable files ----------------------------------------------------------------------------


def test_missing_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "nowhere.jsonl"
    records, problems = read_path(path)
    assert records == []
    only(problems, path, 0, "file.missing")
    monkeypatch.chdir(folder)
    relative = Path("nowhere.jsonl")
    assert str(folder) in only(read_path(relative)[1], relative, 0, "file.missing").advice


def test_invalid_paths_are_missing_files(folder: Path) -> None:
    (folder / "plain.txt").write_bytes(b"x")
    for path in (folder / "plain.txt" / "a.jsonl", Path("a\0b.jsonl")):
        only(read_path(path)[1], path, 0, "file.missing")


def test_directory(folder: Path) -> None:
    path = folder / "dir.jsonl"
    path.mkdir()
    only(read_path(path)[1], path, 0, "file.directory")


def test_symbolic_link_loop_is_unreadable(folder: Path) -> None:
    path = folder / "loop.jsonl"
    path.symlink_to(path)
    only(read_path(path)[1], path, 0, "file.unreadable")


def test_pipe_is_refused_without_waiting_for_a_writer(folder: Path) -> None:
    path = folder / "pipe.jsonl"
    os.mkfifo(path)
    only(read_path(path)[1], path, 0, "file.unreadable")


def test_permission_denied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "secret.jsonl"
    path.write_bytes(b'{"a":1}')

    def denied(*_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied")

    # Not by chmod: tests may run as root, who can read everything.
    monkeypatch.setattr(Path, "open", denied)
    only(read_path(path)[1], path, 0, "file.unreadable")


@pytest.mark.parametrize("name", ["a.png", "a.WAV"])
def test_a_single_image_or_sound_is_no_data_set(folder: Path, name: str) -> None:
    _, problems = read_bytes(folder, b"RIFF or else", name)
    only(problems, folder / name, 0, "file.unknown_format")


@pytest.mark.parametrize("name", ["a.bin", "a"])
@pytest.mark.parametrize("data", [b"just words", b"", b"12", b"a,b\n1,2\n"])
def test_unknown_format(folder: Path, name: str, data: bytes) -> None:
    records, problems = read_bytes(folder, data, name)
    assert records == []
    problem = only(problems, folder / name, 0, "file.unknown_format")
    for supported in (".jsonl", ".ndjson", ".json-lines", ".csv", ".parquet", ".txt", ".md", ".gz"):
        assert supported in problem.advice


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \r\n\t\n"),
        ("a.jsonl", b"\xef\xbb\xbf"),
        ("a.txt", b""),
        ("a.txt", b"\xef\xbb\xbf"),
    ],
)
def test_empty_file(folder: Path, name: str, data: bytes) -> None:
    records, problems = read_bytes(folder, data, name)
    assert records == []
    only(problems, folder / name, 0, "file.empty")


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1}\n\0',
        b"\xfd7zXZ\x00abc",
        b"PK\x03\x04abc",
        b'{"a":1}' + bytes(range(1, 8)),
    ],
)
@pytest.mark.parametrize("name", ["b.jsonl", "b.txt"])
def test_binary_file(folder: Path, name: str, data: bytes) -> None:
    records, problems = read_bytes(folder, data, name)
    assert records == []
    problem = only(problems, folder / name, 0, "file.binary")
    assert ".jsonl" in problem.advice and ".txt" in problem.advice


@pytest.mark.parametrize("start", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_utf_16_advice_has_conversion_command(folder: Path, start: bytes) -> None:
    order = "le" if start == codecs.BOM_UTF16_LE else "be"
    records, problems = read_bytes(folder, start + "a,b".encode(f"utf-16-{order}"), "b.csv")
    assert records == []
    problem = only(problems, folder / "b.csv", 0, "file.binary")
    assert "iconv" in problem.advice


def test_late_nul_byte_is_reported_with_line(folder: Path) -> None:
    filler = b'{"a":"' + b"x" * 70_000 + b'"}\n'
    records, problems = read_bytes(folder, filler + b'{"a":"\0"}\n')
    assert len(records) == 1
    only(problems, folder / "data.jsonl", 2, "json.invalid")
    only(read_bytes(folder, filler + b"\0", "late.txt")[1], folder / "late.txt", 0, "file.binary")


def test_terminal_colours_are_not_binary(folder: Path) -> None:
    text = "\x1b[31mred\x1b[0m\f\b\t"
    assert read_bytes(folder, text.encode(), "log.txt") == ([(1, {"text": text})], [])


# --- unreadable lines ----------------------------------------------------------------------------

BAD_LINES = [
    ("json.invalid", b'{"a": 1'),
    ("json.invalid", b'{"a" 1}'),
    ("json.invalid", b"{'a': 1}"),
    ("json.invalid", b'{"a":1} {"a":2}'),
    ("json.invalid", b"{"),
    ("json.invalid", b'{"a":"\t"}'),
    ("json.invalid", "{\u00a0}".encode()),
    ("json.invalid", "\u0085".encode()),
    ("json.invalid", b"\x0c"),
    ("json.not_object", b"[1,2]"),
    ("json.not_object", b'"x"'),
    ("json.not_object", b"12"),
    ("json.not_object", b"true"),
    ("json.not_object", b"null"),
    ("json.duplicate_key", b'{"a":1,"b":2,"a":3}'),
    ("json.duplicate_key", b'{"x":[{"k\\n":1,"k\\n":1}]}'),
    ("json.duplicate_key", b'{"\\ud800":1,"\\ud800":1}'),
    ("json.not_finite", b'{"a":NaN}'),
    ("json.not_finite", b'{"a":[Infinity]}'),
    ("json.not_finite", b'{"a":-Infinity}'),
    ("json.not_finite", b'{"a":1e999}'),
    ("json.not_finite", b'{"a":' + b"9" * 5000 + b"}"),
    ("json.too_deep", b'{"a":' + b"[" * 100_000),
    ("json.too_deep", b'{"a":' * 100_000),
    ("encoding.utf8", b'{"a":"\xff"}'),
    ("encoding.utf8", b'{"a":"\xc3"}'),
    ("encoding.utf8", b'{"a":"\xed\xa0\x80"}'),
    ("encoding.surrogate", b'{"b":0,"a":"\\ud83d"}'),
    ("encoding.surrogate", b'{"a":[{"b":"x\\uDE00y"}]}'),
    ("encoding.surrogate", b'{"a":{"\\udfff":1}}'),
    ("encoding.surrogate", b'{"\\ud800":1}'),
]


@pytest.mark.parametrize(("rule", "line"), BAD_LINES)
def test_bad_line_between_good_lines(folder: Path, rule: str, line: bytes) -> None:
    records, problems = read_bytes(folder, b'{"a":1}\n' + line + b'\n{"a":2}\n')
    assert records == [(1, {"a": 1}), (3, {"a": 2})]
    problem = only(problems, folder / "data.jsonl", 2, rule)
    assert len(str(problem)) < 500


def test_wrong_encoding_in_plain_text_names_the_line(folder: Path) -> None:
    records, problems = read_bytes(folder, b"one\ntwo\nca\xe9\nfour", "latin.txt")
    assert records == []
    problem = only(problems, folder / "latin.txt", 3, "encoding.utf8")
    assert problem.message == "Byte 3 of the line (0xE9) is not valid UTF-8."


@pytest.mark.parametrize("end", [b"\n", b""])
def test_long_line_is_skipped_and_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, end: bytes
) -> None:
    monkeypatch.setattr(parsing, "MAX_LINE_BYTES", 100)
    fits = b'{"a":"' + b"x" * 92 + b'"}'
    assert len(fits) == 100
    long = b'{"a":"' + b"x" * 200_000 + b'"}'
    records, problems = read_bytes(folder, fits + b"\n" + long + end)
    assert [line for line, _ in records] == [1]
    problem = only(problems, folder / "data.jsonl", 2, "line.too_long")
    assert "200,008" in problem.message
    after, problems = read_bytes(folder, b"x" + fits + b"\n" + fits)
    assert [line for line, _ in after] == [2]
    assert [(p.line, p.rule) for p in problems] == [(1, "line.too_long")]


def test_a_file_is_never_whole_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_LINE_BYTES", 1000)
    path = folder / "large.jsonl"
    path.write_bytes(b"x" * 8_000_000 + b"\n" + b'{"text":"some words"}\n' * 100_000)
    problems: list[Problem] = []
    tracemalloc.start()
    count = sum(1 for _ in read_records(path, problems))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000
    assert [p.rule for p in problems] == ["line.too_long"]
    assert peak < 1_000_000


def test_reading_is_lazy(folder: Path) -> None:
    path = folder / "lazy.jsonl"
    path.write_bytes(b'{"a":1}\nbad\n')
    problems: list[Problem] = []
    records: Iterator[tuple[int, dict[str, object]]] = read_records(path, problems)
    assert next(records) == (1, {"a": 1})
    assert problems == []
    assert list(records) == []
    assert [p.line for p in problems] == [2]


# --- parts of messages ---------------------------------------------------------------------------


def test_json_kind_names_every_type() -> None:
    names: list[tuple[object, str]] = [
        (None, "null"),
        (True, "true or false"),
        (1, "a number"),
        (1.5, "a number"),
        ("s", "a string"),
        ([], "an array"),
        ({}, "an object"),
    ]
    assert [json_kind(value) for value, _ in names] == [name for _, name in names]


@given(st.text(alphabet=st.characters(categories=None)))
@PROPERTY
def test_quote_returns_a_single_printable_line(text: str) -> None:
    result = quote(text)
    assert result.encode().decode().isprintable()
    assert len(result.splitlines()) == 1
    assert len(result) <= 402


def test_shown_text_is_clipped() -> None:
    assert quote("x" * 40) == '"' + "x" * 40 + '"'
    assert quote("x" * 41) == '"' + "x" * 39 + '…"'
    assert quote("\x1b[31m\n") == '"\\x1b[31m\\n"'
