"""``luthier safety``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.terminal.console import heavy_imports, print_tables, print_text
from luthier.cli.terminal.options import Mapped, RowSource

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
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
    print_tables(found.tables())
    if found.differences:
        print_text("* not significant")
    for remark in found.remarks:
        print_text(remark)
    if verdict := found.verdict():
        print_text(verdict)
