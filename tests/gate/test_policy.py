"""A policy names rules that there are, and cannot make rows trainable that cannot be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.errors import RecipeError
from luthier.gate.policy import GatePolicy, load_policy, parse_policy, parse_severity, read_policy


def test_names_may_be_nested_as_toml_nests_them(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(
        'skip = ["learning"]\n[severity]\nrow.too_long = "note"\n"base.missing" = "off"'
    )
    found = read_policy(file)
    assert found.severity == {"row.too_long": "note", "base.missing": "off"}
    assert found.skip == {"learning"}
    both = load_policy(file, {"row.too_long": "error"})
    assert both.severity["row.too_long"] == "error" and both.skip == {"learning"}


def test_a_star_means_every_rule_that_may_be_decided() -> None:
    assert set(parse_policy({"row.*": "off"}).severity) == {"row.too_long"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"row.too_long": "fatal"}, "one of off, note, warning, error"),
        ({"row.to_long": "off"}, "did you mean row.too_long"),
        ({"zzz.*": "off"}, "no rule"),
        ({"field.empty": "warning"}, "stays an error"),
        ({"row.template": "off"}, "stays an error"),
        ({"label.unseen": "off"}, "stays an error"),
    ],
)
def test_what_cannot_be_decided_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_policy(fields)


@pytest.mark.parametrize(
    ("text", "said"),
    [("skip = 3", "array"), ("a = 1", "'a'"), ("[", "not valid"), ('skip = ["x"]', "no check 'x'")],
)
def test_a_file_that_is_no_policy_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_policy(tmp_path / "policy.toml")


def test_an_option_needs_both_sides() -> None:
    assert parse_severity("row.too_long = off") == {"row.too_long": "off"}
    with pytest.raises(RecipeError, match="RULE="):
        parse_severity("row.too_long")
    assert GatePolicy().severity == {}
