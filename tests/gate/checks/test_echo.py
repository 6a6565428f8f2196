"""Replies that repeat the prompt: file, line and fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.data.rows import Checker
from luthier.gate.checks.echo import REPEATED, Echo
from luthier.gate.report import FIXES
from luthier.gate.scan import inspect_rows

ASKED = "Which river flows through Vienna?"


def lines(*records: dict[str, Any]) -> list[int]:
    """Return the lines with a finding. Each record is a file, so shapes may differ."""
    problems: list[Any] = []
    rows = [Checker("rows.jsonl", problems).row(n, record) for n, record in enumerate(records, 1)]
    assert not problems
    report = inspect_rows({"train": [row for row in rows if row]}, [Echo()])
    assert set(report.findings.examples) <= {REPEATED.id}
    return [each.place.line for each in report.findings.examples.get(REPEATED.id, ())]


def said(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]}


@pytest.mark.parametrize(
    "reply",
    [
        ASKED,
        f"  {ASKED.upper()}\n",
        f"{ASKED} The Danube.",
        "which river flows\n through  vienna? Danube",
    ],
)
def test_replies_repeating_the_prompt_are_found(reply: str) -> None:
    assert lines(
        {"prompt": ASKED, "completion": reply},
        {"prompt": ASKED, "completion": "The Danube."},
        said(ASKED, reply),
        said("Hi", "Hello. What do you want to know?", ASKED, reply),
        said(ASKED, "The Danube.", "Thanks", "Ask again."),
        {"prompt": ASKED, "chosen": reply, "rejected": "The Rhine."},
    ) == [1, 3, 4, 6]


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        ("Hello", "Hello! How can I help?"),  # a greeting
        ("no", "no"),
        (ASKED, "The Danube."),
        (ASKED, f"You ask: {ASKED}"),
        (ASKED, ASKED[:-1]),
        (f"Context.\n{ASKED}", ASKED),
    ],
)
def test_replies_without_full_prompt_have_no_finding(prompt: str, reply: str) -> None:
    assert lines({"prompt": prompt, "completion": reply}) == []


def test_echo_in_unlearned_replies_has_no_finding() -> None:
    copied = said(ASKED, ASKED, "Thanks", "Ask again.")
    copied["messages"][1]["weight"] = 0
    assert (
        lines(
            copied,
            {"prompt": ASKED, "chosen": "The Danube.", "rejected": ASKED},
            {"prompt": ASKED, "completion": ASKED, "label": False},
            {"text": ASKED, "label": ASKED},
            {"text": f"{ASKED} {ASKED}"},
        )
        == []
    )


def test_echo_finding_has_line_and_clean_drops_row(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [(ASKED, "The Danube."), (ASKED, f"{ASKED} The Danube."), ("Who?", "Nobody.")]
    source.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    report = luthier.inspect(source, base=None)
    (found,) = report.findings.examples[REPEATED.id]
    assert (found.place.file, found.place.line) == (str(source), 2)
    assert report.findings.severity(found.rule) == "warning"
    assert FIXES[REPEATED.id] == ("--drop", REPEATED.id)
    cleaned = luthier.clean(source, tmp_path / "clean.jsonl", drop=[REPEATED.id], base=None)
    kept = (tmp_path / "clean.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in kept] == [ASKED, "Who?"]
    assert cleaned
