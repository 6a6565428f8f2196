"""``luthier forgetting``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.console import (
    check_output,
    heavy_imports,
    new_table,
    note,
    print_json,
    print_table,
    print_text,
    write_page,
)
from luthier.cli.options import Attach, Html, Json

if TYPE_CHECKING:
    from luthier.workflows.forgetting import Forgetting


def forgetting(
    model: Annotated[str, typer.Argument(help="A tuned model's id.")],
    base: Annotated[
        str | None, typer.Option(help="What it is held against; by default what it was tuned from.")
    ] = None,
    probes: Annotated[
        list[str] | None,
        typer.Option(help="Rows with choices, or text and target; again for more."),
    ] = None,
    html: Html = None,
    attach: Attach = False,
    json_: Json = False,
) -> None:
    """Measure what tuning made a model forget."""
    from luthier.cli.progress import show_progress

    with heavy_imports():
        from luthier.sdk.evaluation import forgetting as run

    check_output(html)
    with show_progress(0, "forgetting") as done:
        found = run(model, base, probes or (), note, on_progress=done, attach=attach)
    if html is not None:
        from luthier.workflows.forgetting_page import page

        write_page(html, page(found))
    if json_:
        print_json(found.plain())
    else:
        show(found)


def show(found: Forgetting) -> None:
    """Print the drift, a line for each measure, and the verdict."""
    from rich.text import Text

    drift = found.drift
    low, high = drift.kl.interval
    print_text(
        f"drift from {found.base}: {drift.kl.value:.4f} nats a token ({low:.4f} to {high:.4f}), on "
        f"{drift.tokens:,} tokens that it wrote; their perplexity {drift.base_perplexity.value:.2f} "
        f"before, {drift.tuned_perplexity.value:.2f} now"
    )
    numbers = ("rows", "before", "now", "difference ±")
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
    print_text("* may be chance")
    for remark in found.remarks:
        print_text(remark)
    print_text(found.verdict())
