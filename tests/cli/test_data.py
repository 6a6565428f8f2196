"""``luthier.convert`` and ``luthier.split`` compared with the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import RecipeError, RefusedInput
from luthier.files import read_json


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"prompt": f"ask {n} {'abcdefg'[n % 7]}", "completion": f"{n * n}"} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_convert_function_matches_command(source: Path, tmp_path: Path) -> None:
    found = luthier.convert(source, tmp_path / "a.csv", to="alpaca")
    assert (found.rows, found.format, found.form) == (40, "csv", "alpaca")
    said = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "b.csv"), "--to=alpaca"])
    assert said.exit_code == 0, said.output
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_convert_overwrites_file_only_on_request(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.jsonl"
    target.write_text("precious\n")
    with pytest.raises(RecipeError) as refused:
        luthier.convert(source, target)
    assert refused.value.rule == "target.exists"
    assert target.read_text() == "precious\n"
    luthier.convert(source, target, to="chat", overwrite=True)
    assert json.loads(target.read_text().split("\n")[0])["messages"][0]["role"] == "user"


def test_convert_maps_columns_and_reports_rejected_rows(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"q": "a", "a": "b"}\n{"q": "a", "a": ""}\n')
    with pytest.raises(RefusedInput) as caught:
        luthier.convert(source, tmp_path / "out.jsonl", columns={"prompt": "q", "completion": "a"})
    assert (caught.value.rule, caught.value.problem.line) == ("field.empty", 2)
    assert not (tmp_path / "out.jsonl").exists()


def test_split_function_matches_command(source: Path, tmp_path: Path) -> None:
    record = luthier.split(source, tmp_path / "one", validation=0.2, test=0, seed=3)
    command = ["split", str(source), "--output", str(tmp_path / "two"), "--validation", "0.2"]
    said = CliRunner().invoke(app, [*command, "--test", "0", "--seed", "3", "--json"])
    assert said.exit_code == 0, said.output
    assert record == json.loads(said.stdout) == read_json(tmp_path / "one/split.json")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "split.json",
        "train.jsonl",
        "validation.jsonl",
    ]
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(RefusedInput) as refused:
        luthier.split(source, tmp_path / "three", validation=0.5, test=0.5)
    assert refused.value.rule == "split.empty"
