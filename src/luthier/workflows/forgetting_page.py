"""HTML page of a forgetting measurement."""

from __future__ import annotations

from luthier import __version__
from luthier.pages import Table, interval_text, render_page
from luthier.workflows.forgetting import Forgetting


def page(forgetting: Forgetting) -> str:
    """Return the HTML page."""
    drift = forgetting.drift
    low, high = drift.kl.interval
    facts = [
        ("drift, nats a token", f"{drift.kl.value:.4f}", f"{low:.4f} to {high:.4f}"),
        ("perplexity before", f"{drift.base_perplexity.value:.2f}", f"of {drift.tokens:,} tokens"),
        ("perplexity now", f"{drift.tuned_perplexity.value:.2f}", f"{drift.samples:,} answers"),
    ]
    return render_page(
        "luthier.workflows",
        "forgetting.html",
        version=__version__,
        model=forgetting.model,
        base=forgetting.base,
        verdict=forgetting.verdict(),
        facts=facts,
        remarks=forgetting.remarks,
        changes=_changes(forgetting),
    )


def _changes(forgetting: Forgetting) -> Table:
    columns = {
        "": "name", "measure": "text", "rows": "number", "before": "number", "95 %": "number",
        "now": "number", "95 % ": "number", "difference": "number", "beyond chance": "text",
    }  # fmt: skip
    rows = []
    for each in forgetting.changes:
        apart = forgetting.differences[each.name]
        rows.append(
            [
                each.name, each.measure, f"{each.rows:,}", f"{each.base.value:.3f}",
                interval_text(each.base.interval), f"{each.tuned.value:.3f}",
                interval_text(each.tuned.interval), f"{apart.value:+.3f} ± {apart.error:.3f}",
                "yes" if apart.significant else "no",
            ]
        )  # fmt: skip
    return Table.of("Before and now", columns, rows)
