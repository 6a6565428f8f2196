"""Cleaning plans from Python and TOML, and errors in plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier.cli.app import app
from luthier.errors import RecipeError
from luthier.gate.clean_plan import CleaningPlan
from luthier.gate.edits import EDITS
from luthier.gate.rules import READING_RULES


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({}, None),
        ({"drop": ["duplicate.nere"]}, None),
        ({"drop": ["label.imbalance"]}, None),
        ({"drop": ["leakage.many"]}, None),
        ({"drop": ["file.empty"]}, None),
        ({"drop": ["row.too_long"]}, None),
        ({"redact": ["names"]}, None),
        ({"dedup": "near"}, "dedup"),
    ],
)
def test_invalid_cleaning_plan_is_refused(fields: dict[str, Any], setting: str | None) -> None:
    with pytest.raises(RecipeError) as refused:
        CleaningPlan.of(fields)
    assert (refused.value.rule, refused.value.setting) == ("clean.plan", setting)


def test_names_stand_for_rules() -> None:
    plan = CleaningPlan.of(
        {"drop": ["unreadable", "leakage.*", "duplicate.near"], "dedupe": "near"}
    )
    assert plan.refused_rules == {name for name, rule in READING_RULES.items() if not rule.whole}
    assert plan.dropped_rules == (
        "leakage.exact", "leakage.input", "leakage.near", "duplicate.near", "duplicate.exact"
    )  # fmt: skip
    assert plan.needs_held_out and plan.edits == ()


def test_every_edit_is_a_field_of_the_plan() -> None:
    assert set(EDITS) <= set(CleaningPlan.model_fields)
    every = {
        "normalize": True,
        "merge_labels": True,
        "redact": ["all"],
        "relabel": {"1": "a"},
    }
    assert CleaningPlan.of(every).edits == tuple(EDITS)


def test_options_override_plan_file(tmp_path: Path) -> None:
    plan = tmp_path / "clean.toml"
    plan.write_text('normalize = true\ndedupe = "near"\ndrop = ["unreadable"]\n')
    rows = [{"text": f"{word} of {n}", "label": "ab"[n % 2]} for n, word in enumerate("pqrstuvw")]
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "{\n")
    arguments = [
        "clean",
        str(source),
        str(target),
        "--plan",
        str(plan),
        "--dedupe",
        "exact",
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert body["dropped"] == {"json.invalid": 1} and body["rows_out"] == 8
    assert CliRunner().invoke(app, arguments).exit_code == 2  # the target is there
    shown = CliRunner().invoke(app, [*arguments[:-1], "--overwrite", "--dry-run"])
    assert shown.exit_code == 0 and "8 rows" in " ".join(shown.stdout.split())
    bad = CliRunner().invoke(app, [*arguments[:3], "--drop", "nothing.such"])
    assert bad.exit_code == 2 and "nothing.such" in bad.output
