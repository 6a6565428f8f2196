"""``luthier inspect``: printed report and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import ROWS, Answer, jsonl

from luthier.errors import DownloadError

ANY_NUMBER = ("--severity", "rows.few=off")
"""Options that disable the finding for few rows."""


def test_inspect_shows_the_learned_tokens(tmp_path: Path, tiny_model_folder: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "say [bold]x[/bold] [/oops]", "completion": "yes"},
        {"prompt": "again", "completion": "no"},
    )
    base = ["--base", str(tiny_model_folder), *ANY_NUMBER]
    text = Answer("inspect", str(path), *base, "--rows", "2").good().out
    assert "2 rows" in text
    assert "[bold]x[/bold] [/oops]" in text.replace("\n", "")
    assert "yes<|im_end|>" in text
    assert "line 2" in text
    assert "line 2" not in Answer("inspect", str(path), *base).good().out
    assert "luthier tune" in text.splitlines()[-1]
    report = Answer("inspect", str(path), *base, "--json").good().json()
    assert (report["verdict"], report["exit_code"], report["rows"]) == ("passed", 0, {"train": 2})
    learning = report["summaries"]["learning"]
    assert learning["context"] == 1024
    train = learning["splits"]["train"]
    assert train["tokens"] > train["lengths"]["max"] > train["learned_tokens"] > 4


def test_suggested_tune_command_includes_column_options(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "b.jsonl",
        {"sentence": "good", "class": "a"},
        {"sentence": "bad", "class": "b"},
    )
    named = ["--map", "text=sentence", "--map", "label=class"]
    out = Answer("inspect", str(path), "--validation", str(path), *named, "--base", "none").out
    last = next(line for line in out.splitlines() if "luthier tune" in line)
    assert " ".join([str(path), "--validation", str(path), *named]) in last


def test_inspect_exit_code_follows_severity(tmp_path: Path, tiny_model_folder: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "one", "completion": "yes"},
        {"prompt": "long " * 1100, "completion": "no"},
        {"prompt": "three", "completion": "no"},
    )
    base = ["inspect", str(path), "--base", str(tiny_model_folder), *ANY_NUMBER]
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
    assert "policy.fixed" in Answer(*base, "--severity", "json.invalid=off").refused()
    assert "'x'" in Answer(*base, "--skip", "x").refused()
    path.write_text("{")
    answer = Answer(*base, "--json")
    assert answer.code == 2
    assert [rule["rule"] for rule in answer.json()["rules"]] == ["json.invalid"]


def test_inspect_works_without_a_model(tmp_path: Path, luthier_home: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *ROWS)
    few = Answer("inspect", str(path), "--base", "none")
    assert few.code == 1 and "rows.few" in few.out and "46 rows" in " ".join(few.out.split())
    answer = Answer("inspect", str(path), "--base", "none", *ANY_NUMBER).good()
    left_out = "not checked: learning, white_space (needs a base model)"
    assert "4 rows" in answer.out and left_out in answer.out
    assert not luthier_home.exists()


def test_inspect_warns_if_default_model_download_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: Any) -> None:
        raise DownloadError("there is no network")

    monkeypatch.setattr("luthier.library.models.pull", offline)
    path = jsonl(tmp_path / "a.jsonl", *ROWS)
    answer = Answer("inspect", str(path))
    assert answer.code == 1
    assert "base.missing" in answer.out and "there is no network" in answer.out
    assert "no network" in Answer("inspect", str(path), "--base", "all-minilm-l6-v2").refused(1)


def test_inspect_writes_html_report(tmp_path: Path, tiny_model_folder: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *ROWS)
    page = tmp_path / "new" / "report.html"
    base = ["--base", str(tiny_model_folder), *ANY_NUMBER]
    Answer("inspect", str(path), *base, "--html", str(page)).good()
    assert "<mark>blue&lt;|im_end|&gt;</mark>" in page.read_text()
    assert "is a folder" in Answer("inspect", str(path), "--html", str(tmp_path)).refused()
