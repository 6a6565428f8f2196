"""The gate inside a job: rows that are read already, checks that cost little, a few lines to print."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from luthier.data.chat import ChatFormat
from luthier.errors import Problem
from luthier.inspection.check import Known, Split
from luthier.inspection.inspect import Report, inspect_rows
from luthier.inspection.policy import Policy, policy_of, read_policy
from luthier.inspection.shown import listed
from luthier.inspection.table import checks_for
from luthier.objectives import Objective
from luthier.recipe import DataSpec
from luthier.types import Row

PLACES = 3
"""Places of each rule that a job names."""


def inspect_job(
    spec: DataSpec,
    splits: Mapping[Split, Iterable[Row]],
    objective: Objective,
    chat: ChatFormat | None = None,
) -> Report:
    """The checks of each job over its rows; what encoding finds is left to encoding.

    Raises:
        RecipeError: for a policy or severity that cannot be.
    """
    file = read_policy(spec.policy) if spec.policy else Policy()
    decided = file.and_then(policy_of(spec.severity or {}))
    checks, left_out = checks_for(Known(chat, objective), decided.skip, in_jobs=True)
    report = inspect_rows(splits, checks, decided.severity)
    report.left_out = left_out
    return report


def refusals(report: Report) -> list[Problem]:
    """What the gate refuses, as encoding would say it."""
    found = report.findings
    return [
        Problem(each.place.file, each.place.line, rule.id, each.message, each.closest_fix)
        for rule in found.rules()
        if found.severity(rule) == "error"
        for each in found.kept[rule.id]
    ]


def warnings(report: Report, data: str) -> list[str]:
    """What to say before training: a line for each rule, and where to see more."""
    found = report.findings
    lines, by_row = [], False
    for rule in found.rules():
        if found.severity(rule) != "warning":
            continue
        first = found.kept[rule.id][0]
        if rule.whole:
            lines.append(f"warning: [{rule.id}] {first.message} {first.closest_fix}".rstrip())
            continue
        by_row = True
        places = [each.place for each in found.kept[rule.id]]
        count = found.counts[rule.id]
        text = f"warning: [{rule.id}] {rule.about} {f'{count:,} times' if count > 1 else 'Once'}: "
        text += f"{listed(places, PLACES)}." if count <= PLACES else (
            f"{listed(places[:PLACES], PLACES)}, …"
        )  # fmt: skip
        lines.append(f"{text} {rule.fix or first.fix}".rstrip())
    if by_row:
        command = shlex.join(["luthier", "inspect", str(data), "--html", "report.html"])
        lines.append(f"to see all of them, row by row, run `{command}`")
    return lines


def record(report: Report) -> dict[str, Any]:
    """What the manifest keeps: how often each rule was broken, and where first."""
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
                "first": [str(each.place) for each in found.kept[rule.id][:PLACES]],
            }
            for rule in found.rules()
        ],
    }
