"""Tests of the fast JSON parser against the strict parser."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luthier.data.files import parsing
from luthier.data.files.parsing import parse_line
from luthier.data.files.read import read_records
from luthier.errors import Problem, RowRefused

PROPERTY = settings(max_examples=600, deadline=None, database=None)


def outcome(raw: bytes, strict: bool) -> object:
    try:
        # repr tells 1 from 1.0 and True, and shows the order of keys.
        return repr(parsing._strict(raw, 2) if strict else parse_line(raw, 2))
    except RowRefused as bad:
        return (bad.rule, bad.problem.message, bad.problem.advice)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(categories=None), max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
lines = st.builds(
    lambda value, ascii_only: json.dumps(value, ensure_ascii=ascii_only).encode(
        errors="surrogatepass"
    ),
    st.dictionaries(st.text(max_size=3), values, max_size=4) | values,
    st.booleans(),
)
pieces = st.sampled_from(
    [b'{"a":1', b',"a":2}', b'"\\u0061":3', b"1e400", b"-1e400", b"9" * 400, b".0", b"1E5", b"-0"]
    + [b"NaN", b"Infinity", b"\\ud83d", b"\\ude00", b"\xed\xa0\x80", b"\xff", b"\t", b"\x0b", b" "]
    + [b"{", b"}", b"[", b"]", b":", b",", b'"', b"null", b"\xef\xbb\xbf", b"\xe2\x80\xa8"]
)  # fmt: skip


@PROPERTY
@given(lines | st.lists(pieces | st.binary(max_size=2), max_size=8).map(b"".join))
@example(b'{"a":1,"\\u0061":2}')
@example(b'{"a":[{"b":1e999}]}')
@example(b'{"a":' + b"9" * 5000 + b"}")
@example(b'{"a":' + b"9" * 400 + b".5}")
@example(b'{"a":' + b"[" * 150 + b"]" * 150 + b"}")
@example(b'{"a":' + b"[" * 400 + b"]" * 400 + b"}")
@example(b'{"a":0.1000000000000000055511151231257827}')
@example(b'{"a":2.2250738585072011e-308}')
@example(b'{"a":"\\ud83d\\ude00 \\ud83d"}')
@example(b'{"":{"":1,"":2}}')
def test_fast_and_strict_parsers_agree(raw: bytes) -> None:
    assert outcome(raw, strict=False) == outcome(raw, strict=True)


@PROPERTY
@given(st.integers(0, 2**64 - 1))
def test_numbers_keep_every_bit(bits: int) -> None:
    (number,) = struct.unpack("<d", struct.pack("<Q", bits))
    if number == number and abs(number) != float("inf"):
        raw = b'{"a":%s}' % repr(number).encode()
        assert parse_line(raw, 2) == {"a": number}


# --- files ---------------------------------------------------------------------------------------


def test_a_long_line_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"a":1}\n' + b"x" * 300_000 + b'\n{"a":2}\n{"a":3}\n')
    problems: list[Problem] = []
    found = list(read_records(path, problems))
    assert found == [(1, {"a": 1}), (3, {"a": 2}), (4, {"a": 3})]
    assert [(p.line, p.rule) for p in problems] == [(2, "line.too_long")]
    assert "300,000 bytes" in problems[0].message


def test_how_far_reading_is_can_be_followed(tmp_path: Path) -> None:
    path = tmp_path / "told.jsonl"
    path.write_bytes(b'{"text":"some words"}\n' * 20_000)
    on_progress: list[int] = []
    assert sum(1 for _ in read_records(path, [], on_progress=on_progress.append)) == 20_000
    assert on_progress == sorted(on_progress) and len(on_progress) > 20
    assert on_progress[-1] == path.stat().st_size
