"""``luthier learning-curve``: would more data help?"""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.console import heavy_imports, new_table, print_json, print_table, print_text
from luthier.cli.options import (
    Adaptation,
    Base,
    Columns,
    Data,
    Json,
    LongRows,
    Mix,
    Objective,
    Resume,
    Settings,
    Validation,
    read_recipe,
    recipe_options,
)
from luthier.errors import RecipeError


def learning_curve(
    data: Data,
    shares: Annotated[
        str | None,
        typer.Option(help="Shares of the rows, such as 0.125,0.25,0.5,1."),
    ] = None,
    validation: Validation = None,
    columns: Columns = None,
    mix: Mix = None,
    long_rows: LongRows = None,
    base: Base = None,
    name: Annotated[str | None, typer.Option(help="Name of the learning curve.")] = None,
    objective: Objective = None,
    adaptation: Adaptation = None,
    set_: Settings = None,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Estimate the effect of more rows.

    The command trains on growing shares of the rows and stores no model.
    """
    recipe = read_recipe(data, recipe_options(locals()), set_)
    try:
        numbers = None if shares is None else [float(part) for part in shares.split(",")]
    except ValueError as error:
        raise RecipeError(
            f"--shares {shares}: give shares of the rows with commas between them, such as "
            "0.125,0.25,0.5,1"
        ) from error
    with heavy_imports():
        from luthier.cli.progress import LiveReporter
        from luthier.sdk.training import learning_curve as run

    with LiveReporter() as reporter:
        found = run(recipe, shares=numbers, resume=resume, reporter=reporter)
    if json_:
        print_json(found.plain())
        return
    measure = found.points[-1].measure.replace("_", " ")
    table = new_table("rows", measure, "±", numbers=("rows", "±"))
    for point in found.points:
        spread = f"{point.error:.4f}" if point.error else ""
        table.add_row(f"{point.rows:,}", f"{point.value:.4f}", spread)
    print_table(table)
    print_text(found.verdict())
    print_text(f"plot: {found.picture}")
