"""The whole command line: help, wrong usage, and separate output streams."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import Answer, start

from luthier.cli.app import PANELS
from luthier.cli.terminal.bridge import MORE, MOVED


def test_version_and_help() -> None:
    import luthier

    assert Answer("--version").good().out == f"{luthier.__version__}\n"
    text = Answer("--help").good().out
    for command in ("tune", "inspect", "generate", "chat", "evaluate", "examples", "models"):
        assert f"\n  {command} " in text
    text = Answer("models", "--help").good().out
    for command in ("list", "show", "pull", "export", "remove"):
        assert f"\n  {command} " in text


@pytest.mark.parametrize("group", [[], ["models"], ["admin", "models"]])
def test_command_help_is_not_truncated(group: list[str]) -> None:
    text = Answer(*group, "--help").good().out
    assert "..." not in text.partition("--help")[2]
    assert all(len(line) <= 80 for line in text.splitlines())
    if not group:
        panels = [line[:-1] for line in text.splitlines() if line.endswith(":")]
        assert panels[1:] == [*PANELS] and "\n  worker " not in text  # hidden
        assert sum(len(rows) for panel, rows in PANELS.items() if panel != MORE) <= 24


@pytest.mark.parametrize("name", MOVED)
def test_former_command_names_new_command(name: str) -> None:
    assert f"luthier {MOVED[name]}" in Answer(name, "x").refused()


@pytest.mark.parametrize("columns", [60, 80])
def test_help_is_as_wide_as_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (["study"], ["serve"], ["models", "export"]):
        out, _ = start(tmp_path, *command, "--help").communicate(timeout=120)
        lines = out.splitlines()
        assert columns - 25 < max(map(len, lines)) <= columns


def test_help_shows_option_types_and_bounds() -> None:
    text = Answer("study", "--help").good().out
    assert re.search(r"--search <int> .*x>=1\]", text, re.DOTALL)
    assert "--vary <str> " in text and "--long-rows <error|drop|truncate>" in text
    text = Answer("serve", "--help").good().out
    assert "--tls-cert <path> " in text and " range>" not in text and "list[" not in text


@pytest.mark.parametrize("command", [[], ["models"]])
def test_no_command_shows_the_commands(command: list[str]) -> None:
    answer = Answer(*command)
    assert "\n  --help " in answer.out + answer.err
    assert answer.code == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tune", "x.jsonl", "--learning-rat", "1"], "--learning-rat"),
        (["tune"], "data"),
        (["tune", "x.jsonl", "--epochs", "many"], "--epochs"),
        (["tume", "x.jsonl"], "tume"),
        (["models", "delete", "x"], "delete"),
        (["models", "compare", "x", "y"], "Did you mean `luthier compare`?"),
        (["generate"], "model"),
    ],
)
def test_wrong_usage_exits_with_2_and_message(arguments: list[str], text: str) -> None:
    answer = Answer(*arguments)
    assert text in answer.refused()
    assert answer.out == ""


@pytest.mark.slow
def test_subprocess_separates_stdout_and_stderr(home: Path, tmp_path: Path) -> None:
    """The error object goes to standard output, the message to standard error."""
    process = start(home, "generate", "none", "hi", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert list(json.loads(out)) == ["error"]
    assert out.count("\n") == 1
    assert err.startswith("luthier: Unknown model 'none'.")
    assert "Traceback" not in err


def test_closed_stdout_is_not_an_error(home: Path) -> None:
    process = start(home, "models", "list", "--json")
    assert process.stdout and process.stderr
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0, err
    assert err == ""
    process.stderr.close()


def test_single_process_command_rejects_launcher_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    refused = Answer("models", "list", "--json")
    assert "WORLD_SIZE" in refused.refused()
    assert refused.json()["error"]["type"] == "RefusedInput"
