"""``luthier forgetting``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.terminal.console import (
    check_output,
    heavy_imports,
    print_tables,
    print_text,
    write_page,
)
from luthier.cli.terminal.options import Mapped, RowSource
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.earlier_task import MetricChanges


def forgetting(
    model: str,
    *,
    base: str | None = None,
    rows: RowSource | None = None,
    columns: Mapped = None,
    probes: Sequence[str | Path] = (),
    html: Path | None = None,
    attach: bool = False,
    reporter: Reporter | None = None,
) -> MetricChanges:
    """Measure what tuning made a model forget.

    Args:
        model: Id of a tuned model.
        base: Model before tuning; the parent model by default.
        rows: Held-out rows of an earlier task.
        columns: Column of a key, e.g. prompt=question; repeatable.
        probes: Rows with choices, or text and target; repeatable.
        html: Write the result as an HTML page.
        attach: Store the result with the model, for the certificate.
        reporter: Receives progress; silent if not given.

    Returns:
        ``changes`` with their ``differences``, ``verdict()``, and ``drift`` of generated text.

    Raises:
        RefusedInput: for a model that was not tuned, or invalid rows. Without ``rows``, also for a
            model that generates no text.
    """
    check_output(html)
    with heavy_imports():
        from luthier.engine.metrics import Reporter
        from luthier.library.models import find, model_before
        from luthier.library.reports import check_attachable
        from luthier.workflows.earlier_task import MetricChanges, measure_earlier_task
        from luthier.workflows.evaluate import attach_report
        from luthier.workflows.forgetting import load_probes, measure_forgetting

    reporter = reporter or Reporter()
    stored = find(model)
    if attach:
        check_attachable(stored)
    parent = model_before(stored, base)
    if not stored.writes and (rows is None or probes):
        raise RecipeError(
            f"{stored.id} generates no text, so drift and probes do not apply. Measure its earlier "
            "task with `--rows FILE`"
        )
    found = MetricChanges(stored.id, parent.id)
    if rows is not None:
        found = measure_earlier_task(stored, parent, rows, columns, reporter.note)
    if stored.writes:
        drift = measure_forgetting(
            stored,
            parent,
            load_probes(probes),
            reporter.note,
            lambda done, total: reporter.progress(done, total, "forgetting"),
        )
        changes, remarks = [*drift.changes, *found.changes], [*drift.remarks, *found.remarks]
        found = replace(drift, changes=changes, remarks=remarks)
    if attach:
        data = [*probes, *([] if rows is None else [rows])]
        attach_report([stored], "forgetting", data, found.plain(), reporter.note)
    if html is not None:
        from luthier.workflows.forgetting import forgetting_page

        write_page(html, forgetting_page(found), reporter)
    return found


def show_forgetting(found: MetricChanges) -> None:
    """Print the drift, a line for each measure, and the verdict."""
    from luthier.workflows.forgetting import Forgetting

    if isinstance(found, Forgetting):
        drift = found.drift
        low, high = drift.kl.interval
        print_text(
            f"drift from {found.base}: {drift.kl.value:.4f} nats per token ({low:.4f} to {high:.4f}) "
            f"on {drift.tokens:,} generated tokens; perplexity {drift.base_perplexity.value:.2f} "
            f"before, {drift.tuned_perplexity.value:.2f} after"
        )
    print_tables(found.tables())
    print_text("* not significant")
    for remark in found.remarks:
        print_text(remark)
    print_text(found.verdict())
