"""Report of the data checks as one HTML page.

This module selects the contents. ``templates/report.html`` has the markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier.formatting import command_option, map_code
from luthier.gate.histogram import density
from luthier.gate.report import (
    Report,
    format_number,
    has_content,
    learned_share,
    learning_splits,
    list_places,
    list_values,
    next_steps,
    severities,
    shown_place,
    token_runs,
    verdict_line,
)
from luthier.gate.rules import SEVERITIES, Place, Rule
from luthier.pages import PAGE, Table, render_page

PLACES = 25
"""Number of places per rule on the page. The JSON report has all stored places."""
OPEN = 2
"""Number of rows per split with visible tokens. Additional rows are collapsed."""
LONGEST = 10
"""Number of longest rows."""
MOST_COUNTS = 200
"""Number of counts per summary, largest first."""
COUNTS = 12
"""Number of counts before the rest is collapsed."""
ITEMS = 25
"""Number of values of a list in a summary."""
VERDICTS = {"passed": "Passed", "warnings": "Passed, with warnings", "refused": "Refused"}

SummaryPart = tuple[str, Any]
"""Part of a summary: kind and template data."""


def page(report: Report, layout: str = PAGE) -> str:
    """The whole page."""
    tokens = learning_splits(report)
    count, found = severities(report), report.findings
    return render_page(
        "luthier.gate",
        "report.html",
        layout,
        report=report,
        version=__version__,
        name=", ".join(Path(file).name for file in report.files.get("train", ())) or "data",
        verdict=VERDICTS[report.verdict],
        verdict_line=verdict_line(report),
        steps=next_steps(report),
        facts=_facts(report),
        rules=[_rule(report, rule) for rule in found.rules()],
        severities=[(name, count[name]) for name in reversed(SEVERITIES) if count[name]],
        seen=[(split, [_row(row, shown_place(report, split, row)) for row in each["shown"]])
              for split, each in tokens.items() if each["shown"]],
        open_rows=OPEN,
        lengths=list(_lengths(report)),
        length_table=_length_table(report),
        longest=_longest_rows(report),
        summaries=[
            (name, _title(name), list(_summary(each, _title(name))))
            for name, each in report.summaries.items()
            if name != "learning" and has_content(each)
        ],
        checks=", ".join(report.summaries) or "reading only",
    )  # fmt: skip


def _facts(report: Report) -> Iterator[tuple[str, str, str]]:
    for split, rows in report.rows.items():
        yield f"{split} rows", f"{rows:,}", report.forms.get(split, "")
    summary = report.summaries.get("learning", {})
    if report.task:
        yield "objective", report.task, ""
    splits = learning_splits(report)
    if tokens := sum(each["tokens"] for each in splits.values()):
        shares = dict.fromkeys(learned_share(each) for each in splits.values())
        yield "tokens", f"{tokens:,}", f"learned: {', '.join(shares)}"
        longest = max(each["lengths"]["max"] for each in splits.values())
        yield "longest row", f"{longest:,}", f"of {summary['context']:,} tokens read"


def _rule(report: Report, rule: Rule) -> dict[str, Any]:
    found = report.findings
    shown = found.examples[rule.id][:PLACES]
    columns = {"place": "place", "what is there": "text"}
    if any(each.excerpt for each in shown):
        columns["the row"] = "text"
    if any(each.others for each in shown):
        columns["with"] = "text"
    # A column of the same fix in each row would repeat the fix above the table.
    if {each.fix for each in shown} - {"", rule.fix}:
        columns["fix"] = "text"
    cells = [
        {
            "place": each.place,
            "what is there": each.message,
            "the row": each.excerpt,
            "with": list_places(each.others, 8),
            "fix": map_code(each.closest_fix, command_option),
        }
        for each in shown
    ]
    facts = {"why": rule.why, "fix": map_code(rule.fix, command_option)}
    return {
        "rule": rule,
        "severity": found.severity(rule),
        "count": found.counts[rule.id],
        "facts": [(name, text) for name, text in facts.items() if text],
        "places": Table.of(
            f"Places of {rule.id}",
            columns,
            [[row[name] for name in columns] for row in cells],
            found.counts[rule.id] - len(shown),
        ),
    }


def _row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    source = row["source"]
    return {
        "place": place,
        "tokens": len(row["tokens"]) + len(source),
        "source": token_runs(source, [False] * len(source)),
        "runs": token_runs(row["tokens"], row["learned"]),
        "taught": row["taught"],
    }


def _lengths(report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    context = report.summaries.get("learning", {}).get("context", 0)
    for split, found in learning_splits(report).items():
        lengths = found["lengths"]
        if lengths.get("bars"):
            marks = {"median": lengths["p50"], "95 %": lengths["p95"], "99 %": lengths["p99"]}
            marks |= {"context": context} if context <= lengths["max"] else {}
            title = f"Tokens of {lengths['count']:,} rows of {split}, median {lengths['p50']:,}"
            yield split, draw_histogram(lengths["bars"], marks, title, "tokens")


def _length_table(report: Report) -> Table:
    keys = {"rows": "count", "shortest": "min", "5 %": "p5", "median": "p50", "mean": "mean",
            "95 %": "p95", "99 %": "p99", "longest": "max"}  # fmt: skip
    rows = [
        [split, *(f"{found['lengths'][key]:,}" for key in keys.values())]
        for split, found in learning_splits(report).items()
    ]
    return Table.of(
        "Tokens of a row by split", {"split": "name"} | dict.fromkeys(keys, "number"), rows
    )


def _longest_rows(report: Report) -> Table | None:
    longest = [row for found in learning_splits(report).values() for row in found["longest"]]
    longest.sort(key=lambda row: -row["tokens"])
    rows = [
        [
            Place.of(row),
            f"{row['tokens']:,}",
            f"{row['learned']:,}",
            row["begins"],
        ]
        for row in longest[:LONGEST]
    ]
    columns = {"place": "place", "tokens": "number", "learned": "number", "begins": "text"}
    return Table.of("The longest rows", columns, rows) if rows else None


def _summary(value: Mapping[str, Any], title: str) -> Iterator[SummaryPart]:
    """Any check's summary, by the rules of :meth:`luthier.gate.check.Check.summary`."""
    rest = dict(value)
    if isinstance(rest.get("bars"), list):
        names = {"p50": "median", "p95": "95 %", "p99": "99 %"}
        marks = {names[key]: rest[key] for key in names if key in rest}
        yield "histogram", draw_histogram(rest["bars"], marks, title, "")
        return
    if isinstance(rest.get("counts"), Mapping):
        counts, of = rest.pop("counts"), rest.pop("of", "")
        yield from _counts(counts, f"{title}, {of}" if of else title)
    splits = rest.pop("splits", None)
    plain = {key: each for key, each in rest.items() if not isinstance(each, Mapping | list)}
    if plain:
        lines = [
            [(_title(key), "name"), (format_number(each, key), _kind(each))]
            for key, each in plain.items()
        ]
        yield "table", Table(title, (), lines)
    for key, each in rest.items():
        if key not in plain and each:
            yield "heading", _title(key)
            if isinstance(each, Mapping):
                yield "inside", list(_summary(each, _title(key)))
            else:
                yield "text", list_values(each, ITEMS)
    if isinstance(splits, Mapping):
        yield (
            "splits",
            [(split, list(_summary(each, f"{title}, {split}"))) for split, each in splits.items()],
        )


def _title(key: str) -> str:
    words = key.replace("_", " ")
    return words[:1].upper() + words[1:]


def _kind(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else "text"


def _counts(counts: Mapping[str, int], title: str) -> Iterator[SummaryPart]:
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])[:MOST_COUNTS]
    most, total, kinds = max(counts.values(), default=1) or 1, sum(counts.values()), len(counts)
    rows = [
        [name, f"{count:,}", f"{count / (total or 1):.1%}",
         f"{max(count / most * 100, 0.5) if count > 0 else 0:.2f}"]
        for name, count in ordered
    ]  # fmt: skip
    columns = {
        f"{kinds:,} kind{'s' * (kinds != 1)}": "text",
        "rows": "number",
        "share": "number",
        "": "bar",
    }
    further = kinds - len(rows)
    yield "table", Table.of(title, columns, rows[:COUNTS], 0 if rows[COUNTS:] else further)
    if rows[COUNTS:]:
        yield "folded", Table.of(f"{title}, the rest", columns, rows[COUNTS:], further)


def draw_histogram(
    bars: Sequence[Mapping[str, int]], marks: Mapping[str, int], title: str, unit: str
) -> dict[str, Any]:
    """Return the geometry of a histogram: a log axis, areas that are counts, a line at each mark.

    Args:
        bars: as returned by :meth:`luthier.gate.histogram.Histogram.plain`.
        marks: name and value of lines, such as the median.
        title: accessible description.
        unit: unit of the values.
    """
    width, height, left, top = 640, 150, 8, 24
    right, floor = width - left, height - 24
    # Plus 1, because a row can have no token.
    low = math.log(bars[0]["from"] + 1)
    high = max(math.log(bars[-1]["to"] + 2), low + 0.1)
    highest = max(map(density, bars)) or 1.0

    def x(value: float) -> float:
        return left + (right - left) * (math.log(value + 1) - low) / (high - low)

    drawn = []
    for bar in bars:
        # Bars differ in width, so areas and not heights are the counts.
        tall = (floor - top) * density(bar) / highest
        span = f"{bar['from']:,}" + (f"–{bar['to']:,}" if bar["to"] > bar["from"] else "")
        start = x(bar["from"])
        drawn.append(
            {
                "x": f"{start:.1f}",
                "y": f"{floor - tall:.1f}",
                "width": f"{max(x(bar['to'] + 1) - start - 1, 0.5):.1f}",
                "height": f"{tall:.1f}",
                "title": f"{span} {unit}: {bar['count']:,} rows",
            }
        )
    lines: list[dict[str, Any]] = []
    free = 0.0
    for name, value in sorted(marks.items(), key=lambda pair: pair[1]):
        if x(value) > width:
            continue
        at, text = x(value + 0.5), f"{name} {value:,}"
        # Estimated width of a character: a page without scripts cannot measure text.
        wide = 7.4 * len(text)
        start = min(max(at - wide / 2, 0), width - wide)
        fits = start >= free  # a name that would touch the one before is left out
        lines.append({"x": f"{at:.1f}", "name": text, "name_x": f"{start:.1f}" if fits else None})
        free = start + wide + 8 if fits else free
    return {
        "title": title,
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "floor": floor,
        "bars": drawn,
        "marks": lines,
        "least": f"{bars[0]['from']:,}",
        "most": f"{bars[-1]['to']:,} {unit}",
    }
