"""``luthier search`` with real processes: a killed process, printed results and errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import start
from typer.testing import CliRunner

from luthier.cli.app import app

ROWS = [
    {"prompt": f"say {word} {n}", "completion": f"{word.upper()} {n}"}
    for n in range(8)
    for word in ("fox", "dog", "card")
]
SPACE = ["--space", "training.learning_rate=1e-5..1e-1", "--space", "adaptation.rank=2,4"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def arguments(rows: Path, base: Path, *further: str) -> list[str]:
    return [
        "search", str(rows), "--base", str(base), "--name", "x", "--trials", "4", *SPACE,
        "--set", "training.max_steps=8", "--set", "training.batch_size=4",
        "--set", "training.precision=float32", "--set", "training.threads=1", *further,
    ]  # fmt: skip


def result_of(home: Path, words: list[str]) -> dict[str, Any]:
    process = start(home, *words)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return dict(json.loads(out))


@pytest.fixture(scope="module")
def whole(
    rows: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return the home folder and the result of an uninterrupted search."""
    home = tmp_path_factory.mktemp("whole")
    return home, result_of(home, arguments(rows, tiny_model_folder, "--json"))


def manifest(home: Path) -> dict[str, Any]:
    path = home / "models" / "custom" / "tiny-llama" / "x" / "luthier.json"
    return dict(json.loads(path.read_text()))


def test_json_has_the_trials_best_first_and_the_model(whole: tuple[Path, dict[str, Any]]) -> None:
    home, found = whole
    assert found["result"]["model_id"] == "tiny-llama:x" and found["name"] == "x"
    assert found["folder"] == str(home / "searches" / "x")
    assert sorted(trial["number"] for trial in found["trials"]) == [1, 2, 3, 4]
    complete = [trial["value"] for trial in found["trials"] if trial["state"] == "complete"]
    assert len(complete) >= 3 and complete == sorted(complete)
    assert found["result"]["validation_loss"] == found["trials"][0]["value"] == complete[0]
    assert manifest(home)["metrics"]["validation_loss"] == complete[0]


@pytest.mark.slow
def test_killed_search_resumes_to_same_trials(
    whole: tuple[Path, dict[str, Any]], rows: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    words = arguments(rows, tiny_model_folder, "--json")
    process = start(tmp_path, *words)
    third = tmp_path / "searches" / "x" / "trials" / "003" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (third.is_file() and third.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "models" / "custom").exists()
    again = result_of(tmp_path, [*words, "--resume"])
    home, found = whole
    assert again["trials"] == found["trials"]
    weights = "trained_weights_sha256"
    assert manifest(tmp_path)[weights] == manifest(home)[weights]


def test_best_search_recipe_can_be_tuned(
    whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, found = whole
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    done = CliRunner().invoke(app, ["tune", found["recipe"], "--name", "again", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["validation_loss"] == found["trials"][0]["value"]


def test_search_table_suggests_next_command(
    whole: tuple[Path, dict[str, Any]],
    rows: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The search is complete, so ``--resume`` only prints the result."""
    home, found = whole
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, arguments(rows, tiny_model_folder, "--resume"))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["trial", "validation", *found["trials"][0]["settings"]]
    for line, trial in zip(lines[1:5], found["trials"], strict=True):
        number, measure, value, rate, rank, *state = line.split()
        assert (measure, value) == ("loss", f"{trial['value']:.4f}")
        assert int(number) == trial["number"]
        assert float(rate) == pytest.approx(trial["settings"]["training.learning_rate"], rel=5e-3)
        assert int(rank) == trial["settings"]["adaptation.rank"]
        assert state == ([] if trial["state"] == "complete" else [trial["state"]])
    assert "luthier chat tiny-llama:x" in done.stdout
    assert f"luthier tune {found['recipe']} --name NAME" in done.stdout


@pytest.mark.parametrize(
    ("space", "part"),
    [
        ("training.learning_rte=1e-5..1e-3", "training.epochs"),
        ("training.learning_rate=1e-3", "training.learning_rate=1e-3"),
        ("adaptation.dropout=0.1..1.5", "adaptation.dropout"),
    ],
)
def test_invalid_search_space_is_rejected(
    rows: Path, tiny_model_folder: Path, luthier_home: Path, space: str, part: str
) -> None:
    words = ["search", str(rows), "--base", str(tiny_model_folder), "--space", space, "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "RecipeError" and part in error["message"]
    assert not luthier_home.exists()


def test_invalid_search_space_is_rejected_before_torch_import(rows: Path) -> None:
    script = (
        "import contextlib, sys\n"
        "from luthier.cli.app import main\n"
        f"sys.argv = ['luthier', 'search', {str(rows)!r}, '--space', 'training.x=1,2']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "'training.x'" in done.stderr
    assert not {"torch", "transformers", "optuna"} & set(eval(done.stdout))


def test_no_trials_are_no_search(rows: Path) -> None:
    assert CliRunner().invoke(app, ["search", str(rows), "--trials", "0"]).exit_code == 2
