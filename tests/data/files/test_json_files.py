"""Tests of JSON arrays and objects: the records of JSON Lines, and located problems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.files import parsing
from luthier.data.files.read import read_records
from luthier.errors import Problem, line_text

Records = list[tuple[int, dict[str, object]]]


def read(path: Path, data: bytes) -> tuple[Records, list[Problem]]:
    path.write_bytes(data)
    problems: list[Problem] = []
    return list(read_records(path, problems)), problems


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents") / "a.json"


def test_array_objects_have_line_numbers(path: Path) -> None:
    data = b'\xef\xbb\xbf\n[\r\n  {"a": 1},\n {"a":\n 2}, {"a": "\xe2\x80\xa8"}\n]\n\n'
    assert read(path, data) == ([(3, {"a": 1}), (4, {"a": 2}), (5, {"a": "\u2028"})], [])


def test_single_and_concatenated_objects_are_read(path: Path) -> None:
    assert read(path, b'{\n"a": 1\n}') == ([(1, {"a": 1})], [])
    assert read(path, b'{\n"a": 1\n}\n{\n"a": 2\n}\n') == ([(1, {"a": 1}), (4, {"a": 2})], [])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.lists(st.dictionaries(st.text(), values, max_size=4), min_size=1, max_size=5),
    st.sampled_from([None, 1, 2]),
)
def test_any_objects_come_back(
    path: Path, objects: list[dict[str, object]], indent: int | None
) -> None:
    text = json.dumps(objects, indent=indent, ensure_ascii=False)
    records, problems = read(path, text.encode())
    assert problems == []
    assert [record for _, record in records] == objects


@pytest.mark.parametrize(
    ("data", "before", "line", "rule"),
    [
        (b'[\n{"a": 1},\n{"a": 1, "a": 2},\n{"a": 3}]', 2, 3, "json.duplicate_key"),
        (b'[\n{"a": 1},\n{"a": [NaN]},\n{"a": 3}]', 2, 3, "json.not_finite"),
        (b'[{"a": 1},\n{"a": 1e999}, {"a": 3}]', 2, 2, "json.not_finite"),
        (b'[{"a": 1},\n{"a": ' + b"9" * 5000 + b'}, {"a": 3}]', 2, 2, "json.not_finite"),
        (b'[{"a": 1},\n{"a": "\\ud83d"},\n{"a": 3}]', 2, 2, "encoding.surrogate"),
        (b'[{"a": 1},\n[1, 2],\n{"a": 3}]', 2, 2, "json.not_object"),
        (b'[{"a": 1},\n{"a" 2},\n{"a": 3}]', 1, 2, "json.invalid"),
        (b'[{"a": 1}\n{"a": 3}]', 1, 2, "json.invalid"),
        (b'[{"a": 1},\n{"a": 3}', 2, 2, "json.invalid"),
        (b'[{"a": 1},\n{"a": "x', 1, 2, "json.invalid"),
        (b'[{"a": 1}] x', 1, 1, "json.invalid"),
        (b'[{"a": 1}\n,]', 1, 2, "json.invalid"),
        (b'[{"a": 1},\n{"a": "\xff"}]', 0, 2, "encoding.utf8"),
        (b'[{"a": 1},\n' + b"[" * 100_000, 1, 2, "json.too_deep"),
        (b"[\n]", 0, 0, "file.empty"),
    ],
)
def test_mistakes(path: Path, data: bytes, before: int, line: int, rule: str) -> None:
    records, problems = read(path, data)
    assert len(records) == before
    assert [(p.line, p.rule) for p in problems] == [(line, rule)]


def test_a_long_element_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_LINE_BYTES", 100)
    records, problems = read(path, b'[{"a": 1},\n{"a": "' + b"x" * 200 + b'"}]')
    assert [p.rule for p in problems] == ["line.too_long"] and len(records) == 1


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ('[{"text": "a"}, {"text": "b"}, 3, {"text": "c"}]\n', "row 1, row 2, row 3, row 4"),
        ('\n[\n{"text": "a"}, {"text": "b"}\n]', "row 1, row 2"),
        ('[3, {"text": "b"}]', "row 1, row 2"),
        ('{"text": "a"} {"text": "b"}\n', "row 1, row 2"),
        ('{"data": [\n{"text": "a"},\n{"text": "b"}\n]}', "row 1, row 2"),
        ('[{"text": "a"},\n 3,\n{"text": "c"}]', "line 1, line 2, line 3"),
        ('[\n{"text":\n"a"}, {"text": "b"}]', "line 2, line 3"),
        ('{"text": "a"}\n', "line 1"),
    ],
)
def test_rows_on_one_line_have_row_numbers(tmp_path: Path, text: str, numbers: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    problems: list[Problem] = []
    found = [line for line, _ in read_records(path, problems)]
    found += [each.line for each in problems]
    assert ", ".join(line_text(line) for line in sorted(found)) == numbers
