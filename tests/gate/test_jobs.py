"""Data checks of a job: warnings before training, rejection on errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from luthier.engine.metrics import Reporter
from luthier.engine.train import train
from luthier.errors import DataError, RecipeError
from luthier.files import read_json
from luthier.gate import checks as table
from luthier.gate import policy
from luthier.gate.check import BatchLines, Check, RowBatch
from luthier.gate.rules import Finding, Findings, Rule
from luthier.recipe import Recipe
from luthier.types import IntArray

SHOUTS = Rule("shout.loud", "warning", "A prompt shouts.", "Models copy it.", "Lower its case.")


class Shouting(Check):
    """Finds prompts in capitals."""

    name: ClassVar[str] = "shouting"
    rules: ClassVar[tuple[Rule, ...]] = (SHOUTS,)

    def measure(self, batch: RowBatch) -> list[int]:
        return [i for i, row in enumerate(batch.rows) if "".join(row.inputs()).isupper()]

    def collect(self, where: BatchLines, measured: IntArray, findings: Findings) -> None:
        findings.extend(Finding(SHOUTS, where.place(i), f"row {i} shouts") for i in measured)


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def with_shouting(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {"learning": table.CHECKS["learning"], "shouting": Shouting}
    for module in (table, policy):
        monkeypatch.setattr(module, "CHECKS", checks)
    monkeypatch.setattr(table.all_rules, "__defaults__", (checks.values(),))


@pytest.fixture
def fields(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    rows = [{"prompt": "ABC"[n % 3] if n < 12 else "x", "completion": str(n)} for n in range(24)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": str(tiny_model_folder),
        "name": "x",
        "data": {"train": tmp_path / "a.jsonl", "validation_share": 0.0},
        "training": {"max_steps": 1, "threads": 1},
    }


def test_warnings_are_printed_and_stored_with_model(fields: dict[str, Any]) -> None:
    said = Notes()
    result = train(Recipe.parse(fields), reporter=said)
    first, second = [line for line in said.notes if "shout" in line or "inspect" in line]
    assert first == (
        "warning: [shout.loud] A prompt shouts. 12 times: a.jsonl:1, 2, 3, … Lower its case."
    )
    assert "luthier inspect" in second and "--html" in second
    kept = read_json(Path(result.model_dir) / "luthier.json")["data_report"]
    assert kept["verdict"] == "warnings" and kept["checks"] == ["shouting"]
    (rule,) = kept["rules"]
    assert (rule["rule"], rule["severity"], rule["count"]) == ("shout.loud", "warning", 12)
    assert [Path(place).name for place in rule["first"]] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_recipe_severity_turns_warning_into_error(
    fields: dict[str, Any], luthier_home: Path
) -> None:
    fields["data"]["severity"] = {"shout": {"loud": "error"}}
    with pytest.raises(DataError) as refused:
        train(Recipe.parse(fields))
    assert len(refused.value.problems) == 12
    assert str(refused.value.problems[0]).endswith(
        "a.jsonl:1: [shout.loud] row 0 shouts Fix: Lower its case."
    )
    assert not list(luthier_home.rglob("*.safetensors"))


def test_policy_file_applies_to_jobs(fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    (tmp_path / "policy.toml").write_text('[severity]\nshout.loud = "off"')
    recipe.write_text(
        f'base = "{fields["base"]}"\nname = "x"\n[training]\nmax_steps = 1\nthreads = 1\n'
        '[data]\ntrain = "a.jsonl"\nvalidation_share = 0.0\npolicy = "policy.toml"\n'
    )
    said = Notes()
    result = train(Recipe.read(recipe), reporter=said)
    assert not [line for line in said.notes if "shout" in line]
    assert read_json(Path(result.model_dir) / "luthier.json")["data_report"]["rules"] == []


@pytest.mark.parametrize(
    "severity", [{"shout.lout": "off"}, {"shout.loud": "fatal"}, {"row.template": "off"}]
)
def test_invalid_severity_is_refused(fields: dict[str, Any], severity: Any) -> None:
    fields["data"]["severity"] = severity
    with pytest.raises(RecipeError):
        train(Recipe.parse(fields))
