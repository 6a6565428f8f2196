"""``luthier split``: bytes, counts, groups and refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from luthier.cli.app import app
from luthier.data.rows import load_rows
from luthier.errors import DataError, RecipeError, RunConflict
from luthier.gate.splits import split_file
from luthier.media.image_grid import encode_png

SHARES = {"validation": 0.2, "test": 0.1}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines = [
        json.dumps(
            {"text": f"{hashlib.sha1(bytes([n])).hexdigest()} \u2028 ệ", "label": "ab"[n % 2]}
        )
        for n in range(100)
    ]
    lines[50] = lines[50].replace(" ", "   ")  # unlike the output of a JSON library
    long = "the parcel that I ordered at the end of last week has not been delivered, where is it"
    lines += [
        json.dumps({"text": f"{long} {word}", "label": "a"}) for word in ("now", "please", "?")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\r\n".join(lines[:3]).encode() + b"\r\n" + "\n".join(lines[3:]).encode())
    return path


def test_split_files_contain_source_lines(source: Path, tmp_path: Path) -> None:
    record = split_file(source, tmp_path / "out", SHARES, 7)
    parts = {name: (tmp_path / "out" / f"{name}.jsonl").read_bytes() for name in record["splits"]}
    assert list(parts) == ["train", "validation", "test"]
    lines = [line for part in parts.values() for line in part.split(b"\n")[:-1]]
    assert sorted(lines) == sorted(source.read_bytes().split(b"\n"))
    for name, part in parts.items():
        said = record["splits"][name]
        assert said["sha256"] == hashlib.sha256(part).hexdigest()
        assert said["rows"] == part.count(b"\n") == sum(said["labels"].values())
    assert record["splits"]["validation"]["rows"] == 21
    assert record["splits"]["validation"]["labels"] in ({"a": 11, "b": 10}, {"a": 10, "b": 11})
    assert record["kept_together"] == {"groups": 1, "rows": 3, "largest": 3}
    assert {b"parcel" in part for part in parts.values()} == {True, False}
    assert json.loads((tmp_path / "out/split.json").read_text()) == record
    again = split_file(source, tmp_path / "again", SHARES, 7)
    assert again["splits"] == record["splits"]


@pytest.mark.parametrize("form", ["clips", "clips.zip"])
def test_media_of_the_rows_are_next_to_the_splits(tmp_path: Path, form: str) -> None:
    (tmp_path / "clips").mkdir()
    for n in range(10):
        png = encode_png(np.full((2, 2, 3), n, np.uint8))
        (tmp_path / "clips" / f"{n}.png").write_bytes(png)
    if form == "clips.zip":
        shutil.make_archive(str(tmp_path / "clips"), "zip", tmp_path / "clips")
        shutil.rmtree(tmp_path / "clips")
    rows = [json.dumps({"image": f"{form}/{n}.png", "label": "ab"[n % 2]}) for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "link").symlink_to(tmp_path)
    split_file(tmp_path / "deep" / "er" / "link" / "rows.jsonl", tmp_path / "out", SHARES, 0)
    assert len(load_rows(str(tmp_path / "out" / "train.jsonl"))) == 7


def test_the_command(source: Path, tmp_path: Path) -> None:
    call = ["split", str(source), "--output", str(tmp_path / "new"), "--test", "0", "--json"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0 and list(json.loads(done.stdout)["splits"]) == [
        "train",
        "validation",
    ]
    assert CliRunner().invoke(app, call).exit_code == 2
    assert json.loads(done.stdout)["kept_together"]["rows"] == 3


def test_refusals_leave_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError) as refused:
        split_file(source, out, {"validation": 0.5, "test": 0.5}, 0)
    assert refused.value.rule == "split.empty"
    text = tmp_path / "a.txt"
    text.write_text("no rows\n")
    with pytest.raises(RecipeError) as refused:
        split_file(text, out, SHARES, 0)
    assert refused.value.rule == "split.format"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(DataError) as refused:
        split_file(broken, out, SHARES, 0)
    assert refused.value.problem.line == 2
    assert not out.exists()
    out.mkdir()
    with pytest.raises(RunConflict):
        split_file(source, out, SHARES, 0)
