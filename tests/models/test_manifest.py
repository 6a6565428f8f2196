"""Round trip and validation of manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import CorruptFile
from luthier.files import write_json
from luthier.models.manifest import MANIFEST, DataRecord, ExportRecord, Manifest, TextFormat


def test_manifest_round_trip_omits_empty_fields(tmp_path: Path) -> None:
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
    rest = {"start_id": None, "opening_ids": [], "closing_ids": [], "sentence": None}
    assert plain["format"] == {"template": "chat", "stop_ids": [1, 2], **rest}
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
def test_invalid_manifest_is_refused(tmp_path: Path, fields: Any, where: str) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(CorruptFile) as refused:
        Manifest.read(tmp_path)
    assert refused.value.rule == "manifest.invalid"


def test_parity_of_older_versions_is_read(tmp_path: Path) -> None:
    tokens = {"tokens": 9, "agreement": 1.0, "mean_kl": 0.0, "max_kl": 0.0}
    old: dict[str, Any] = {"rows": 16, "trained": 2.0, "reloaded": 2.0}
    for parity in (old, {**old, "rounded": True, "next_tokens": tokens}):
        write_json(tmp_path / MANIFEST, {"id": "a:b", "parity": parity})
        read = Manifest.read(tmp_path).parity
        assert read is not None and read.rows == 16
        assert read.greedy is None and read.greedy_beside_base is None
    assert read.next_tokens is not None and read.next_tokens.first_difference is None


def test_new_export_replaces_equal_export(tmp_path: Path) -> None:
    def export(day: int, **fields: Any) -> ExportRecord:
        plain = {"format": "gguf", "created": f"2026-11-{day}", "luthier": "1", "files": {}}
        return ExportRecord.model_validate({**plain, "compared_in": None, **fields})

    record = Manifest(id="a:b")
    for each in (
        export(1, quantization="f16"),
        export(2, quantization="q8_0"),
        export(3, quantization="f32", is_adapter=True),
        export(4, format="onnx"),
        export(5, quantization="q8_0"),
    ):
        record = record.with_export(each)
    record.write(tmp_path)
    read = Manifest.read(tmp_path)
    assert read == record
    assert [(e.name, e.created[-1]) for e in read.exports or ()] == [
        ("gguf f16", "1"), ("gguf f32 adapter", "3"), ("onnx", "4"), ("gguf q8_0", "5"),
    ]  # fmt: skip
