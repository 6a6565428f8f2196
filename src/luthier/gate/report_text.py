"""Report of the data checks for a terminal, drawn with rich."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule as Line
from rich.table import Table
from rich.text import Text

from luthier.formatting import command_option, map_code, printable
from luthier.gate.histogram import density, merge_bars
from luthier.gate.report import (
    PLACES,
    Report,
    format_number,
    has_content,
    learned_share,
    learning_splits,
    list_places,
    list_values,
    next_steps,
    short_place,
    shown_place,
    token_runs,
    verdict_line,
)
from luthier.gate.rules import Rule

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
VERDICTS = {
    "passed": ("✓ passed", "bold green"),
    "warnings": ("! passed with warnings", "bold yellow"),
    "refused": ("✗ refused", "bold red"),
}
SPARKLINE = 16
"""Width of a histogram line, in characters."""
BLOCKS = "▁▂▃▄▅▆▇█"
QUIET = frozenset(
    {"learning", "encoding", "markers", "white_space", "lengths", "contradictions", "duplicates"}
)
"""Checks whose summaries repeat the table of rules. The HTML page has all summaries."""
NAMED = 8
"""Number of counts shown per summary."""
MANY = 64
"""Number of values shown of a list: all columns of a series."""


def print_report(report: Report, console: Console, rows: int = 3) -> None:
    """Print the report; the tokens of the first ``rows`` rows of each split are coloured."""
    _head(report, console)
    _rules(report, console)
    _lengths(report, console)
    for name, summary in report.summaries.items():
        if name not in QUIET and has_content(summary):
            _heading(name.replace("_", " ").capitalize(), console)
            _summary(summary, console, 2)
    _samples(report, console, rows)
    console.print()
    for words, command in next_steps(report):
        console.print(Text(words, "bold"))
        if command:
            console.print(Text(f"  {command}", "bold cyan"), soft_wrap=True)


def sparkline(bars: Sequence[Mapping[str, int]]) -> str:
    """Draw histogram bars as block characters, by count divided by width on the log axis."""
    step = max(-(-len(bars) // SPARKLINE), 1)
    dense = [density(merge_bars(bars[at : at + step])) for at in range(0, len(bars), step)]
    most = max(dense, default=0.0) or 1.0
    return "".join(
        BLOCKS[math.ceil(each / most * (len(BLOCKS) - 1))] if each else " " for each in dense
    )


def _heading(text: str, console: Console) -> None:
    console.print()
    console.print(Text(text, "bold"))


def _head(report: Report, console: Console) -> None:
    verdict, style = VERDICTS[report.verdict]
    console.print(Text.assemble((verdict, style), "  ", verdict_line(report)))
    console.print()
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(justify="right", no_wrap=True)
    facts.add_column(overflow="fold")
    for split, files in report.files.items():
        form = report.forms.get(split, "nothing that can be read")
        names = [Path(file).name for file in files]
        what = Text(f"{form}  ")
        what.append(printable(", ".join(names[:3]) + (" …" if len(names) > 3 else "")), "dim")
        facts.add_row(split, f"{report.rows.get(split, 0):,} rows", what)
    if report.task:
        facts.add_row("learns", "", report.task)
    console.print(facts)
    for why in dict.fromkeys(report.left_out.values()):
        names = [name for name, reason in report.left_out.items() if reason == why]
        console.print(Text(f"  not checked: {', '.join(names)} ({why})", "dim"), soft_wrap=True)


def _rules(report: Report, console: Console) -> None:
    found = report.findings
    if not found.rules():
        return
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=False)
    table.add_column("severity", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("rule, location and fix", overflow="fold", ratio=1)
    for rule in found.rules():
        severity = found.severity(rule)
        table.add_row(
            Text(severity, COLOURS[severity]), f"{found.counts[rule.id]:,}", _about(rule, report)
        )
    console.print(Padding(table, (0, 0, 0, 2)))


def _about(rule: Rule, report: Report) -> Text:
    """Describe a rule in a few lines: description, first places, fix."""
    places = report.findings.examples[rule.id]
    text = Text.assemble((rule.id, "bold"), f"  {printable(rule.about)}")
    said = rule.about
    for each in places[:PLACES]:
        text.append(f"\n{printable(short_place(each.place))}", "cyan")
        if each.message and each.message != said:
            said = each.message
            text.append(f"  {printable(said)}")
        if each.excerpt:
            begins = each.excerpt if len(each.excerpt) <= 60 else f"{each.excerpt[:59]}…"
            text.append(f"  {printable(begins)}", "dim")
        if each.others and not all(str(other) in each.message for other in each.others):
            text.append(f"  with {list_places(each.others, PLACES)}", "dim")
    further = report.findings.counts[rule.id] - min(len(places), PLACES)
    if further > 0:
        text.append(f"\n… and {further:,} more", "dim")
    alone = rule.whole and len(places) == 1  # a fix for one place may not fit the rest
    if fix := places[0].closest_fix if alone else rule.fix or places[0].fix:
        text.append("\nfix  ", "green")
        text.append(printable(map_code(fix, command_option)))
    return text


def _lengths(report: Report, console: Console) -> None:
    splits = learning_splits(report)
    if not _has_tokens(report):
        return
    summary = report.summaries["learning"]
    _heading(f"Tokens per row (context {summary['context']:,})", console)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "min", "median", "95 %", "max", "total", "learned"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("distribution", no_wrap=True)
    for split, found in splits.items():
        lengths = found["lengths"]
        numbers = [f"{lengths[key]:,}" for key in ("min", "p50", "p95", "max")]
        bars = Text(sparkline(lengths.get("bars", ())), "blue")
        table.add_row(split, *numbers, f"{found['tokens']:,}", learned_share(found), bars)
    console.print(Padding(table, (0, 0, 0, 2)))


def _has_tokens(report: Report) -> bool:
    """Return True if rows have tokens to show. An image, a recording or a window is one token."""
    return any(found["lengths"]["max"] > 1 for found in learning_splits(report).values())


def _summary(value: Any, console: Console, indent: int, title: str = "") -> None:
    """Print the summary of a check by the rules of :meth:`luthier.gate.check.Check.summary`."""
    pad = " " * indent
    name = title.replace("_", " ")
    if not isinstance(value, Mapping):
        text = list_values(value, MANY) if isinstance(value, list) else format_number(value, title)
        if text:
            console.print(Text.assemble(pad, (f"{name}  ", "dim"), printable(text)))
        return
    if "bars" in value:
        line = Text.assemble(pad, (f"{name}  " if name else "", "dim"))
        line.append(sparkline(value["bars"]), "blue")
        numbers = [f"{key} {format_number(n, key)}" for key, n in value.items() if key != "bars"]
        console.print(line.append(f"  {', '.join(numbers)}"), soft_wrap=True)
        return
    if isinstance(value.get("counts"), Mapping):
        _counts(value, console, indent, name)
        value = {key: each for key, each in value.items() if key not in ("counts", "of")}
        name, title = "", ""
    if isinstance(value.get("splits"), Mapping):
        value = {**value, **value["splits"]}
        value.pop("splits")
    if name and value:
        console.print(Text(f"{pad}{printable(name)}", "dim"))
        indent += 2
    for key, each in value.items():
        _summary(each, console, indent, str(key))


def _counts(value: Mapping[str, Any], console: Console, indent: int, name: str) -> None:
    counts, of = value["counts"], value.get("of", "")
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    most, total = max(counts.values(), default=1) or 1, sum(counts.values()) or 1
    if name:
        title = f"{printable(name)}: {len(counts):,}" + (f", {of}" if of else "")
        console.print(Text(f"{' ' * indent}{title}", "dim"), soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(max_width=36, no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="dim")
    table.add_column(no_wrap=True, style="blue")
    shown = ordered if len(ordered) <= NAMED + 1 else [*ordered[: NAMED - 2], *ordered[-2:]]
    for place, (label, count) in enumerate(shown):
        if len(shown) < len(ordered) and place == NAMED - 2:
            table.add_row(Text(f"… {len(ordered) - NAMED:,} more", "dim"))
        bar = "█" * max(round(20 * count / most), 1 if count else 0)
        table.add_row(Text(printable(str(label))), f"{count:,}", f"{count / total:.1%}", bar)
    console.print(Padding(table, (0, 0, 0, indent + 2)))


def _samples(report: Report, console: Console, rows: int) -> None:
    splits = {
        split: [row for row in found["shown"] if len(row["tokens"]) > 1 or row["taught"]][:rows]
        for split, found in learning_splits(report).items()
    }
    if not rows or not any(splits.values()) or not _has_tokens(report):
        return
    coloured = console.color_system is not None and not console.no_color
    marked = "green" if coloured else "in ⟦ ⟧"
    _heading(f"Model input, with trained tokens {marked}", console)
    for split, shown in splits.items():
        for row in shown:
            console.print(
                Line(f"{split}, {shown_place(report, split, row)}", align="left", style="dim")
            )
            console.print(_row(row, coloured))
            if row["taught"]:
                console.print(Text(f"learns: {printable(row['taught'])}", "bold green"))


def _row(row: Mapping[str, Any], coloured: bool) -> Text:
    """Render the tokens of a row. Learned tokens are green, or in brackets without colour."""
    text = Text()
    if row["source"]:
        for run in token_runs(row["source"], [False] * len(row["source"])):
            text.append(run.text or _gap(run.left_out), "dim")
        text.append("\n→ ")
    for run in token_runs(row["tokens"], row["learned"]):
        shown = run.text or _gap(run.left_out)
        if run.learned and not coloured:
            shown = f"⟦{shown}⟧"
        text.append(shown, "bold green" if run.learned else "dim")
    return text


def _gap(tokens: int) -> str:
    return f" … {tokens:,} tokens are not shown … "
