"""HTML page of a comparison (``templates/compare.html``)."""

from __future__ import annotations

from luthier import __version__
from luthier.pages import Table, interval_text, render_page
from luthier.workflows.compare import HeadToHead


def page(comparison: HeadToHead, data: str) -> str:
    """Return the HTML page of a comparison on the rows of ``data``."""
    return render_page(
        "luthier.workflows",
        "compare.html",
        version=__version__,
        data=data,
        rows=comparison.rows,
        measure=comparison.measure.replace("_", " "),
        verdict=comparison.verdict(),
        remarks=comparison.remarks,
        scores=_scores(comparison),
        costs=_costs(comparison),
    )


def _scores(comparison: HeadToHead) -> Table:
    behind = comparison.behind()
    columns = {
        "technique": "text", "": "name", "score": "number", "95 %": "number", "to the best": "number",
        "significant": "text",
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
    return Table.of("Scores", columns, rows)


def _costs(comparison: HeadToHead) -> Table:
    columns = {
        "": "name", "input tokens": "number", "ms per answer": "number", "memory, MB": "number",
        "preparation, s": "number",
    }  # fmt: skip
    prices = comparison.prices
    columns |= {} if prices is None else {f"{prices.currency} per 1,000": "number"}
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
    return Table.of("Cost of an answer", columns, rows)
