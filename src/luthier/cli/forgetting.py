"""``luthier forgetting`` and ``luthier canaries``."""

from __future__ import annotations

from pathlib import Path
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
from luthier.cli.options import Attach, Columns, Html, Json

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
    canaries: Annotated[
        Path | None, typer.Option(help="What `luthier canaries` wrote beside the training rows.")
    ] = None,
    safety: Annotated[bool, typer.Option(help="Measure bias, toxicity and refusals, too.")] = True,
    html: Html = None,
    attach: Attach = False,
    json_: Json = False,
) -> None:
    """Say what a tuned model forgot, whether it is as safe as before, and what it knows by heart."""
    from luthier.cli.progress import show_progress

    with heavy_imports():
        from luthier.sdk.evaluation import forgetting as run

    check_output(html)
    with show_progress(0, "forgetting") as done:
        found = run(
            model, base, probes or (), canaries, safety, note, on_progress=done, attach=attach
        )
    if html is not None:
        from luthier.workflows.forgetting_page import page

        write_page(html, page(found))
    if json_:
        print_json(found.plain())
    else:
        show(found)


def show(found: Forgetting) -> None:
    """The drift, a line for each measure and each canary, and the verdict."""
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
    if found.exposures:
        counts = ("times in the data", "exposure in bits", "rank")
        table = new_table("canary", *counts, "known by heart", numbers=counts)
        for one in found.exposures:
            known = "yes" if one in found.known_by_heart else "no"
            rank = f"{one.rank:,} of {one.tried:,}"
            table.add_row(
                Text(one.canary.name), f"{one.canary.repeats:,}", f"{one.bits:.1f}", rank, known
            )
        print_table(table)
    for remark in found.remarks:
        print_text(remark)
    print_text(found.verdict())


def canaries(
    data: Annotated[str, typer.Argument(help="Training rows.")],
    output: Annotated[
        Path, typer.Argument(help="The copy to write, with canaries among the rows.")
    ],
    repeats: Annotated[
        list[int] | None,
        typer.Option(help="How often a canary is planted; again for more. Else 0, 5 and 20."),
    ] = None,
    count: Annotated[int, typer.Option(help="Canaries for each number of repeats.")] = 3,
    seed: Annotated[int, typer.Option(help="Of names, codes and places.")] = 0,
    columns: Columns = None,
    json_: Json = False,
) -> None:
    """Plant made-up secrets in a copy of training rows, to see what is learned by heart."""
    from luthier.recipe import parse_columns
    from luthier.sdk.data import plant_canaries

    check_output(output, data)
    planted = plant_canaries(
        data, output, repeats=repeats or (0, 5, 20), count=count, seed=seed,
        columns=parse_columns(columns),
    )  # fmt: skip
    beside = output.with_name(f"{output.name}.canaries.json")
    if json_:
        print_json({"data": str(output), "canaries": str(beside), "planted": len(planted)})
        return
    rows = sum(each.repeats for each in planted)
    print_text(f"{len(planted)} canaries in {rows:,} further rows: {output}")
    print_text(f"tune on it, then: luthier forgetting MODEL --canaries {beside}")
