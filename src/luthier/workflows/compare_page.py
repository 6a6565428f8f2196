"""A comparison as one HTML page: the verdict, a chart of scores with their intervals, and the
table."""

from __future__ import annotations

from typing import Any

from luthier import __version__
from luthier.pages import Table, interval_text, render_page
from luthier.workflows.compare import HeadToHead

WIDTH, NAMES, LINE = 760, 330, 26
"""Pixels of the chart, of the names in it, and of a line."""


def page(comparison: HeadToHead, data: str) -> str:
    """The whole page, on the rows of ``data``."""
    return render_page(
        "luthier.workflows",
        "compare.html",
        version=__version__,
        data=data,
        rows=comparison.rows,
        measure=comparison.measure.replace("_", " "),
        verdict=comparison.verdict(),
        remarks=comparison.remarks,
        chart=_draw_chart(comparison),
        scores=_scores(comparison),
        costs=_costs(comparison),
    )


def _draw_chart(comparison: HeadToHead) -> dict[str, Any]:
    """A point with the interval of its score for each, on one axis."""
    intervals = [each.score.interval for each in comparison.contenders]
    low = 0.0 if comparison.best.score.is_share else min(low for low, _ in intervals)
    high = 1.0 if comparison.best.score.is_share else max(high for _, high in intervals)

    def x(score: float) -> str:
        return f"{NAMES + (WIDTH - NAMES - 20) * (score - low) / ((high - low) or 1):.1f}"

    lines = [
        {
            "name": each.name if len(each.name) <= 46 else f"{each.name[:45]}…",
            "y": 20 + LINE * place, "low": x(interval[0]), "high": x(interval[1]),
            "x": x(each.score.value), "kind": "bar" if each.is_tuned else "untuned",
            "title": f"{each.name}: {each.score.value:.3f} ({interval_text(interval)})",
        }
        for place, (each, interval) in enumerate(zip(comparison.contenders, intervals, strict=True))
    ]  # fmt: skip
    ticks = [{"x": x(low + share * (high - low)), "text": f"{low + share * (high - low):.3g}"}
             for share in (0, 0.25, 0.5, 0.75, 1)]  # fmt: skip
    floor = 20 + LINE * len(lines)
    return {"width": WIDTH, "height": floor + 24, "names": NAMES, "floor": floor, "lines": lines,
            "ticks": ticks}  # fmt: skip


def _scores(comparison: HeadToHead) -> Table:
    behind = comparison.behind()
    columns = {
        "way": "text", "": "name", "score": "number", "95 %": "number", "to the best": "number",
        "beyond chance": "text",
    }  # fmt: skip
    rows = []
    for each in comparison.contenders:
        apart = behind.get(each.name)
        rows.append(
            [
                each.technique, each.name, f"{each.score.value:.3f}",
                interval_text(each.score.interval),
                "" if apart is None else f"{apart.value:+.3f} ± {apart.error:.3f}",
                "" if apart is None else "yes" if apart.significant else "no",
            ]
        )  # fmt: skip
    return Table.of("All that were compared", columns, rows)


def _costs(comparison: HeadToHead) -> Table:
    columns = {
        "": "name", "tokens read": "number", "ms an answer": "number", "memory, MB": "number",
        "before, s": "number",
    }  # fmt: skip
    prices = comparison.prices
    columns |= {} if prices is None else {f"{prices.currency} for 1,000": "number"}
    rows = []
    for each in comparison.contenders:
        cost = comparison.cost_per_thousand(each)
        rows.append(
            [
                each.name, "" if each.prompt_tokens is None else f"{each.prompt_tokens:,.0f}",
                f"{1000 * each.seconds:,.1f}",
                f"{each.memory_bytes / 1e6:,.0f}" if each.memory_bytes else "",
                f"{each.preparation_seconds:,.0f}" if each.preparation_seconds else "",
                *([] if cost is None else [f"{cost:.3g}"]),
            ]
        )  # fmt: skip
    return Table.of("What an answer takes", columns, rows)
