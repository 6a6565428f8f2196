"""The report as one HTML page: no script, nothing fetched, everything from the data escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier.gate import svg
from luthier.gate.markup import Markup, element, join
from luthier.gate.report import (
    Report,
    learned_of,
    learned_share,
    listed,
    next_steps,
    runs,
    says,
    severities,
    short,
    verdict_line,
    worst_rows,
)
from luthier.gate.report_style import STYLE
from luthier.gate.report_summary import summary_section, table
from luthier.gate.rules import SEVERITIES, Finding, Place, Rule
from luthier.setting_names import option, with_setting_names

PLACES = 25
"""Places of each rule on the page; the report as JSON has them all."""
OPEN = 2
"""Rows of each split whose tokens are shown; further ones are folded away."""
GROUPS = 12
"""Groups of rows that belong together, of each rule."""
VERDICTS = {"passed": "Passed", "warnings": "Passed, with warnings", "refused": "Refused"}


def page(report: Report) -> str:
    """The whole page."""
    hashed = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    name = ", ".join(Path(file).name for file in report.files.get("train", ())) or "data"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{VERDICTS[report.verdict]}: {name} – luthier data report"),
        element("style", Markup(STYLE)),
    )
    body = element(
        "body",
        _head(report, name),
        element("main", _rules(report), _learned(report), _lengths(report), _rows(report),
                _groups(report), _summaries(report)),
        _foot(report),
    )  # fmt: skip
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _head(report: Report, name: str) -> Markup:
    steps: list[Markup | None] = []
    for words, command in next_steps(report):
        steps.append(element("p", words))
        if command:
            typed = element("code", command)
            steps.append(element("pre", typed, class_="command", tabindex=0))
    return element(
        "header",
        element("p", "Data report", class_="soft"),
        element("h1", name),
        element("p", VERDICTS[report.verdict], class_=f"verdict {report.verdict}"),
        element("p", verdict_line(report), class_="lead"),
        *steps,
        _facts(report),
    )


def _facts(report: Report) -> Markup:
    facts: list[tuple[str, str, str]] = []
    for split, rows in report.rows.items():
        facts.append((f"{split} rows", f"{rows:,}", report.forms.get(split, "")))
    summary = report.summaries.get("learning", {})
    if objective := summary.get("objective"):
        facts.append(("objective", str(objective), f"for {report.base}"))
    splits = learned_of(report)
    if tokens := sum(each["tokens"] for each in splits.values()):
        shares = dict.fromkeys(learned_share(each) for each in splits.values())
        facts.append(("tokens", f"{tokens:,}", f"learned: {', '.join(shares)}"))
        longest = max(each["lengths"]["max"] for each in splits.values())
        facts.append(("longest row", f"{longest:,}", f"of {summary['context']:,} tokens read"))
    return element(
        "dl",
        [
            element("div", element("dt", title), element("dd", value, element("small", more)))
            for title, value, more in facts
        ],
        class_="facts",
    )


def _section(name: str, title: str, *children: Any) -> Markup:
    return element("section", element("h2", title, id=name), *children, aria_labelledby=name)


def _rules(report: Report) -> Markup:
    found = report.findings
    rules = found.rules()
    if not rules:
        return _section("found", "What was found", element("p", "No rule is broken."))
    count = severities(report)
    boxes = [
        element(
            "label",
            element("input", type="checkbox", id=f"show-{name}", checked=True),
            f" {name}s ({count[name]:,})",
        )
        for name in reversed(SEVERITIES)
        if count[name]
    ]
    chosen = element("div", boxes, class_="filter", role="group", aria_label="Shown severities")
    first = {rules[0].id} if found.severity(rules[0]) == "error" else set[str]()
    listed = [_rule(report, rule, rule.id in first) for rule in rules]
    return _section("found", "What was found", chosen if len(boxes) > 1 else None, listed)


def _rule(report: Report, rule: Rule, open_: bool) -> Markup:
    found = report.findings
    severity, places = found.severity(rule), found.kept[rule.id]
    summary = element(
        "summary",
        element("span", severity, class_=f"chip {severity}"),
        element("code", rule.id),
        element("span", rule.about, class_="about"),
        element("span", f"{found.counts[rule.id]:,}", class_="count"),
    )
    told = [
        ("why", rule.why),
        ("fix", with_setting_names(rule.fix, option)),
        ("known as", ", ".join(rule.aliases)),
    ]
    facts = [join(element("dt", name), element("dd", text)) for name, text in told if text]
    shown = places[:PLACES]
    columns = ["place", "what is there"]
    fixes = {each.fix for each in shown} - {"", rule.fix}
    columns += ["the row"] if any(each.excerpt for each in shown) else []
    columns += ["with"] if any(each.others for each in shown) else []
    columns += ["fix"] if fixes else []
    further = found.counts[rule.id] - len(shown)
    return element(
        "details",
        summary,
        element(
            "div",
            element("dl", facts) if facts else None,
            table(columns, [_place(each, columns, rule) for each in shown], f"Places of {rule.id}"),
            element("p", f"… and {further:,} more", class_="soft") if further > 0 else None,
            class_="inside",
        ),
        class_=f"rule is-{severity}",
        open=open_,
    )


def _place(finding: Finding, columns: Sequence[str], rule: Rule) -> list[Markup]:
    cells = {
        "place": element("td", short(finding.place), class_="place", title=str(finding.place)),
        "what is there": element("td", element("bdi", finding.message)),
        "the row": element("td", element("bdi", finding.excerpt)),
        "with": element("td", listed(finding.others, 8)),
        "fix": element("td", with_setting_names(finding.closest_fix, option)),
    }
    return [cells[column] for column in columns]


def _learned(report: Report) -> Markup | None:
    splits = learned_of(report)
    if not any(found["shown"] for found in splits.values()):
        return None
    drawn = [
        join(element("h3", split), _folded([_seen(row) for row in found["shown"]]))
        for split, found in splits.items()
        if found["shown"]
    ]
    legend = element(
        "p",
        "The first rows as the model reads them. ",
        element("mark", "Marked text"),
        " is what it learns to write; the rest is given.",
        class_="soft",
    )
    return _section("learned", "What the model learns", legend, drawn)


def _folded(rows: Sequence[Markup]) -> Markup:
    """The first rows, and the rest folded away."""
    rest = rows[OPEN:]
    if not rest:
        return join(*rows)
    name = element("summary", f"{len(rest)} more row{'s' * (len(rest) != 1)}")
    return join(*rows[:OPEN], element("details", name, *rest, class_="more"))


def _seen(row: Mapping[str, Any]) -> Markup:
    taught = row["taught"]
    pieces: list[Any] = []
    if row["source"]:
        pieces += [_run(run) for run in runs(row["source"], [False] * len(row["source"]))]
        pieces.append("\n→ ")
    pieces += [_run(run) for run in runs(row["tokens"], row["learned"])]
    if taught:
        pieces += ["\n", element("mark", taught)]
    caption = f"line {row['line']:,}", f"{len(row['tokens']) + len(row['source']):,} tokens"
    return element(
        "figure",
        element("figcaption", [element("span", each) for each in caption], class_="caption"),
        element("div", pieces, class_="row", tabindex=0, role="group", aria_label=caption[0]),
        class_="seen",
    )


def _run(run: Any) -> Any:
    if run.left_out:
        return element("span", f" … {run.left_out:,} tokens are not shown … ", class_="gap")
    return element("mark", run.text) if run.learned else run.text


def _lengths(report: Report) -> Markup | None:
    splits = learned_of(report)
    drawn = []
    context = report.summaries.get("learning", {}).get("context", 0)
    for split, found in splits.items():
        lengths = found["lengths"]
        if not lengths.get("bars"):
            continue
        marks = {"median": lengths["p50"], "95 %": lengths["p95"], "99 %": lengths["p99"]}
        marks |= {"context": context} if context <= lengths["max"] else {}
        what = f"Tokens of {lengths['count']:,} rows of {split}, median {lengths['p50']:,}"
        picture = svg.histogram(lengths["bars"], marks, what, "tokens")
        drawn.append(element("div", element("h3", split), picture))
    if not drawn:
        return None
    columns = ["split", "rows", "shortest", "5 %", "median", "mean", "95 %", "99 %", "longest"]
    keys = ("count", "min", "p5", "p50", "mean", "p95", "p99", "max")
    cells = [
        [element("th", split, scope="row"),
         *(element("td", f"{found['lengths'][key]:,}", class_="number") for key in keys)]
        for split, found in splits.items()
    ]  # fmt: skip
    return _section(
        "lengths",
        "Tokens of a row",
        element("div", drawn, class_="splits"),
        table(columns, cells, "Tokens of a row by split", columns[1:]),
    )


def _rows(report: Report) -> Markup | None:
    """Rows to look at: those with most findings, and the longest."""
    parts = []
    if worst := worst_rows(report):
        cells = [
            [
                element("td", short(place), class_="place", title=str(place)),
                element("td", element("code", ", ".join(each.rule.id for each in findings))),
                element("td", element("bdi", next((f.excerpt for f in findings if f.excerpt), ""))),
            ]
            for place, findings in worst
        ]
        named = ["place", "rules", "the row"]
        parts.append(element("h3", "That break most rules"))
        parts.append(table(named, cells, "Rows that break most rules"))
    longest = [
        (split, row) for split, found in learned_of(report).items() for row in found["longest"]
    ]
    if longest:
        longest.sort(key=lambda pair: -pair[1]["tokens"])
        cells = [
            [
                element("td", short(Place(row["file"], row["line"])), class_="place"),
                element("td", f"{row['tokens']:,}", class_="number"),
                element("td", f"{row['learned']:,}", class_="number"),
                element("td", element("bdi", row["begins"])),
            ]
            for _, row in longest[:10]
        ]
        named = ["place", "tokens", "learned", "begins"]
        parts.append(element("h3", "The longest"))
        parts.append(table(named, cells, "The longest rows", ["tokens", "learned"]))
    return _section("rows", "Rows to look at", *parts) if parts else None


def _groups(report: Report) -> Markup | None:
    """Rows that belong together: copies of each other, one text with two labels."""
    parts = []
    for rule in report.findings.rules():
        groups = [each for each in report.findings.kept[rule.id] if each.others]
        if not groups:
            continue
        groups = sorted(groups, key=lambda each: -len(each.others))[:GROUPS]
        cells = [
            [
                element("td", f"{1 + len(each.others):,}", class_="number"),
                element("td", element("bdi", each.excerpt or each.message)),
                element("td", listed((each.place, *each.others), 8)),
            ]
            for each in groups
        ]
        parts.append(element("h3", element("code", rule.id)))
        parts.append(table(["rows", "text", "where"], cells, f"Groups of {rule.id}", ["rows"]))
    return _section("groups", "Rows that belong together", *parts) if parts else None


def _summaries(report: Report) -> Markup:
    shown = {
        name: each for name, each in report.summaries.items() if name != "learning" and says(each)
    }
    return join(*(summary_section(name, each) for name, each in shown.items()))


def _foot(report: Report) -> Markup:
    left = [element("p", f"Not checked: {name} ({why}).") for name, why in report.left_out.items()]
    checks = ", ".join(report.summaries) or "reading only"
    return element(
        "footer",
        element("p", f"Checks: {checks}. {report.seconds:.1f} s, luthier {__version__}."),
        left,
    )
