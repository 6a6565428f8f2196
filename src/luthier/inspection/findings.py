"""What a check found: rules with stable ids, and a bounded collection of what broke them.

Counts are exact however much is found; of each rule only the first places are kept, so that a file
in which every row is wrong takes no more memory than one with a few.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")

KEPT = 100
"""Places of one rule that are kept."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that data can do wrong."""

    id: str
    """Stable; never renamed once released."""
    severity: Severity
    """``error`` refuses the data, ``warning`` does not, ``note`` is worth knowing."""
    about: str
    """What breaks the rule, in one sentence."""
    why: str = ""
    """What it does to the model."""
    fix: str = ""
    """How to mend it, in one sentence."""
    aliases: tuple[str, ...] = ()
    """What other validators call it."""
    whole: bool = False
    """Whether it speaks of the data as a whole, so that no row can be removed for it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A row: its file and its 1-based line there; line 0 is the file as a whole."""

    file: str
    line: int
    number: int = field(default=-1, compare=False)
    """Number of the row among all rows of all splits, from 0; -1 where it is not known."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Finding:
    """One place that breaks a rule."""

    rule: Rule
    place: Place
    message: str
    """What is there, in one sentence."""
    fix: str = ""
    """How to mend this one, where it can be said closer than by the rule."""
    excerpt: str = ""
    """The text in question, short; secrets are masked."""
    others: tuple[Place, ...] = ()
    """Further rows that belong to it: the original of a copy, the other label of a text."""

    @property
    def closest_fix(self) -> str:
        """How to mend this one; how to mend any of its rule, where nothing closer can be said."""
        return self.fix or self.rule.fix

    def plain(self) -> dict[str, Any]:
        """The same for JSON."""
        found: dict[str, Any] = {
            "rule": self.rule.id,
            "severity": self.rule.severity,
            "file": self.place.file,
            "line": self.place.line,
            "message": self.message,
            "fix": self.closest_fix,
        }
        if self.excerpt:
            found["excerpt"] = self.excerpt
        if self.others:
            found["others"] = [{"file": each.file, "line": each.line} for each in self.others]
        return found


class Blamed:
    """Rows that break one rule, however many: 16 bytes each."""

    def __init__(self) -> None:
        self.rows = array("q")
        """Numbers of the rows, in the order they were found; one may come twice."""
        self.others = array("q")
        """For each, the number of the other row that it was found with; -1 for none."""

    def add(self, rows: Iterable[int], other: int) -> None:
        """Take in ``rows`` that were found with ``other``."""
        self.rows.extend(rows)
        self.others.extend([other] * (len(self.rows) - len(self.others)))


@dataclass
class Findings:
    """All that was found: how often each rule was broken, and the first places of each."""

    overrides: Mapping[str, Severity | Literal["off"]] = field(default_factory=dict)
    """Severities that a policy sets instead of the rules' own."""
    kept: dict[str, list[Finding]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    blamed: dict[str, Blamed] = field(default_factory=dict)
    """Rules of which every row is remembered, by its number: those that cleaning drops rows for."""

    def add(self, finding: Finding, times: int = 1, rows: Iterable[int] | None = None) -> None:
        """Count ``finding``, and keep it while its rule has room.

        Args:
            finding: what is wrong, and where.
            times: how often the rule is broken by it.
            rows: numbers of the rows without which nothing would be wrong, where that is not the row
                at its place: the copies of an original, the training rows that give a test row away.
        """
        rule = finding.rule.id
        if self.overrides.get(rule) == "off":
            return
        self.counts[rule] += times
        if rule in self.blamed:
            number = finding.place.number
            if rows is not None:
                self.blamed[rule].add(rows, number)
            elif number >= 0:
                self.blamed[rule].add([number], -1)
        places = self.kept.setdefault(rule, [])
        if len(places) < KEPT:
            places.append(finding)

    def keeps(self, rule: Rule) -> bool:
        """Whether a further finding of ``rule`` would be kept, and not only counted."""
        return len(self.kept.get(rule.id, ())) < KEPT

    def extend(self, findings: Iterable[Finding]) -> None:
        """Add each."""
        for finding in findings:
            self.add(finding)

    def severity(self, rule: Rule) -> Severity:
        """How serious a broken rule is, with the policy's word taken."""
        chosen = self.overrides.get(rule.id, rule.severity)
        return rule.severity if chosen == "off" else chosen

    def rules(self) -> list[Rule]:
        """Broken rules, the most serious and then the most frequent first."""
        broken = [places[0].rule for places in self.kept.values()]
        return sorted(
            broken,
            key=lambda rule: (
                -SEVERITIES.index(self.severity(rule)),
                -self.counts[rule.id],
                rule.id,
            ),
        )

    @property
    def worst(self) -> Severity:
        """The most serious severity of all; ``note`` where nothing was found."""
        rules = self.rules()
        return self.severity(rules[0]) if rules else "note"

    @property
    def exit_code(self) -> int:
        """0 for nothing but notes, 1 for warnings, 2 for errors."""
        return SEVERITIES.index(self.worst)
