"""Every proposed fix is a plan that can be carried out, and mends what it was proposed for."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.gate.checks import all_rules
from luthier.gate.clean_plan import CleaningPlan
from luthier.gate.report import FIXES, Report, cleaning_command, target_of
from luthier.gate.rules import Finding, Findings, Place, Rule


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_every_fix_is_of_a_rule_there_is_and_makes_a_plan() -> None:
    rules = all_rules()
    kinds = ("privacy.", "secret.")
    assert not [rule for rule in FIXES if rule not in rules and not rule.startswith(kinds)]
    assert {rule for rule in rules if rule.startswith(kinds)} - {"privacy.unchecked"} <= set(FIXES)
    for name, value in set(FIXES.values()):
        key = name[2:]
        given: Any = [value] if key in ("drop", "redact") else value or True
        CleaningPlan.of({key: given, "base": "any"})


def test_a_rule_that_no_row_can_be_dropped_for_is_not_proposed_to_be_dropped() -> None:
    rules = all_rules()
    dropped = {value for name, value in FIXES.values() if name == "--drop"}
    assert not [name for name in dropped if name in rules and rules[name].whole]


def test_the_command_names_each_fix_once_and_held_out_rows_where_they_are_needed() -> None:
    found = Findings()
    report = Report({"train": ["a.jsonl"], "test": ["t.jsonl"]}, {"train": 2}, found, base="m")
    rules = all_rules()
    assert cleaning_command(report) == ""
    for name in (
        "duplicate.exact",
        "duplicate.near",
        "json.invalid",
        "field.empty",
        "leakage.near",
    ):
        file = "t.jsonl" if name.startswith("leakage") else "a.jsonl"
        found.add(Finding(rules[name], Place(file, 1), "x"))
    found.add(Finding(rules["privacy.email"], Place("t.jsonl", 1), "x"))
    found.add(Finding(rules["length.outlier"], Place("a.jsonl", 1), "x"))
    found.add(Finding(Rule("another.rule", "error", "x"), Place("a.jsonl", 1), "x"))
    words = shlex.split(cleaning_command(report))
    assert words[:4] == ["luthier", "clean", "a.jsonl", "a-clean.jsonl"]
    pairs = {tuple(words[at : at + 2]) for at in range(4, len(words), 2)}
    assert pairs == {
        ("--dedupe", "near"), ("--drop", "unreadable"), ("--drop", "leakage.*"), ("--test", "t.jsonl")
    }  # fmt: skip


def test_nothing_is_dropped_where_no_row_would_be_left() -> None:
    found, rule = Findings(), all_rules()["field.missing"]
    found.add(Finding(rule, Place("a.jsonl", 1), "x"))
    files = {"train": ["a.jsonl"]}
    assert cleaning_command(Report(files, {"train": 0}, found)) == ""
    assert "--drop unreadable" in cleaning_command(Report(files, {"train": 1}, found))


def test_targets_stand_beside_their_file(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", {})
    assert target_of(str(file)) == str(tmp_path / "a-clean.csv")
    assert target_of(str(tmp_path)) == f"{tmp_path.name}-clean.jsonl"
    assert target_of("s3://bucket/rows.json.gz") == "rows-clean.jsonl"


def test_the_command_that_inspect_proposes_runs_and_mends(tmp_path: Path) -> None:
    words = ["river", "stone", "winter", "garden", "morning", "letter", "window"]
    rows: list[Any] = [
        {"text": f"{words[n % 7]} {n} {words[n % 5]} about a {words[n % 3]}", "label": "ab"[n % 2]}
        for n in range(40)
    ]
    held = written(tmp_path / "my test.jsonl", *rows[:2], *rows[38:])
    rows += [
        rows[3],
        {"text": "", "label": "a"},
        {"text": "mail bob@gmail.com\u200b", "label": "a"},
    ]
    source = written(tmp_path / "my rows.jsonl", *rows)
    report = luthier.inspect(source, test=held, base=None)
    typed = cleaning_command(report)
    done = CliRunner().invoke(app, shlex.split(typed)[1:])
    assert done.exit_code == 0, done.output
    target = tmp_path / "my rows-clean.jsonl"
    after = luthier.inspect(target, test=held, base=None)
    assert len(report.findings.rules()) > len(after.findings.rules())
    assert not {rule.id for rule in after.findings.rules()} & set(FIXES) - {"label.imbalance"}
    assert cleaning_command(after) == ""
