"""The record of a model: what is written is read back, and what makes no sense is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import CorruptFile
from luthier.models.manifest import MANIFEST, DataRecord, Manifest, TextFormat


def test_what_is_written_is_read_back_without_what_does_not_concern_it(tmp_path: Path) -> None:
    data = DataRecord(
        sha256={"rows.jsonl": "0"},
        dropped=0,
        truncated=1,
        held_out={"rows.jsonl": [1, 2]},
        rows=8,
        validation_rows=2,
        examples=8,
        tokens=100,
        learned_tokens=40,
        mix=[],
    )
    manifest = Manifest(
        id="base:mine",
        saved="adapter",
        parent="base",
        recipe={"objective": {"method": "sft"}, "name": None},
        format=TextFormat(template="chat", stop_ids=(1, 2)),
        data=data,
    )
    manifest.write(tmp_path)
    plain = json.loads((tmp_path / MANIFEST).read_text())
    assert Manifest.read(tmp_path) == manifest
    assert plain["version"] == 1 and plain["data"]["held_out"] == {"rows.jsonl": [1, 2]}
    assert plain["format"] == {"template": "chat", "stop_ids": [1, 2], "start_id": None}
    assert plain["recipe"]["name"] is None
    assert "student" not in plain and "source" not in plain
    assert manifest.objective == {"method": "sft"} and Manifest(id="x").objective is None


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, "id"),
        ([], "the whole"),
        ({"id": "x", "version": 2}, "version"),
        ({"id": "x", "files": []}, "files"),
        ({"id": "x", "saved": "pickle"}, "saved"),
        ({"id": "x", "unheard_of": 1}, "unheard_of"),
    ],
)
def test_a_record_that_makes_no_sense_names_the_field(
    tmp_path: Path, fields: Any, where: str
) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(CorruptFile, match=rf"{MANIFEST} is no record of a model: {where}: "):
        Manifest.read(tmp_path)
