"""Rules with stable ids, and a bounded collection of findings.

This module has the rules of reading and encoding. The rules of a check are in the check's module
(``luthier.gate.checks``). Counts are exact, but only the first findings of each rule are stored. A
file with a fault in every row therefore needs no additional memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.data.rules import PREFERENCE_RULES, PROMPT_RULES, RULES
from luthier.data.unread import CATEGORY, IGNORED, SEVERITY_OF_RULE, UNREAD
from luthier.errors import line_field, location_text, read_line_field

Severity = Literal["note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
SeverityChoice = Severity | Literal["off"]
"""Severity that a policy sets for a rule."""

MOST_EXAMPLES = 100
"""Maximum number of stored findings per rule."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A requirement on the data."""

    id: str
    """Stable; never renamed once released."""
    severity: Severity
    """``error`` refuses the data, ``warning`` does not, ``note`` is worth knowing."""
    about: str
    """Description of the fault, in one sentence."""
    why: str = ""
    """Effect on the model."""
    fix: str = ""
    """How to fix the fault, in one sentence."""
    whole: bool = False
    """True for faults of the data set as a whole, which no removal of rows fixes."""
    drop: bool = False
    """True if cleaning drops the affected rows, because only a person can fix the rows."""


@dataclass(frozen=True, slots=True)
class Place:
    """File and 1-based line or row number of a row. Line 0 means the whole file."""

    file: str
    line: int
    number: int = field(default=-1, compare=False)
    """Number of the row among all rows of all splits, from 0; -1 if unknown."""

    def __str__(self) -> str:
        return location_text(self.file, self.line)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Place:
        """Return the place of a JSON record."""
        return cls(record["file"], read_line_field(record))


@dataclass(frozen=True, slots=True)
class Finding:
    """A place that breaks a rule."""

    rule: Rule
    place: Place
    message: str
    """Description of the fault at this place, in one sentence."""
    fix: str = ""
    """Fix for this place, if more specific than the rule's fix."""
    excerpt: str = ""
    """The text in question, short; secrets are masked."""
    others: tuple[Place, ...] = ()
    """Related rows: the original of a copy, the row with the contradicting label."""

    @property
    def closest_fix(self) -> str:
        """Fix for this place, or the rule's fix."""
        return self.fix or self.rule.fix

    def plain(self) -> dict[str, Any]:
        """Return the finding for JSON."""
        found: dict[str, Any] = {
            "rule": self.rule.id,
            "severity": self.rule.severity,
            "file": self.place.file,
            **line_field(self.place.line),
            "message": self.message,
            "fix": self.closest_fix,
        }
        if self.excerpt:
            found["excerpt"] = self.excerpt
        if self.others:
            found["others"] = [{"file": each.file, **line_field(each.line)} for each in self.others]
        return found


def severity_under(overrides: Mapping[str, SeverityChoice], rule: Rule) -> SeverityChoice:
    """Return the severity of ``rule`` under the severities of a policy."""
    return overrides.get(rule.id, rule.severity)


@dataclass
class Findings:
    """Exact counts per rule, and the first findings of each rule."""

    overrides: Mapping[str, SeverityChoice] = field(default_factory=dict)
    """Severities of a policy that replace the rules' severities."""
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    blamed: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Numbers of each faulty row and its related row (-1 without a related row), by rule, for the rules
    that cleaning drops rows for."""

    def add(self, finding: Finding, times: int = 1, rows: Iterable[int] | None = None) -> None:
        """Count ``finding``, and store the finding if the rule has room.

        Args:
            times: number of faults that the finding represents.
            rows: numbers of the rows to drop, if different from the finding's row: the copies of an
                original, the training rows that leak a test row.
        """
        rule = finding.rule.id
        if severity_under(self.overrides, finding.rule) == "off":
            return
        self.counts[rule] += times
        if rule in self.blamed:
            number = finding.place.number
            if rows is not None:
                self.blamed[rule] += [(row, number) for row in rows]
            elif number >= 0:
                self.blamed[rule].append((number, -1))
        places = self.examples.setdefault(rule, [])
        if len(places) < MOST_EXAMPLES:
            places.append(finding)

    def has_room(self, rule: Rule) -> bool:
        """Return True if the next finding of ``rule`` would be stored."""
        return len(self.examples.get(rule.id, ())) < MOST_EXAMPLES

    def extend(self, findings: Iterable[Finding]) -> None:
        """Add each."""
        for finding in findings:
            self.add(finding)

    def severity(self, rule: Rule) -> Severity:
        """Return the severity of a rule under the policy."""
        chosen = severity_under(self.overrides, rule)
        return rule.severity if chosen == "off" else chosen

    def rules(self) -> list[Rule]:
        """Broken rules, the most serious and then the most frequent first."""
        broken = [places[0].rule for places in self.examples.values()]
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


WHY: Mapping[str, str] = {
    "file": "The file is unreadable.",
    "line": "The line does not fit in memory.",
    "encoding": "Characters would be lost or wrong.",
    "json": "The content of the row is ambiguous.",
    "row": "Input and target of the row are ambiguous.",
    "field": "The input or the target is missing.",
    "id": "Equal ids make answers and findings ambiguous.",
    "messages": "The conversation is missing.",
    "message": "The model's template would render a wrong conversation.",
    "label": "The class is ambiguous.",
    "rating": "The number is missing.",
    "pair": "The model would learn a wrong similarity.",
    "answers": "The model would learn another part of the context.",
    "tags": "Tags would belong to the wrong words.",
}
"""Purpose of the reading rules, by the first part of the id."""


READING_RULES: Mapping[str, Rule] = {
    id_: Rule(
        id_,
        "error",
        about,
        WHY.get(id_.partition(".")[0], ""),
        whole=id_.startswith("file."),
    )
    for id_, about in {**RULES, **PREFERENCE_RULES}.items()
}
"""Rules of reading and of row shapes, by id. All are errors."""

TOO_LONG = Rule(
    "row.too_long",
    "error",
    "The row has more tokens than the model's context.",
    "Truncation would lose the end of the answer.",
    "Shorten the row, or set `data.long_rows=drop` or `data.long_rows=truncate`.",
)
TRUNCATED = Rule(
    "row.truncated",
    "note",
    "The row has more tokens than the model's context, and the end is left out.",
    "Predictions do not depend on the end of the text.",
    "Choose a base model with a longer context, or set `data.long_rows=drop`.",
)
MOSTLY_TRUNCATED = Rule(
    "rows.truncated",
    "warning",
    "At least half of the rows have more tokens than the model's context.",
    "The model learns from the beginnings of the texts, and predicts from the beginning only.",
    "Choose a base model with a longer context, or split the texts into passages.",
    whole=True,
)


def mostly_truncated(truncated: int, rows: int) -> bool:
    """Return whether :data:`MOSTLY_TRUNCATED` applies."""
    return 0 < rows <= 2 * truncated


NOTHING_LEARNED = Rule(
    "row.nothing_learned",
    "error",
    "No token of the row is learned.",
    "The row costs time without effect.",
    "Add a target, or remove the row.",
    drop=True,
)
TEMPLATE = Rule(
    "row.template",
    "error",
    "The model's template rejects the row.",
)
UNKNOWN_TOKEN = Rule(
    "row.token",
    "error",
    "The row has a token of the tokenizer for which the network has no embedding.",
)
SHAPE = Rule("row.objective", "error", "The objective does not support the shape of the row.")
TOO_FEW = Rule(
    "rows.too_few",
    "error",
    "A single labelled row is not enough to learn from.",
    fix="Add rows, ideally fifty or more. Write a single example in the prompt instead.",
    whole=True,
)
ONE_CLASS = Rule(
    "label.one_class",
    "error",
    "All rows have the same label.",
    "The model has nothing to distinguish.",
    "Add rows of the other classes.",
    whole=True,
)
UNSEEN = Rule(
    "label.unseen",
    "error",
    "A label of held-out rows is missing in the training rows.",
    "The model cannot predict an unseen label.",
    "Add training rows with the label, or make the splits with `luthier split`.",
    whole=True,
)
ENCODING_RULES: Mapping[str, Rule] = {
    rule.id: rule
    for rule in (
        TOO_LONG,
        NOTHING_LEARNED,
        TEMPLATE,
        UNKNOWN_TOKEN,
        SHAPE,
        Rule("row.empty", "error", "The text has no tokens.", drop=True),
        TOO_FEW,
        ONE_CLASS,
        UNSEEN,
        Rule(
            "label.mixed",
            "error",
            "Some rows have a label, and some rows an array of labels.",
            whole=True,
        ),
        Rule("rating.constant", "error", "All rows have the same rating.", whole=True),
        *(Rule(id_, "error", about) for id_, about in PROMPT_RULES.items()),
    )
}
"""Rules of objectives for fitting and encoding, by id. All are errors."""


JOINED_ROWS = Rule(
    "table.joined",
    "warning",
    "A quoted cell spans several lines with as many cells as the header.",
    "If the quotes are plain text, one row swallows several rows with labels.",
    'Quote cells that begin with a quote and write " in them as "", or ignore the warning.',
)


UNREAD_COLUMN = Rule(
    UNREAD,
    SEVERITY_OF_RULE[UNREAD],
    "A column that looks like a target, media or a mark is not read.",
    "The model would learn a different task than the rows describe.",
    whole=True,
)
UNREAD_CATEGORY = Rule(
    CATEGORY,
    SEVERITY_OF_RULE[CATEGORY],
    "A column of few values next to a reply or raw text is not read.",
    "If the column belongs to the prompt or is the target, the model does not learn the task.",
    whole=True,
)
IGNORED_COLUMN = Rule(
    IGNORED,
    SEVERITY_OF_RULE[IGNORED],
    "A column that describes the row is not read.",
    whole=True,
)
SPEAKERS = Rule(
    "column.speaker",
    "warning",
    "A table of audio files has a column of speakers, and the split ignores the column.",
    "Training and held-out rows share voices, so the score is too high.",
    "Set `data.group_column` to the column, or evaluate on other speakers.",
    whole=True,
)
UNNAMED_MEDIA = Rule(
    "media.unnamed",
    "warning",
    "The folder contains images or audio files without a row.",
    "The model does not learn from these files.",
    "Add a row for each file, or move the files. To use the class folders, move the table.",
    whole=True,
)
OTHER_SPLITS = Rule(
    "file.splits",
    "warning",
    "A JSON file has several splits, and only the training rows are read.",
    "Held-out rows are taken from the training rows.",
    "Write each split to a file, and name the files with `--validation` and `--test`.",
    whole=True,
)
CUT_ENTITIES = Rule(
    "tags.cut",
    "warning",
    "An entity by characters begins or ends inside a word.",
    "The whole words are learned, also those of shifted positions.",
    "Count characters from 0; the end is exclusive.",
    whole=True,
)
SINGLE_ITEMS = Rule(
    "history.single",
    "note",
    "A user has one item, so no next item, and is left out.",
    whole=True,
)
SCORES = Rule(
    "preference.scores",
    "warning",
    "The chosen answer has a lower score than the rejected answer.",
    "If the answers are swapped, the model learns the worse answer.",
)
DOUBTS: Mapping[str, Rule] = {
    rule.id: rule
    for rule in (
        JOINED_ROWS, UNREAD_COLUMN, UNREAD_CATEGORY, IGNORED_COLUMN, SPEAKERS, UNNAMED_MEDIA,
        OTHER_SPLITS, CUT_ENTITIES, SINGLE_ITEMS, SCORES,
    )
}  # fmt: skip
"""Rules of the reader about rows that are read, by id."""


def rule_of(id_: str) -> Rule:
    """Return the rule of a reading or encoding problem. Objectives may define further rules."""
    known = DOUBTS.get(id_) or READING_RULES.get(id_) or ENCODING_RULES.get(id_)
    return known or Rule(id_, "error", "The objective rejects the row.")
