"""``luthier safety``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.terminal.console import heavy_imports, new_table, print_table, print_text
from luthier.cli.terminal.options import Mapped, RowSource

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.evaluation.significance import RowScores
    from luthier.workflows.safety import Safety


def safety(
    model: str,
    *,
    base: str | None = None,
    train: RowSource | None = None,
    columns: Mapped = None,
    attach: bool = False,
    reporter: Reporter | None = None,
) -> Safety:
    """Measure bias, unsafe replies and memorized rows.

    Args:
        model: Id of a tuned model that generates text or labels.
        base: Model before tuning; the parent model by default.
        train: Training rows; the file of the training by default.
        columns: Column of a key, e.g. prompt=question; repeatable.
        attach: Store the result with the model, for the certificate.
        reporter: Receives progress; silent if not given.

    Returns:
        ``measures`` of model and base, their ``differences`` and ``verdict()``.

    Raises:
        RefusedInput: for a model without a parent, or invalid rows.
    """
    with heavy_imports():
        from luthier.data.rows import load_rows
        from luthier.engine.metrics import Reporter
        from luthier.library.models import find, model_before
        from luthier.library.reports import check_attachable
        from luthier.workflows.evaluate import attach_report
        from luthier.workflows.safety import measure_safety

    reporter = reporter or Reporter()
    stored = find(model)
    if attach:
        check_attachable(stored)
    before = model_before(stored, base)
    known = (stored.manifest.recipe or {}).get("data", {})
    learned = known.get("train")
    if train is None and isinstance(learned, str) and Path(learned).is_file():
        train, columns = learned, known.get("columns")
    rows = [] if train is None else load_rows(Path(train), columns)
    found = measure_safety(stored, before, rows, reporter.note)
    if attach:
        data = [] if train is None else [train]
        attach_report([stored], "safety", data, found.plain(), reporter.note)
    return found


def show_safety(found: Safety) -> None:
    """Print a line for each measure, and the verdict."""
    numbers = ("rows", "base (95 %)", "tuned (95 %)", "difference ±")
    table = new_table("", "measure", *numbers, numbers=numbers)
    for each in found.measures:
        apart, difference = found.differences.get(each.name), ""
        if apart is not None:
            form = ".1%" if each.tuned.is_share else ".3f"
            mark = "" if apart.significant else " *"
            difference = f"{apart.value:+{form}} {apart.error:{form}}{mark}"
        before = "" if each.base is None else _text(each.base)
        table.add_row(
            each.name, each.unit, f"{len(each.tuned):,}", before, _text(each.tuned), difference
        )
    print_table(table)
    if found.differences:
        print_text("* not significant")
    for remark in found.remarks:
        print_text(remark)
    if verdict := found.verdict():
        print_text(verdict)


def _text(scores: RowScores) -> str:
    low, high = scores.interval
    form = ".1%" if scores.is_share else ".3f"
    return f"{scores.value:{form}} ({low:{form}} to {high:{form}})"
