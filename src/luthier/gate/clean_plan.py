"""Cleaning plan: the fixes that a user selects, and the gate rules behind the fixes.

Edits run first, in the order of :data:`luthier.gate.edits.EDITS`, because a fix can make rows
equal. Rules and copies are then judged on the edited rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from luthier.errors import RecipeError
from luthier.gate.check import CheckContext
from luthier.gate.checks import CHECKS, checks_for, rules_named
from luthier.gate.pii import KINDS
from luthier.gate.rules import READING_RULES
from luthier.validation import StrictModel, describe_constraint

UNREADABLE = "unreadable"
"""Name for all reading rules that a single row can break."""
_COPIES: Mapping[str | None, tuple[str, ...]] = {
    None: (),
    "exact": ("duplicate.exact",),
    "near": ("duplicate.exact", "duplicate.near"),
}
LEAKAGE = "leakage."


class CleaningPlan(StrictModel):
    """Fixes of a cleaning. Every fix is off by default."""

    normalize: bool = False
    """Remove control characters, byte order marks and invisible characters; write CRLF as LF;
    convert to NFC."""
    relabel: Mapping[str, str] = Field(default_factory=dict)
    """New label by line or row number of a file, as corrected by a person."""
    merge_labels: bool = False
    """Replace labels that differ in case, white space or punctuation with the most frequent
    spelling."""
    redact: tuple[str, ...] = ()
    """Replace personal data and secrets of these kinds by pseudonyms; `all` for all kinds."""
    drop: tuple[str, ...] = ()
    """Rules of the gate whose rows are removed; `unreadable` for rows that cannot be read."""
    dedupe: Literal["exact", "near"] | None = None
    """Keep only the first of exact copies, or of near-duplicates."""
    base: str | None = None
    """Model for rules that need a tokenizer, such as `row.too_long`."""
    objective: str | None = None
    """Training objective; chosen by the rows by default."""

    @staticmethod
    def of(fields: Mapping[str, Any]) -> CleaningPlan:
        """A plan from plain values; :class:`RecipeError` names each bad field."""
        try:
            return CleaningPlan.model_validate(fields)
        except ValidationError as error:
            found = error.errors()
        lines, first = [], str(found[0]["loc"][0]) if found[0]["loc"] else None
        for item in found:
            # A field of two kinds is named once, without the kind that was tried.
            where = str(item["loc"][0]).replace("_", "-") if item["loc"] else ""
            what = describe_constraint(item)
            if item["type"] == "extra_forbidden":
                what = f"unknown field; choose from {', '.join(CleaningPlan.model_fields)}"
            lines.append(f"{where}: {what}" if where else what)
        raise RecipeError("; ".join(dict.fromkeys(lines)), rule="clean.plan", setting=first)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.edits or self.dropped_rules or self.refused_rules):
            raise ValueError(
                "the plan has no fix; choose from `--normalize`, `--merge-labels`, `--redact`, "
                "`--drop` and `--dedupe`"
            )
        for kind in self.redact:
            if kind not in (*KINDS, "all"):
                raise ValueError(
                    f"redact: unknown kind {kind!r}; choose from all, {', '.join(KINDS)}"
                )
        if not self.base:
            self._check_base()
        return self

    def _check_base(self) -> None:
        _, left_out = checks_for(CheckContext())
        for name in left_out:
            for rule in CHECKS[name].rules:
                if rule.id in self.dropped_rules:
                    raise ValueError(f"drop: {rule.id} needs a base model; set `--base`")

    @property
    def edits(self) -> tuple[str, ...]:
        """Names of the selected edits."""
        asked = {
            "normalize": self.normalize,
            "relabel": self.relabel,
            "merge_labels": self.merge_labels,
            "redact": self.redact,
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    @property
    def refused_rules(self) -> frozenset[str]:
        """Ids of the reading rules whose rows are dropped."""
        return frozenset(rule for rule in self._rules() if rule in READING_RULES)

    @property
    def dropped_rules(self) -> tuple[str, ...]:
        """Ids of the gate rules whose rows are dropped, including copies. The first broken rule
        counts."""
        named = [rule for rule in self._rules() if rule not in READING_RULES]
        return tuple(dict.fromkeys([*named, *_COPIES[self.dedupe]]))

    @property
    def needs_held_out(self) -> bool:
        """True if the plan drops training rows that leak held-out rows."""
        return any(rule.startswith(LEAKAGE) for rule in self.dropped_rules)

    def _rules(self) -> list[str]:
        return list(dict.fromkeys(rule for name in self.drop for rule in _droppable(name)))


def _droppable(name: str) -> list[str]:
    """Return the ids of the rules that ``name`` selects and that apply to single rows."""
    if name == UNREADABLE:
        return [rule.id for rule in READING_RULES.values() if not rule.whole]
    try:
        rules = rules_named(name, also=[UNREADABLE])
    except RecipeError as error:
        raise ValueError(f"drop: {error}") from error
    if all(rule.whole for rule in rules):
        raise ValueError(
            f"drop: {name} is a fault of the whole data set, not of rows. "
            f"{rules[0].fix or 'Fix the file.'}"
        )
    return [rule.id for rule in rules if not rule.whole]
