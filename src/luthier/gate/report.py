"""Report of the data checks: findings, statistics and next steps."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.data.files.sources import stem_of
from luthier.errors import Location, Problem, line_text
from luthier.formatting import column_options, printable
from luthier.gate.check import Split
from luthier.gate.checks import all_rules
from luthier.gate.pii import KINDS
from luthier.gate.rules import (
    MOST_EXAMPLES,
    READING_RULES,
    TOO_LONG,
    Finding,
    Findings,
    Place,
    Rule,
)
from luthier.pages import PAGE, Tabular


@dataclass(repr=False)
class Report(Tabular):
    """Result of the data checks for a data set."""

    files: Mapping[Split, Sequence[str]]
    rows: dict[Split, int]
    findings: Findings
    summaries: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Statistics of each check, by check name."""
    seconds: float = 0.0
    forms: Mapping[Split, str] = field(default_factory=dict)
    """Detected form of the rows by split, from the first row."""
    base: str | None = None
    """Id of the base model that encoded the rows; ``None`` without rows."""
    chat_template: str | None = None
    """Chat template in place of the base model's, as given by the user."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Omitted checks, with reasons."""
    sources: Mapping[Split, str] = field(default_factory=dict)
    """Requested sources by split: files, folders, glob patterns or addresses."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The data's name of each luthier column, as given by the user."""

    def source(self, split: Split) -> str:
        """Return the source of a split for use in a command."""
        return self.sources.get(split) or next(iter(self.files.get(split, ())), "")

    def map_options(self) -> list[str]:
        """Return the options for a command that reads the same columns."""
        return column_options(self.columns)

    @property
    def task(self) -> str:
        """Objective and base model of the rows; empty if the rows, or their targets, are not read."""
        learning = self.summaries.get("learning", {})
        if not learning.get("objective"):
            return ""
        several = ", several labels per row," if learning["several_labels"] else ""
        return f"{learning['objective']}{several} on {self.base}"

    @property
    def exit_code(self) -> int:
        """Exit status: 0 for notes only, 1 for warnings, 2 for errors."""
        return self.findings.exit_code

    @property
    def verdict(self) -> str:
        """``passed``, ``warnings`` or ``refused``."""
        return ("passed", "warnings", "refused")[self.exit_code]

    def summary(self) -> list[str]:
        """Return the verdict and the first findings."""
        found = self.findings
        lines = [f"Inspection {self.verdict}: {verdict_line(self)}"]
        for rule in found.rules()[:4]:
            first = found.examples[rule.id][0]
            count = found.counts[rule.id]
            lines.append(
                f"{found.severity(rule)} {rule.id} ({count:,}): {first.place} {first.message}"
            )
        return lines

    def html(self, layout: str = PAGE) -> str:
        """Return the report as one self-contained page or fragment."""
        from luthier.gate.report_page import page

        return page(self, layout)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the stored findings, with the 0-based index of the row in a file of JSON Lines."""
        found = self.findings
        return [
            {
                "rule": rule.id,
                "severity": found.severity(rule),
                "file": each.place.file,
                "index": each.place.line - 1 if each.place.line else None,
                "message": each.message,
                "fix": each.closest_fix,
            }
            for rule in found.rules()
            for each in found.examples[rule.id]
        ]

    def plain(self) -> dict[str, Any]:
        """The report for JSON."""
        found = self.findings
        fixable = {rule.id for rule in _fixable_rules(self, notes=True)}
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "base": self.base,
            "forms": dict(self.forms),
            "left_out": dict(self.left_out),
            "files": {split: list(files) for split, files in self.files.items()},
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "rules": [
                {
                    "rule": rule.id,
                    "severity": found.severity(rule),
                    "count": found.counts[rule.id],
                    "about": rule.about,
                    "why": rule.why,
                    "fix": rule.fix,
                    "fixable": rule.id in fixable,
                    "places": [each.plain() for each in found.examples[rule.id]],
                }
                for rule in found.rules()
            ],
            "summaries": {name: dict(each) for name, each in self.summaries.items()},
        }


TOKENS = 360
"""Maximum number of tokens shown per row: a third from the start, the rest from the end."""


def short_place(place: Place) -> str:
    """Format a place without the folders of the file."""
    return str(Place(Path(place.file).name, place.line))


def format_number(value: Any, key: str = "") -> str:
    """Format a value of a summary for people. ``key`` is the key of the value."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, int | float) and key.endswith("share") and 0 <= value <= 1:
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def list_values(values: Sequence[Any], count: int) -> str:
    """Format the first ``count`` plain values of a list."""
    more = f" and {len(values) - count:,} more" if len(values) > count else ""
    return ", ".join(format_number(each) for each in values[:count]) + more


def list_places(places: Sequence[Place], count: int) -> str:
    """Format the first ``count`` places. A file name appears once for consecutive lines."""
    parts, file = [], ""
    for each in places[:count]:
        number = line_text(each.line, each.file).rpartition(" ")[2]
        parts.append(short_place(each) if each.file != file else number)
        file = each.file
    more = f" and {len(places) - count:,} more" if len(places) > count else ""
    return ", ".join(parts) + more


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens with equal loss mask."""

    text: str
    learned: bool
    left_out: int = 0
    """Number of omitted tokens at this position."""


def shown_place(report: Report, split: Split, row: Mapping[str, Any]) -> str:
    """Format the line of a shown row, with the file name if the split has several files."""
    place = Place.of(row)
    return short_place(place) if len(report.files[split]) > 1 else line_text(place.line, place.file)


def token_runs(tokens: Sequence[str], learned: Sequence[bool]) -> list[TokenRun]:
    """Group the tokens of a row by loss mask, with the middle of long rows omitted."""
    # The end gets more room than the start, because replies are learned there.
    head, tail = (len(tokens), len(tokens)) if len(tokens) <= TOKENS else (120, len(tokens) - 240)
    found: list[TokenRun] = []
    for start, stop in ((0, head), (tail, len(tokens))):
        if start and start < stop:
            found.append(TokenRun("", False, tail - head))
        for token, taught in zip(tokens[start:stop], learned[start:stop], strict=True):
            if found and found[-1].learned == taught and not found[-1].left_out:
                found[-1] = TokenRun(found[-1].text + token, taught)
            else:
                found.append(TokenRun(token, taught))
    return [TokenRun(printable(run.text), run.learned, run.left_out) for run in found]


def severities(report: Report) -> Counter[str]:
    """Count the findings of each severity."""
    found: Counter[str] = Counter()
    for rule in report.findings.rules():
        found[report.findings.severity(rule)] += report.findings.counts[rule.id]
    return found


def verdict_line(report: Report) -> str:
    """Summarize the findings in one sentence."""
    count = severities(report)
    names = ("error", "warning", "note")
    parts = [f"{count[name]:,} {name}{'s' * (count[name] != 1)}" for name in names if count[name]]
    rows = sum(report.rows.values())
    return f"{', '.join(parts) or 'No findings'} in {rows:,} row{'s' * (rows != 1)}."


def learning_splits(report: Report) -> Mapping[str, Mapping[str, Any]]:
    """Return the statistics of the learning check by split; empty without the check."""
    summary = report.summaries.get("learning", {})
    splits: Mapping[str, Mapping[str, Any]] = summary.get("splits", {})
    return splits


def learned_share(found: Mapping[str, Any]) -> str:
    """Format the share of learned tokens. A target of the whole row is not a share."""
    tokens, learned = found["tokens"], found["learned_tokens"]
    # One learned token for each row and no marked token: the target is a label or a number.
    if learned == found["lengths"]["count"] and not any(
        any(row["learned"]) for row in found["shown"]
    ):
        return "1 a row"
    return f"{learned / tokens:.0%}" if tokens else "–"


def next_steps(report: Report) -> list[tuple[str, str]]:
    """Return the next steps in order: a description, and a command if one applies."""
    cleaning = cleaning_command(report)
    first = [("Write a fixed data set:", cleaning)] if cleaning else []
    return [*first, _training(report)]


def _training(report: Report) -> tuple[str, str]:
    words = ["luthier", "tune", report.source("train")]
    if report.files.get("validation"):
        words += ["--validation", report.source("validation")]
    words += report.map_options()
    if report.base:
        words += ["--base", report.base]
    if report.chat_template:
        words += ["--chat-template", report.chat_template]
    if objective := report.summaries.get("learning", {}).get("objective"):
        words += ["--objective", str(objective)]
    if rate := report.summaries.get("media", {}).get("highest_rate"):
        words += ["--set", f"data.sampling_rate={rate}"]
    typed = shlex.join(words)
    found = report.findings
    errors = {rule.id for rule in found.rules() if found.severity(rule) == "error"}
    # The one error that a setting of the training fixes.
    if errors == {TOO_LONG.id}:
        return "Shorten the long rows, or drop the long rows:", f"{typed} --set data.long_rows=drop"
    rows = report.rows.get("train", 0)
    # A fault of most rows is a fault of the file.
    some = 0 < sum(found.counts[rule] for rule in errors) <= rows
    if some and all(FIXES.get(rule) == _UNREADABLE for rule in errors):
        advice = f"Fix the errors, or keep only the readable rows ({rows:,}):"
        return advice, _clean_command(report, cleaning_options(errors))
    if errors:
        return "Fix the errors, then inspect the data again.", ""
    if report.exit_code:
        return "Check the warnings, then train:", typed
    return "Next:", typed


def has_content(summary: Any) -> bool:
    """Return True if a summary has a number other than 0, or a table."""
    if isinstance(summary, Mapping):
        return any(has_content(each) for each in summary.values())
    if isinstance(summary, list):
        return any(isinstance(each, Mapping) for each in summary)
    return isinstance(summary, int | float) and not isinstance(summary, bool) and summary > 0


_UNREADABLE = ("--drop", "unreadable")
FIXES: Mapping[str, tuple[str, str]] = {
    **{
        rule.id: _UNREADABLE
        for rule in READING_RULES.values()
        if not rule.whole and not rule.id.startswith("window.")  # a series without a line has a gap
    },
    **{f"encoding.{name}": ("--normalize", "") for name in ("control", "invisible", "not_nfc")},
    **{f"{group}.{kind}": ("--redact", kind) for group in ("privacy", "secret") for kind in KINDS},
    **{f"leakage.{name}": ("--drop", "leakage.*") for name in ("exact", "input", "near", "many")},
    **{rule.id: ("--drop", rule.id) for rule in all_rules().values() if rule.drop},
    "duplicate.exact": ("--dedupe", "exact"),
    "duplicate.near": ("--dedupe", "near"),
    "label.spelling": ("--merge-labels", ""),
}
"""Option and value by rule."""

_SAME_ENDING = (".csv", ".tsv", ".parquet", ".txt", ".md")


def cleaning_command(report: Report) -> str:
    """Return the cleaning command that fixes the findings of the training rows; empty without
    fixes."""
    options = cleaning_options(rule.id for rule in _fixable_rules(report))
    return _clean_command(report, options) if options else ""


def _clean_command(report: Report, options: Mapping[str, Iterable[str]]) -> str:
    """Return ``luthier clean`` for the training file with ``options``."""
    source = report.source("train")
    words = ["luthier", "clean", source, target_of(source)]
    for name, value in options.items():
        for each in value:
            words += [name, each] if each else [name]
    if any(each.startswith("leakage.") for each in options.get("--drop", ())):
        for split in report.files:
            if split != "train":
                words += [f"--{split}", report.source(split)]
    return shlex.join(words + report.map_options())


def target_of(source: str) -> str:
    """Return a file name for the cleaned data: next to a source file, or in the working folder."""
    ending = next((each for each in _SAME_ENDING if source.lower().endswith(each)), ".jsonl")
    name = f"{stem_of(source)}-clean{ending}"
    path = Path(source)
    return str(path.with_name(name)) if path.is_file() else name


def _fixable_rules(report: Report, notes: bool = False) -> Iterable[Rule]:
    """Yield the rules with an automatic fix. Notes are left to the user unless ``notes``."""
    found = report.findings
    train = set(report.files.get("train", ()))

    def ours(each: Finding) -> bool:
        return each.place.file in train or each.rule.id.startswith("leakage.")

    for rule in found.rules():
        serious = notes or found.severity(rule) != "note"
        option, value = FIXES.get(rule.id, ("", ""))
        if option == "--drop" and not value.startswith("leakage.") and _drops_much(report, value):
            continue  # a fault of many rows is a fault of the file
        if serious and rule.id in FIXES and any(map(ours, found.examples[rule.id])):
            yield rule


MOST_DROPPED = 0.1
"""Largest share of the training rows that the advised command drops by one rule."""


def _drops_much(report: Report, value: str) -> bool:
    """Return True if ``--drop value`` would remove more than :data:`MOST_DROPPED` of the rows."""
    counts, fixes = report.findings.counts, FIXES.items()
    # All unreadable rules together, because one option drops the rows of all of them.
    unreadable = sum(counts[rule] for rule, (_, each) in fixes if each == "unreadable")
    dropped = unreadable if value == "unreadable" else counts[value]
    return dropped > MOST_DROPPED * (report.rows.get("train", 0) + unreadable)


def cleaning_options(rules: Iterable[str]) -> dict[str, dict[str, None]]:
    """Return the values of each option of ``luthier clean`` that fixes ``rules``, each once."""
    options: dict[str, dict[str, None]] = {}
    for rule in rules:
        name, value = FIXES[rule]
        options.setdefault(name, {})[value] = None
    if "near" in options.get("--dedupe", {}):
        options["--dedupe"] = {"near": None}  # near includes exact copies
    return options


PLACES = 3
"""Number of places per rule in terminal output."""


def refusals(report: Report) -> tuple[list[Problem], bool]:
    """Return the errors as problems, and whether more errors exist than the report stores."""
    found = report.findings
    problems = [
        Problem(rule.id, each.message, each.closest_fix, Location(each.place.file, each.place.line))
        for rule in found.rules()
        if found.severity(rule) == "error"
        for each in found.examples[rule.id]
    ]
    return problems, any(found.counts[problem.rule] > MOST_EXAMPLES for problem in problems)


def warnings(report: Report) -> list[str]:
    """Return the lines to print before training: one line per rule, and the command for details."""
    found = report.findings
    lines, by_row = [], False
    for rule in found.rules():
        if found.severity(rule) != "warning":
            continue
        first = found.examples[rule.id][0]
        if rule.whole:
            where = f"{first.place}: " if first.place.line else ""
            text, fix = f"{where}{first.message}", first.closest_fix
            if (more := found.counts[rule.id] - 1) and len(found.examples[rule.id]) > 1:
                text, fix = (
                    f"{text} {more:,} more finding{'s' * (more > 1)}.",
                    rule.fix or first.fix,
                )
            lines.append(f"warning: [{rule.id}] {text} {fix}".rstrip())
            continue
        by_row = True
        places = [each.place for each in found.examples[rule.id]]
        count = found.counts[rule.id]
        text = f"warning: [{rule.id}] {rule.about} {f'{count:,} times' if count > 1 else 'Once'}: "
        text += f"{list_places(places, PLACES)}." if count <= PLACES else (
            f"{list_places(places[:PLACES], PLACES)}, …"
        )  # fmt: skip
        lines.append(f"{text} {rule.fix or first.fix}".rstrip())
    if by_row:
        words = ["luthier", "inspect", report.source("train")]
        if "validation" in report.sources:
            words += ["--validation", report.source("validation")]
        words += [*report.map_options(), "--html", "report.html"]
        lines.append(f"for all rows, run `{shlex.join(words)}`")
    return lines


def manifest_record(report: Report) -> dict[str, Any]:
    """Return the record for the manifest: count and first places of each rule."""
    found = report.findings
    return {
        "verdict": report.verdict,
        "checks": list(report.summaries),
        "seconds": round(report.seconds, 3),
        "rules": [
            {
                "rule": rule.id,
                "severity": found.severity(rule),
                "count": found.counts[rule.id],
                "first": [str(each.place) for each in found.examples[rule.id][:PLACES]],
            }
            for rule in found.rules()
        ],
    }
