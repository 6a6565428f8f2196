"""Folders, patterns, tables and mapped columns through the commands, with a tiny network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stored_files import files_in
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.files import read_json

COLOURS = {"sky": "blue", "grass": "green", "coal": "black", "snow": "white"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    pairs = [(f"colour of {k}?", v) for k, v in COLOURS.items()]
    lines = [json.dumps({"question": q, "answer": a, "kind": "x"}) + "\n" for q, a in pairs]
    (folder / "a.jsonl").write_text("".join(lines[:2]))
    (folder / "b.jsonl").write_text("".join(lines[2:]))
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def tuned(base: Path, source: object, *more: object) -> dict[str, Any]:
    options = ["--base", base, "--set", "training.max_steps=1", "--set", "data.validation_share=0"]
    result = run("tune", source, *options, "--json", *more)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.slow
def test_tune_accepts_folders_patterns_and_tables(tiny_model_folder: Path, folder: Path) -> None:
    several = tuned(tiny_model_folder, folder)
    assert several["model_id"] == "tiny-llama:rows-1"
    pattern = tuned(tiny_model_folder, f"{folder}/*.jsonl")
    assert pattern["model_id"] == "tiny-llama:rows-2"
    table = folder.parent / "table.csv"
    assert run("convert", folder, table, "--drop-extra-keys").exit_code == 0
    one = tuned(tiny_model_folder, table)
    assert one["train_loss"] == several["train_loss"] == pattern["train_loss"]
    manifests = [read_json(Path(each["model_dir"]) / "luthier.json") for each in (several, one)]
    files = [sorted(Path(path).name for path in each["data"]["sha256"]) for each in manifests]
    assert files == [["a.jsonl", "b.jsonl"], ["table.csv"]]


def test_recipe_accepts_pattern_and_columns(tiny_model_folder: Path, folder: Path) -> None:
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(
        f'base = "{tiny_model_folder}"\n[data]\ntrain = "rows/*.jsonl"\nvalidation_share = 0\n'
        'columns = {prompt = "question", completion = "kind", answer = ""}\n'
        "[training]\nmax_steps = 1\n"
    )
    result = luthier.tune(recipe)
    assert result.model_id == "tiny-llama:rows-1"


def test_inspect_shows_recognized_data_form(tiny_model_folder: Path, folder: Path) -> None:
    result = run("inspect", folder, "--base", tiny_model_folder, "--json")
    found = json.loads(result.stdout)
    assert found["forms"] == {"train": "jsonl, question and answer"}
    assert "column.ignored" in {each["rule"] for each in found["rules"]}
    assert found["rows"] == {"train": 4} and len(found["files"]["train"]) == 2
    columns = ["--map", "prompt=question", "--map", "completion=kind", "--ignore", "answer"]
    result = run("inspect", folder, "--base", tiny_model_folder, *columns)
    assert '4 rows    jsonl, {"prompt", "completion"}' in result.stdout
    result = run("inspect", folder, "--base", tiny_model_folder, "--map", "prompt")
    assert result.exit_code == 2 and "--map takes KEY=COLUMN" in result.output
    result = run("inspect", folder, "--base", tiny_model_folder, "--map", "prompt=nothing")
    assert result.exit_code == 2 and "column.missing" in result.output


def test_evaluate_maps_columns(tiny_model_folder: Path, folder: Path) -> None:
    options = [
        "--map",
        "prompt=question",
        "--map",
        "completion=answer",
        "--max-tokens",
        4,
        "--json",
    ]
    result = run("evaluate", tiny_model_folder, folder, *options)
    assert result.exit_code == 0, result.output
    assert "exact" in json.loads(result.stdout)["scores"]


def test_convert_command_preserves_existing_file(folder: Path) -> None:
    target = folder.parent / "out.jsonl"
    result = run("convert", folder, target, "--to", "sharegpt")
    assert result.exit_code == 0
    assert str(target) in result.stdout and "kind" in result.stdout
    before = target.read_bytes()
    again = run("convert", folder, target, "--to", "alpaca")
    assert again.exit_code == 2 and "--overwrite" in again.output
    assert target.read_bytes() == before
    refused = run("convert", folder, target, "--to", "text", "--overwrite")
    assert refused.exit_code == 2 and "[convert.form]" in refused.output
    assert target.read_bytes() == before
    result = run(
        "convert", folder, target, "--to", "alpaca", "--overwrite", "--drop-extra-keys", "--json"
    )
    found = json.loads(result.stdout)
    assert (found["rows"], found["form"], found["left_out"]) == (4, "alpaca", ["kind"])


@pytest.mark.parametrize("command", ["tune", "inspect"])
def test_glob_without_match_is_rejected_before_work(
    command: str, tiny_model_folder: Path, tmp_path: Path, luthier_home: Path
) -> None:
    result = run(command, f"{tmp_path}/*.jsonl", "--base", tiny_model_folder)
    assert result.exit_code == 2 and "file.no_match" in result.output
    assert files_in(luthier_home) == []


@pytest.fixture
def intents(tmp_path: Path) -> Path:
    path = tmp_path / "intents.jsonl"
    rows = [{"text": f"ride {n}", "purpose": "ab"[n % 2]} for n in range(8)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_unread_class_column_must_be_mapped_or_ignored(intents: Path) -> None:
    def inspected(*options: str) -> dict[str, list[str]]:
        result = run("inspect", intents, "--base", "none", "--json", *options)
        rules = json.loads(result.stdout)["rules"]
        return {each["rule"]: [place["fix"] for place in each["places"]] for each in rules}

    (fix,) = inspected()["column.unread"]
    assert "`data.columns.label=purpose`" in fix and "`data.columns.purpose=`" in fix
    assert "--map label=purpose" in run("inspect", intents, "--base", "none").output
    assert "column.unread" not in inspected("--ignore", "purpose")
    assert "column.unread" not in inspected("--map", "label=purpose")
    result = run("inspect", intents, "--base", "none", "--ignore", "purpose")
    assert "--ignore purpose" in result.output.splitlines()[-1]


def test_report_names_no_objective_for_rows_with_an_unread_target(
    intents: Path, tiny_model_folder: Path
) -> None:
    base = str(tiny_model_folder)
    report = json.loads(run("inspect", intents, "--base", base, "--json").stdout)
    assert report["base"] is None and not {"learning", "amount"} & report["summaries"].keys()
    assert {"learning", "amount"} <= report["left_out"].keys()
    learned = run("inspect", intents, "--base", base, "--json", "--ignore", "purpose").stdout
    assert json.loads(learned)["summaries"]["learning"]["objective"] == "causal_lm"


def test_ignore_extends_the_mapping_of_a_tuning_command(
    intents: Path, tiny_model_folder: Path
) -> None:
    options = ["--base", str(tiny_model_folder), "--map", "prompt=text", "--json"]
    refused = run("tune", intents, *options)
    assert refused.exit_code == 2 and "column.unread" in refused.output
    estimated = run("estimate", intents, *options, "--ignore", "purpose", "--trial", "0")
    assert "column.unread" not in estimated.output


@pytest.mark.parametrize("command", ["inspect", "tune", "convert", "evaluate"])
def test_mapped_column_must_exist(intents: Path, tiny_model_folder: Path, command: str) -> None:
    rows = intents.with_name("rows.jsonl")
    rows.write_text('{"text": "a", "label": "x", "category": "y"}\n' * 4)
    base = str(tiny_model_folder)
    arguments = {
        "inspect": [rows, "--base", base],
        "tune": [rows, "--base", base],
        "convert": [rows, rows.with_name("new.jsonl")],
        "evaluate": [base, rows],
    }[command]
    result = run(command, *arguments, "--map", "label=categroy")
    assert result.exit_code == 2 and "column.missing" in result.output
    assert "label=category" in "".join(result.output.split())
