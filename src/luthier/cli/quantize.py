"""``luthier quantize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.console import (
    heavy_imports,
    new_table,
    note,
    print_json,
    print_table,
    print_text,
)
from luthier.cli.options import Columns, Json

if TYPE_CHECKING:
    from luthier.evaluation.significance import Difference
    from luthier.workflows.quantize import QuantizationReport, QuantizedScores


def quantize(
    model: Annotated[str, typer.Argument(help="A model that writes.")],
    data: Annotated[str, typer.Argument(help="Rows that it was not trained on; file or folder.")],
    to: Annotated[
        list[str] | None,
        typer.Option(
            help="Type of weights: q8_0, q6_k, q5_k_m, q4_k_m, q4_0; again for more. Else q8_0, q4_0."
        ),
    ] = None,
    columns: Columns = None,
    json_: Json = False,
) -> None:
    """Say what a model loses on your rows with fewer bits, and whether they erase what it learned."""
    from luthier.recipe import parse_columns

    with heavy_imports():
        from luthier.sdk.export import quantize as run

    found = run(model, data, to or ("q8_0", "q4_0"), columns=parse_columns(columns), note=note)
    if json_:
        print_json(found.plain())
    else:
        show(found)


def show(found: QuantizationReport) -> None:
    """A line for each type, and the verdict."""
    tuned = found.base is not None
    numbers = ("loss", "difference ±", *(["tuning gained ±"] if tuned else []), "MB", "tokens/s")
    table = new_table("weights", *numbers, numbers=numbers)

    def difference(found: Difference | None) -> str:
        if found is None:
            return ""
        return f"{found.value:+.4f} {found.error:.4f}{'' if found.significant else ' *'}"

    def cells(each: QuantizedScores, *differences: Difference | None) -> list[str]:
        speed = each.tokens_per_second
        texts = [difference(one) for one in differences[: 1 + tuned]]
        cost = [f"{each.file_bytes / 1e6:.1f}", "" if speed is None else f"{speed:.0f}"]
        return [f"{each.loss.value:.4f}", *texts, *cost]

    table.add_row("unquantized", *cells(found.whole, None, found.gain))
    for each in found.types:
        apart = found.differences[each.quantization]
        table.add_row(each.quantization, *cells(each, apart, found.gain_with(each)))
    print_table(table)
    print_text("* may be chance")
    if tuned:
        print_text(f"tuning gained: over {found.base} with weights of the same type")
    if found.whole.tokens_per_second is None:
        print_text("Speed was not measured: pip install 'luthier[llama-cpp]'")
    print_text(found.verdict())
    for remark in found.remarks:
        print_text(remark)
