"""Findings about rows beside others say how the row begins, with what is secret masked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import luthier
from luthier.gate import scan as quoting

TEXT = "please call 020 7946 0958 about the parcel that I ordered at the end of last week"


def write(path: Path, *texts: str) -> Path:
    rows = [json.dumps({"text": text, "label": "ab"[n % 2]}) for n, text in enumerate(texts)]
    path.write_text("\n".join([*rows[:2], "{", *rows[2:]]) + "\n")
    return path


def test_rows_are_quoted_from_their_lines(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", "one", TEXT, "two", TEXT, TEXT.upper(), "three")
    held = write(tmp_path / "b.jsonl", "four", "five", f"{TEXT}!")
    report = luthier.inspect(data, test=held, base=None)
    kept = report.findings.examples
    (copy,) = kept["duplicate.exact"]
    assert copy.place.line == 2 and copy.excerpt.startswith("please call 02")
    assert "7946 0958" not in copy.excerpt and copy.excerpt.endswith("last week")
    (leak,) = kept["leakage.exact"]
    assert (Path(leak.place.file).name, leak.place.line) == ("b.jsonl", 4)
    assert leak.excerpt.endswith("week!") and "7946" not in leak.excerpt
    assert "please call 02" in report.html() and "7946 0958" not in report.html()


def test_only_the_first_rows_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quoting, "QUOTED_ROWS", 3)
    data = write(tmp_path / "a.jsonl", "one", TEXT, "two", TEXT, "x" * 30, "y", "x" * 30)
    found = luthier.inspect(data, base=None).findings.examples["duplicate.exact"]
    assert [bool(each.excerpt) for each in found] == [True, False]
