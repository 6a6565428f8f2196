"""Valid and invalid rows in files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.rows import load_rows
from luthier.data.shapes import SHAPES
from luthier.data.shapes.texts import History
from luthier.errors import DataError, Problem
from luthier.types import Row


def write(folder: Path, *records: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"".join(as_line(record) + b"\n" for record in records))
    return path


def as_line(record: object) -> bytes:
    return record if isinstance(record, bytes) else json.dumps(record).encode()


def row_of(file: str, line: int, **fields: Any) -> Row:
    """Return a row of the only shape with exactly these required fields."""
    (row,) = (
        kind(file, line, **fields)
        for kind in SHAPES.values()
        if kind is not History  # a pair with different keys
        and fields.keys() <= {each.name for each in dataclasses.fields(kind)}
        and {e.name for e in dataclasses.fields(kind) if e.default is dataclasses.MISSING}
        <= {"file", "line", *fields}
    )
    return row


def problems_of(path: Path) -> list[Problem]:
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert all(p.file == str(path) and p.message and p.advice for p in caught.value.problems)
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
