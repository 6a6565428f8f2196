"""Policy: severities of rules, and checks to omit.

A policy is a TOML file next to the data::

    skip = ["language"]

    [severity]
    "leakage.exact" = "error"
    "privacy.*" = "off"

A name that ends in ``.*`` selects every rule with the prefix. Command line options and recipes
override the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.data.rows import RowReader
from luthier.errors import Problem, RecipeError
from luthier.files import read_toml
from luthier.gate.checks import CHECKS, rules_named
from luthier.gate.rules import (
    DOUBTS,
    ENCODING_RULES,
    READING_RULES,
    SEVERITIES,
    TOO_LONG,
    SeverityChoice,
    severity_under,
)
from luthier.types import dotted_items

_FIXED = {*READING_RULES, *ENCODING_RULES} - {TOO_LONG.id}
"""Rules that make training impossible. For long rows, ``data.long_rows`` decides."""
CHOICES: tuple[str, ...] = ("off", *SEVERITIES)


@dataclass(frozen=True)
class GatePolicy:
    """User settings for rules and checks."""

    severity: Mapping[str, SeverityChoice] = field(default_factory=dict)
    """Severity by rule id."""
    skip: frozenset[str] = frozenset()
    """Names of checks to omit."""

    def refused_columns(self, reader: RowReader) -> list[Problem]:
        """Return the problems of unread columns that refuse the rows, as in the report."""
        return [
            each
            for each in reader.unread_problems()
            if severity_under(self.severity, DOUBTS[each.rule]) == "error"
        ]


def load_policy(
    path: str | Path | None, severity: Mapping[str, Any], skip: Iterable[str] = ()
) -> GatePolicy:
    """Combine the policy file, if given, with options, which override the file.

    Raises:
        RecipeError: invalid policy.
    """
    file = read_policy(Path(path)) if path else GatePolicy()
    options = parse_policy(severity, skip)
    return GatePolicy({**file.severity, **options.severity}, file.skip | options.skip)


def read_policy(path: Path) -> GatePolicy:
    """Parse a TOML file.

    Raises:
        RecipeError: invalid policy.
    """
    fields = read_toml(path, "a policy")
    if unknown := set(fields) - {"severity", "skip"}:
        name = sorted(unknown)[0]
        raise RecipeError(
            f"{path}: unknown key {name!r}; a policy has `severity` and `skip`", setting=name
        )
    severity, skip = fields.get("severity", {}), fields.get("skip", [])
    if not isinstance(severity, dict) or not isinstance(skip, list):
        wrong = "skip" if isinstance(severity, dict) else "severity"
        raise RecipeError(
            f"{path}: `severity` must be a table, and `skip` an array of check names", setting=wrong
        )
    return parse_policy(severity, map(str, skip))


def parse_policy(severity: Mapping[str, Any], skip: Iterable[str] = ()) -> GatePolicy:
    """Parse plain values. Rule ids may be dotted or nested, because TOML allows both."""
    chosen: dict[str, SeverityChoice] = {}
    for name, value in dotted_items(severity):
        if value not in CHOICES:
            raise RecipeError(
                f"{name}: unknown severity {value!r}; choose from {', '.join(CHOICES)}",
                setting=name,
                value=value,
            )
        rules = [rule for rule in rules_named(name) if rule.id not in _FIXED]
        if not rules:
            raise RecipeError(
                f"{name}: the rule is always an error, because training would fail",
                rule="policy.fixed",
                setting=name,
                advice="Fix the rows or remove them.",
            )
        chosen |= dict.fromkeys((rule.id for rule in rules), value)
    skipped = frozenset(skip)
    for name in sorted(skipped - set(CHECKS)):
        raise RecipeError(
            f"{name!r} is not a check. Choose from {', '.join(CHECKS)}", setting="skip", value=name
        )
    return GatePolicy(chosen, skipped)


def parse_severity(text: str) -> dict[str, str]:
    """``RULE=SEVERITY`` of the command line."""
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(
            f"`--severity {text}`: write RULE=LEVEL with the level off, note, warning or error, for "
            "example row.too_long=warning",
            setting="severity",
            value=text,
        )
    return {name.strip(): value.strip()}
