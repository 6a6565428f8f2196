"""``luthier tune``: output streams, exit codes, and errors that leave no files."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import MODEL, ROWS, Answer, jsonl, memorise, start
from pydantic import TypeAdapter
from stored_files import files_in

from luthier.cli.tune import loss_figures, print_comparison, print_result, validation_result
from luthier.engine.runs import Result, Run
from luthier.engine.verdict import Refit
from luthier.evaluation.baselines import Baseline, Comparison
from luthier.files import read_json, sha256_of
from luthier.models.manifest import MANIFEST
from luthier.objectives import classification


def test_tune_prints_json_result_and_progress_on_stderr(
    tuned: tuple[Path, dict[str, Any], str, str], data: Path
) -> None:
    home, result, out, err = tuned
    assert out.count("\n") == 1
    assert re.search(r"^  step 60 of 60: loss ", err, re.MULTILINE) and "\x1b" not in err
    assert "Chosen for this run" in err
    assert result["model_id"] == MODEL
    assert Path(result["run_dir"]) == home / "runs" / "tiny-llama" / "colours"
    assert Path(result["model_dir"]) == home / "models" / "custom" / "tiny-llama" / "colours"
    assert result["rows"] == 4
    assert result["steps"] == 60
    manifest = read_json(Path(result["model_dir"]) / MANIFEST)
    assert result["tokens"] == 60 * manifest["data"]["tokens"]
    assert 0 < result["validation_loss"] < 0.5
    assert 0 < result["train_loss"] < 0.5
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 50_000_000
    assert manifest["data"]["sha256"] == {str(data): sha256_of(data)}
    for name in ("loss.svg", "loss.png"):
        assert (Path(result["run_dir"]) / name).stat().st_size > 1000


def test_verdict_advice_names_command_line_options(
    tuned: tuple[Path, dict[str, Any], str, str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = TypeAdapter(Result).validate_python(tuned[1])
    assert result.verdict is not None and result.verdict.outcome == "learned"
    print_result(result)
    assert f"  {result.verdict.text}\n" in capsys.readouterr().out
    verdict = replace(
        result.verdict, outcome="worse", text="worse [x]", advice="Try `training.patience=3`"
    )
    print_result(replace(result, verdict=verdict))
    assert "  worse [x]\n  Try `--set training.patience=3`\n" in capsys.readouterr().out


def test_result_lines_describe_stored_weights(
    tuned: tuple[Path, dict[str, Any], str, str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = TypeAdapter(Result).validate_python(tuned[1])
    assert result.verdict is not None
    print_result(result)
    first, second = capsys.readouterr().out.split("\n")[1:3]
    assert first == f"{MODEL} is stored and verified" and second.startswith("  60 steps, ")
    refit = Refit(rows=24, held_out=4, steps=10)
    undone = replace(result.verdict, unchanged=True, stopped_early=True, kept_step=0)
    print_result(replace(result, verdict=undone, refit=refit))
    first, second = capsys.readouterr().out.split("\n")[1:3]
    assert first.startswith(f"{MODEL} is stored and verified, ") and "unchanged" in first
    assert second.startswith("  60 steps (stopped early), 10 in the refit")
    assert f"validation loss {result.verdict.kept['loss']:.4f} before the refit on all 24" in second


def test_printed_losses_describe_same_weights(
    tuned: tuple[Path, dict[str, Any], str, str], home: Path
) -> None:
    result = TypeAdapter(Result).validate_python(tuned[1])
    assert result.verdict is not None and result.verdict.kept_step == result.steps
    trained = f"training loss {result.train_loss:.4f}"
    assert loss_figures(result, "loss 0.5000") == f"{trained}, validation loss 0.5000"
    regression = replace(result, verdict=replace(result.verdict, kept_step=0))
    kept = {"accuracy": 0.75, "loss": 0.6}
    held = validation_result("accuracy", kept, beside_loss=True)
    assert loss_figures(regression, held) == "validation accuracy 75.0%, loss 0.6000"
    assert loss_figures(replace(result, refit=Refit(24, 4, 10)), held) == f"validation {held}"
    unmeasured = replace(result.verdict, kept={}, kept_step=result.steps)
    assert loss_figures(replace(result, verdict=unmeasured), "") == trained


def test_tune_without_json_prints_choices_and_next_steps(
    data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Without a terminal: no bar, no colours; the result on stdout, the settings on stderr."""
    process = start(
        tmp_path, "tune", str(data), "--base", str(tiny_model_folder), "--epochs", "1",
        "--set", "adaptation.rank=2",
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "tiny-llama:colours-1 is stored and verified" in out
    assert "luthier chat tiny-llama:colours-1" in out
    assert "loss.png" in out
    assert "Chosen for this run (override with --set NAME=VALUE):" in err
    for name in ("training.batch_size", "training.learning_rate", "precision"):
        assert name in err
        assert name not in out
    assert "training.epochs" not in err
    assert "\x1b" not in out + err
    assert "Traceback" not in err


@pytest.mark.slow
def test_printed_loss_curve_file_exists(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"my {word} {n}", "label": word} for n in range(12) for word in ("fox", "dog")]
    data = jsonl(tmp_path / "labels.jsonl", *rows)
    process = start(
        tmp_path, "tune", str(data), "--base", str(tiny_model_folder), "--set",
        "training.max_steps=2", "--set", "training.baseline_seconds=0",
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    named = next(
        line.split("curve", 1)[1].strip() for line in out.splitlines() if " curve " in line
    )
    assert Path(named).is_file()


@pytest.mark.parametrize(
    ("content", "rule", "line"),
    [
        (['{"prompt": "a", "completion": "b"}', "{nonsense"], "json.invalid", 2),
        (['{"prompt": "a", "completion": ""}'], "field.empty", 1),
        (['{"question": "a", "reply": "b"}'], "row.unknown_shape", 1),
        (['{"prompt": "a", "completion": "b"}', '{"text": "c"}'], "row.mixed_shapes", 2),
        (['{"prompt": "a", "completion": "b"}'], "rows.too_few", 1),
        (['{"prompt": "a", "completion": "b"}', '{"prompt": "x", "completion": "%s"}' % ("y" * 2000)],
         "row.too_long", 2),
    ],
)  # fmt: skip
def test_invalid_rows_are_reported_with_location_and_fix(
    tmp_path: Path,
    luthier_home: Path,
    tiny_model_folder: Path,
    content: list[str],
    rule: str,
    line: int,
) -> None:
    path = jsonl(tmp_path / "bad.jsonl", *content)
    command = ["tune", str(path), "--base", str(tiny_model_folder), "--name", "x"]
    answer = Answer(*command)
    message = answer.refused()
    assert f"{path}:{line}: [{rule}]" in message
    assert "Fix: " in message
    assert answer.out == ""
    answer = Answer(*command, "--json")
    assert answer.refused() == message
    error = answer.json()["error"]
    assert error["type"] == "DataError"
    [problem] = error["problems"]
    assert (problem["file"], problem["line"], problem["rule"]) == (str(path), line, rule)
    assert problem["message"] and problem["advice"]
    assert files_in(luthier_home) == []


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("junk.jsonl", bytes(range(256)) * 40, "file.binary"),
        ("junk.jsonl", b"\x1f\x8b\x08" + bytes(500), "file.damaged"),
        ("empty.jsonl", b"", "file.empty"),
        ("blank.jsonl", b"\n\n  \n", "file.empty"),
        ("table.xlsx", b"PK\x03\x04", "file.binary"),
        ("latin.jsonl", b'{"prompt": "caf\xe9", "completion": "x"}', "encoding.utf8"),
    ],
)
def test_invalid_data_files_are_rejected(
    tmp_path: Path,
    luthier_home: Path,
    tiny_model_folder: Path,
    name: str,
    content: bytes,
    rule: str,
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = Answer("tune", str(path), "--base", str(tiny_model_folder)).refused()
    assert str(path) in message
    assert f"[{rule}]" in message
    assert "Fix: " in message
    assert files_in(luthier_home) == []


def test_problems_of_same_cause_are_grouped(tmp_path: Path, tiny_model_folder: Path) -> None:
    path = jsonl(tmp_path / "bad.jsonl", *["{" for _ in range(50)])
    answer = Answer("tune", str(path), "--base", str(tiny_model_folder), "--json")
    assert answer.refused().count("[json.invalid]") == 1
    assert "2, 3, 4 and 46 more" in answer.err
    assert len(answer.json()["error"]["problems"]) == 50


@pytest.mark.parametrize(
    ("more", "kind", "text"),
    [
        (["--base", "no-such-model"], "UnknownModel", "no-such-model"),
        (["--base", "./no/such/folder"], "UnknownModel", "no/such/folder"),
        (["--base", "tiny-llama:none"], "UnknownModel", "tiny-llama:none"),
        (["--set", "adaptation.rnk=8"], "RecipeError", "did you mean `adaptation.rank`?"),
        (["--set", "nonsense"], "RecipeError", "KEY=VALUE"),
        (
            ["--adaptation", "lorra"],
            "RecipeError",
            "did you mean lora?",
        ),
        (["--epochs", "0"], "RecipeError", "training.epochs"),
        (["--epochs", "inf"], "RecipeError", "training.epochs"),
        (["--name", "No Good"], "RecipeError", "lower-case"),
        (["--validation", "none.jsonl"], "DataError", "file.missing"),
    ],
)
def test_tune_rejects_invalid_options(
    data: Path,
    luthier_home: Path,
    tiny_model_folder: Path,
    more: list[str],
    kind: str,
    text: str,
) -> None:
    base = [] if "--base" in more else ["--base", str(tiny_model_folder)]
    answer = Answer("tune", str(data), *base, *more, "--json")
    assert text in answer.refused()
    assert answer.json()["error"]["type"] == kind
    assert answer.err.startswith("luthier: ")
    assert "Traceback" not in answer.err
    assert files_in(luthier_home) == []


def test_unwritable_store_is_an_error(
    data: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "file"))
    message = Answer("tune", str(data), "--base", str(tiny_model_folder)).refused(1)
    assert str(tmp_path / "file") in message


def test_interrupt_before_training_leaves_no_files(
    data: Path, tiny_model_folder: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.engine import job

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "prepare", interrupt)
    answer = Answer("tune", str(data), "--base", str(tiny_model_folder), "--json")
    answer.refused(130)
    assert answer.out == ""
    assert files_in(luthier_home) == []


def test_interrupt_during_training_exits_with_130(
    data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    command = memorise(tiny_model_folder, data, "x", "full", 0.001)
    process = start(tmp_path, *command, "--set", "training.max_steps=100000")
    metrics = tmp_path / "runs" / "tiny-llama" / "x" / "metrics.jsonl"
    end = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "--resume" in err
    assert "Traceback" not in err


def test_interrupted_run_is_listed_and_shown(
    data: Path, tiny_model_folder: Path, luthier_home: Path
) -> None:
    run = Run(str(tiny_model_folder), "x")
    run.begin({}, resume=False)
    Run("tiny-llama", "job-1").begin({}, resume=False)  # the service resumes this run itself
    with run.lock():
        assert run.model_id in Answer("models", "show", run.model_id).refused()
        assert Answer("models", "list", "--json").good().json()["unfinished"] == []
    refusal = Answer("models", "show", run.model_id).refused()
    assert "--resume" in refusal and f"luthier models remove {run.model_id}" in refusal
    (listed,) = Answer("models", "list", "--json").good().json()["unfinished"]
    assert listed["id"] == run.model_id
    assert run.model_id in Answer("models", "list").good().out
    for asked in (run.model_id, "x", f"{run.model_id}2"):
        refusal = Answer("generate", asked, "Hi").refused()
        assert run.model_id in refusal
        assert "luthier tune … --resume" in refusal and "job-1 " not in refusal
    Answer("models", "remove", run.model_id).good()
    assert run.model_id not in Answer("models", "list").good().out
    gone = Answer("models", "show", run.model_id, "--json")
    assert "--resume" not in gone.refused() and gone.json()["error"]["type"] == "UnknownModel"


@pytest.mark.slow
def test_invalid_data_is_rejected_before_torch_import(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", *ROWS, "{", *ROWS, "[]")
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom luthier.cli.app import app\n"
        f"done = CliRunner().invoke(app, ['tune', {str(data)!r}])\n"
        "print(done.exit_code, 'torch' in sys.modules, done.output)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("2 False"), done.stdout + done.stderr
    assert f"{data}:5: [json.invalid]" in done.stdout and f"{data}:10: [json." in done.stdout


FOUND = Comparison(
    "accuracy",
    200,
    1800,
    [
        Baseline("always the most frequent label", 0.25, {"accuracy": 0.25}, 0.0, constant=True),
        Baseline("naive Bayes on words", 0.735, {"accuracy": 0.735}, 0.31),
    ],
    0.485,
    ["logistic regression on the base model"],
)


def comparison_lines(found: Comparison | None, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_comparison(found)
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_comparison_lines_are_sorted_by_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    said = comparison_lines(replace(FOUND, verdict=FOUND.judge()), capsys)
    assert said[0].startswith("on 200 held-out rows, ")
    assert [line.split()[1] for line in said[1:4]] == ["73.5%", "48.5%", "25.0%"]
    assert "naive Bayes on words  (0.3 s)" in said[1] and said[2].endswith("this model")
    assert said[4].endswith(": logistic regression on the base model")
    assert len(said) == 5  # the result begins with the verdict
    chance = replace(FOUND, baselines=[replace(each, error=0.2) for each in FOUND.baselines])
    verdict = " ".join(comparison_lines(replace(chance, verdict=chance.judge()), capsys)[5:])
    assert "naive Bayes on words" in verdict and "73.5%" in verdict and "48.5%" in verdict


def test_comparison_prints_no_warning_if_model_wins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(comparison_lines(replace(FOUND, tuned=0.9), capsys)) == 5
    print_comparison(FOUND, is_refit=True)  # the stored weights were not measured
    out = capsys.readouterr().out
    assert "the training before the refit" in out and "this model" not in out
    assert not comparison_lines(replace(FOUND, tuned=None), capsys)
    assert not comparison_lines(None, capsys)


def test_fit_without_steps_prints_threshold_and_no_plan(luthier_home: Path, tmp_path: Path) -> None:
    rows = [f"{n},{n % 7},{n % 5}" for n in range(120)]
    series = tmp_path / "series.csv"
    series.write_text("\n".join(["time,level,flow", *rows]))
    answer = Answer("tune", str(series), "--base", "z-score", "--name", "pump")
    assert answer.code == 0, answer.err
    assert "objective.threshold=3" in answer.err and "training.refit" in answer.err
    assert "training.epochs" not in answer.err and "objective.columns=level, flow" in answer.err
    assert "loss.png" not in answer.out and "training loss" not in answer.out
    options = ("--epochs", "9", "--objective", "vae", "--set", "objective.false_alarms=0.5")
    answer = Answer("tune", str(series), "--base", "z-score", "--name", "loud", *options)
    assert "`training.epochs`" in answer.err and "objective.threshold=3" not in answer.err


def test_fitted_base_learns_all_rows(
    luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification, "PROBED_ROWS", 10)
    rows = [{"text": f"{'good' if n % 2 else 'bad'} day {n}", "label": n % 2} for n in range(60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = Answer("tune", str(data), "--base", "tfidf", "--name", "all")
    assert answer.code == 0 and "regression on 60 rows" in answer.err, answer.err
    assert "logistic regression on words (TF-IDF)" not in answer.out
