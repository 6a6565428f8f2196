"""What the reports for people have in common: rows that can be shown, and what to look at first."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.inspection import fixes
from luthier.inspection.findings import Finding, Place
from luthier.inspection.inspect import Report
from luthier.inspection.learning import TOO_LONG
from luthier.printable import printable

TOKENS = 360
"""Tokens of a row that are shown at most; a third from its start, the rest from its end."""


def short(place: Place) -> str:
    """A place without the folders of its file."""
    return str(Place(Path(place.file).name, place.line))


def number(value: Any, key: str = "") -> str:
    """A value of a summary for people; ``key`` is what it is called there."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, int | float) and key.endswith("share") and 0 <= value <= 1:
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def listed(places: Sequence[Place], count: int) -> str:
    """The first ``count`` places; a file is named once for lines of it that follow each other."""
    parts, file = [], ""
    for each in places[:count]:
        parts.append(short(each) if each.file != file else str(each.line))
        file = each.file
    more = f" and {len(places) - count:,} more" if len(places) > count else ""
    return ", ".join(parts) + more


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of which all are learned, or none."""

    text: str
    learned: bool
    left_out: int = 0
    """Tokens that stand here in the row and are not shown."""


def runs(tokens: Sequence[str], learned: Sequence[bool]) -> list[Run]:
    """The tokens of a row in as few pieces as they have colours, with the middle of long ones cut."""
    head, tail = (len(tokens), len(tokens)) if len(tokens) <= TOKENS else (120, len(tokens) - 240)
    found: list[Run] = []
    for start, stop in ((0, head), (tail, len(tokens))):
        if start and start < stop:
            found.append(Run("", False, tail - head))
        for token, taught in zip(tokens[start:stop], learned[start:stop], strict=True):
            if found and found[-1].learned == taught and not found[-1].left_out:
                found[-1] = Run(found[-1].text + token, taught)
            else:
                found.append(Run(token, taught))
    return [Run(printable(run.text), run.learned, run.left_out) for run in found]


def worst_rows(report: Report, count: int = 10) -> list[tuple[Place, list[Finding]]]:
    """Rows that break the most rules, of those whose places are kept."""
    rows: dict[Place, dict[str, Finding]] = {}
    for findings in report.findings.kept.values():
        for each in findings:
            if each.place.line:
                rows.setdefault(each.place, {}).setdefault(each.rule.id, each)
    found = [(place, list(each.values())) for place, each in rows.items() if len(each) > 1]
    return sorted(found, key=lambda row: -len(row[1]))[:count]


def severities(report: Report) -> Counter[str]:
    """How many findings there are of each severity."""
    found: Counter[str] = Counter()
    for rule in report.findings.rules():
        found[report.findings.severity(rule)] += report.findings.counts[rule.id]
    return found


def verdict_line(report: Report) -> str:
    """What was found, in one sentence."""
    count = severities(report)
    names = ("error", "warning", "note")
    parts = [f"{count[name]:,} {name}{'s' * (count[name] != 1)}" for name in names if count[name]]
    rows = sum(report.rows.values())
    return f"{', '.join(parts) or 'Nothing wrong'}; {rows:,} row{'s' * (rows != 1)} could be read."


def learned_of(report: Report) -> Mapping[str, Mapping[str, Any]]:
    """What the check of what is learned says of each split; empty where it was not run."""
    summary = report.summaries.get("learning", {})
    splits: Mapping[str, Mapping[str, Any]] = summary.get("splits", {})
    return splits


def learned_share(found: Mapping[str, Any]) -> str:
    """How much of a split is learned; a target of the row as a whole is no share of its tokens."""
    tokens, learned = found["tokens"], found["learned_tokens"]
    if learned == found["lengths"]["count"] and not any(
        any(row["learned"]) for row in found["shown"]
    ):
        return "1 a row"
    return f"{learned / tokens:.0%}" if tokens else "–"


def next_steps(report: Report) -> list[tuple[str, str]]:
    """What to do now, one after the other: in words, and a command to type where there is one."""
    cleaning = fixes.command(report)
    first = [("Write a new data set in which this is mended:", cleaning)] if cleaning else []
    return [*first, _training(report)]


def _training(report: Report) -> tuple[str, str]:
    command = ["luthier", "tune", report.source("train")]
    if report.files.get("validation"):
        command += ["--validation", report.source("validation")]
    if report.base:
        command += ["--base", report.base]
    if objective := report.summaries.get("learning", {}).get("objective"):
        command += ["--objective", str(objective)]
    typed = shlex.join(command)
    found = report.findings
    errors = {rule.id for rule in found.rules() if found.severity(rule) == "error"}
    if errors == {TOO_LONG.id}:
        return "Shorten the long rows, or train without them:", f"{typed} --set data.long_rows=drop"
    if errors:
        return "Mend the errors as their fixes say, then inspect the data again.", ""
    if report.exit_code:
        return "Look at the warnings; where they are as you want them, train:", typed
    return "The data can be trained on:", typed


def says(summary: Any) -> bool:
    """Whether a check's summary holds any number but 0, or a table."""
    if isinstance(summary, Mapping):
        return any(says(each) for each in summary.values())
    if isinstance(summary, list):
        return any(isinstance(each, Mapping) for each in summary)
    return isinstance(summary, int | float) and not isinstance(summary, bool) and summary > 0
