"""``luthier forgetting``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.terminal.console import (
    check_output,
    heavy_imports,
    new_table,
    print_table,
    print_text,
    write_page,
)
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.forgetting import Forgetting


def forgetting(
    model: str,
    *,
    base: str | None = None,
    probes: Sequence[str | Path] = (),
    html: Path | None = None,
    attach: bool = False,
    reporter: Reporter | None = None,
) -> Forgetting:
    """Measure what tuning made a model forget.

    Args:
        model: Id of a tuned model.
        base: Model before tuning; the parent model by default.
        probes: Rows with choices, or text and target; repeatable.
        html: Write the result as an HTML page.
        attach: Store the result with the model, for the certificate.
        reporter: Receives progress; silent if not given.

    Returns:
        ``drift``, ``changes`` with their ``differences``, and ``verdict()``.

    Raises:
        RefusedInput: for a model that was not tuned or generates no text, or invalid probes.
    """
    check_output(html)
    with heavy_imports():
        from luthier.engine.metrics import Reporter
        from luthier.library.models import find
        from luthier.library.reports import check_attachable
        from luthier.workflows.evaluate import attach_report
        from luthier.workflows.forgetting import load_probes, measure_forgetting

    reporter = reporter or Reporter()
    stored = find(model)
    if attach:
        check_attachable(stored)
    before = base or stored.manifest.parent
    if before is None:
        raise RecipeError(
            f"{stored.id} has no recorded parent model. Name a tuned model, or set `base`"
        )
    found = measure_forgetting(
        stored,
        find(before),
        load_probes(probes),
        reporter.note,
        lambda done, total: reporter.progress(done, total, "forgetting"),
    )
    if attach:
        attach_report([stored], "forgetting", probes, found.plain(), reporter.note)
    if html is not None:
        from luthier.workflows.forgetting import forgetting_page

        write_page(html, forgetting_page(found), reporter)
    return found


def show_forgetting(found: Forgetting) -> None:
    """Print the drift, a line for each measure, and the verdict."""
    from rich.text import Text

    drift = found.drift
    low, high = drift.kl.interval
    print_text(
        f"drift from {found.base}: {drift.kl.value:.4f} nats per token ({low:.4f} to {high:.4f}) on "
        f"{drift.tokens:,} generated tokens; perplexity {drift.base_perplexity.value:.2f} before, "
        f"{drift.tuned_perplexity.value:.2f} after"
    )
    numbers = ("rows", "before", "after", "difference ±")
    table = new_table("", "measure", *numbers, numbers=numbers)
    for each in found.changes:
        apart = found.differences[each.name]
        style = ".1%" if each.base.is_share else ".3f"
        table.add_row(
            Text(each.name), each.measure, f"{each.rows:,}", f"{each.base.value:{style}}",
            f"{each.tuned.value:{style}}",
            f"{apart.value:+{style}} {apart.error:{style}}{'' if apart.significant else ' *'}",
        )  # fmt: skip
    print_table(table)
    print_text("* not significant")
    for remark in found.remarks:
        print_text(remark)
    print_text(found.verdict())
