"""Policies: known rules only, and rules with a fixed severity."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import RecipeError
from luthier.gate.policy import GatePolicy, load_policy, parse_policy, parse_severity, read_policy


def test_nested_and_quoted_rule_names_are_equal(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(
        'skip = ["learning"]\n[severity]\nrow.too_long = "note"\n"base.missing" = "off"'
    )
    found = read_policy(file)
    assert found.severity == {"row.too_long": "note", "base.missing": "off"}
    assert found.skip == {"learning"}
    both = load_policy(file, {"row.too_long": "error"})
    assert both.severity["row.too_long"] == "error" and both.skip == {"learning"}


def test_star_matches_every_configurable_rule() -> None:
    assert set(parse_policy({"row.*": "off"}).severity) == {"row.too_long", "row.truncated"}


@pytest.mark.parametrize(
    ("name", "severity", "rule"),
    [
        ("row.too_long", "fatal", "recipe.invalid"),
        ("row.to_long", "off", "policy.unknown"),
        ("zzz.*", "off", "policy.unknown"),
        ("field.empty", "warning", "policy.fixed"),
        ("row.template", "off", "policy.fixed"),
        ("label.unseen", "off", "policy.fixed"),
    ],
)
def test_unknown_or_fixed_severity_is_refused(name: str, severity: str, rule: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_policy({name: severity})
    assert (refused.value.rule, refused.value.setting) == (rule, name)


@pytest.mark.parametrize(
    ("text", "setting"),
    [("skip = 3", "skip"), ("a = 1", "a"), ("[", None), ('skip = ["x"]', "skip")],
)
def test_invalid_policy_file_is_refused(tmp_path: Path, text: str, setting: str | None) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(RecipeError) as refused:
        read_policy(tmp_path / "policy.toml")
    assert refused.value.setting == setting


def test_severity_option_needs_name_and_value() -> None:
    assert parse_severity("row.too_long = off") == {"row.too_long": "off"}
    with pytest.raises(RecipeError) as refused:
        parse_severity("row.too_long")
    assert refused.value.setting == "severity"
    assert GatePolicy().severity == {}
