"""``luthier estimate``: what a job will take, before it is run."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import heavy_imports, new_console, new_table, print_json, print_table
from luthier.cli.options import (
    Adaptation,
    Base,
    BatchSize,
    Columns,
    Epochs,
    Json,
    Mix,
    Objective,
    Prices,
    Settings,
    Validation,
    read_recipe,
    recipe_options,
)
from luthier.errors import RecipeError
from luthier.escaping import format_duration

if TYPE_CHECKING:
    from luthier.recipe import Recipe
    from luthier.workflows.estimate.budget import Prices as PriceTable
    from luthier.workflows.estimate.estimate import Estimate


def estimate(
    data: Annotated[
        str | None,
        typer.Argument(
            help="File, folder, 'pattern*' or s3:// with rows or text, or a recipe (.toml)."
        ),
    ] = None,
    validation: Validation = None,
    mix: Mix = None,
    columns: Columns = None,
    base: Base = None,
    objective: Objective = None,
    adaptation: Adaptation = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    set_: Settings = None,
    finish_by: Annotated[
        str | None, typer.Option(help="Time of day, e.g. 18:00: how much can be done by then.")
    ] = None,
    within: Annotated[
        str | None, typer.Option(help="Time there is, e.g. 2h or 90m: how much fits into it.")
    ] = None,
    prices: Prices = None,
    prices_example: Annotated[
        bool, typer.Option("--prices-example", help="Print a price table to begin with.")
    ] = False,
    json_: Json = False,
) -> None:
    """Estimate time, memory, disk and cost of a tuning.

    The estimate comes from a few real training steps.
    """
    options = recipe_options(locals())
    if prices_example:
        from luthier.workflows.estimate.budget import EXAMPLE

        typer.echo(EXAMPLE, nl=False)
        return
    if data is None:
        raise RecipeError("give the data of the job, or --prices-example")
    from luthier.workflows.estimate.budget import read_prices

    recipe = read_recipe(data, options, set_)
    table = read_prices(prices)
    if finish_by and within:
        raise RecipeError("give --finish-by or --within, not both")
    _seconds(finish_by, within)  # refused before the minutes that a trial takes
    found = run_estimate(recipe)
    until = _seconds(finish_by, within)  # what the trial took is over
    if json_:
        print_json(as_plain(found, table, until))
        return
    show(found, table)
    if until is not None:
        _show_plan(found, until, f"To finish by {finish_by}" if finish_by else f"Within {within}")


def _seconds(finish_by: str | None, within: str | None) -> float | None:
    from luthier.workflows.estimate.budget import duration, seconds_until

    if finish_by:
        return seconds_until(finish_by)
    return duration(within) if within else None


def run_estimate(recipe: Recipe) -> Estimate:
    """Try the job of a recipe, with a bar."""
    with heavy_imports():
        from luthier.cli.progress import LiveReporter
        from luthier.workflows.estimate.estimate import estimate as try_job

    with LiveReporter() as reporter:
        return try_job(recipe, reporter)


def as_plain(
    found: Estimate, prices: PriceTable | None, until: float | None = None
) -> dict[str, Any]:
    """An estimate as JSON holds it, with its cost where there are prices."""
    from luthier.workflows.estimate.budget import plan

    plain = found.plain()
    if prices is not None:
        plain["cost"] = {"currency": prices.currency, **_cost(found, prices)}
    if until is not None:
        plain["plan"] = asdict(plan(found, until))
    return plain


def _cost(found: Estimate, prices: PriceTable) -> dict[str, float]:
    times, tokens = found.seconds, found.tokens
    return {
        name: prices.cost(getattr(times, name), getattr(tokens, name))
        for name in ("value", "low", "high")
    }


def show(found: Estimate, prices: PriceTable | None) -> None:
    """Print an estimate."""
    from luthier.engine.timings import PARTS
    from luthier.workflows.estimate.budget import prices_file

    out = new_console(highlight=False)
    out.print(
        f"[bold]{found.objective}[/bold] with [bold]{found.adaptation}[/bold] on "
        f"[bold]{found.base}[/bold]: {found.rows:,} rows, {found.steps:,} steps, "
        f"{found.epochs:g} passes"
        + (f", and up to {found.refit_steps:,} steps on all rows" if found.refit_steps else "")
    )
    numbers = ("estimate", "nine times in ten")
    table = new_table("", *numbers, "", numbers=numbers)
    size = "{:.2f} GB".format
    table.add_row(
        "  time",
        f"[bold]{format_duration(found.seconds.value)}[/bold]",
        f"{format_duration(found.seconds.low)} to {format_duration(found.seconds.high)}",
        "unless it stops early",
    )
    table.add_row(
        "  peak memory",
        f"[bold]{size(found.memory.value / 1e9)}[/bold]",
        f"{size(found.memory.low / 1e9)} to {size(found.memory.high / 1e9)}",
        "",
    )
    table.add_row(
        "  disk", f"[bold]{found.disk.value / 1e6:,.0f} MB[/bold]",
        f"at most {found.disk.high / 1e6:,.0f} MB", "",
    )  # fmt: skip
    table.add_row(
        "  tokens", f"[bold]{found.tokens.value:,.0f}[/bold]", "",
        f"of which {found.learned.value:,.0f} are learned",
    )  # fmt: skip
    if prices is not None:
        cost = _cost(found, prices)
        table.add_row(
            "  cost",
            f"[bold]{cost['value']:.2f} {prices.currency}[/bold]",
            f"{cost['low']:.2f} to {cost['high']:.2f}",
            "",
        )
    print_table(table)
    whole = sum(part.value for part in found.parts.values()) or 1.0
    for name, part in sorted(found.parts.items(), key=lambda item: -item[1].value):
        if part.value > 0.02 * whole:
            out.print(f"    {part.value / whole:>4.0%}  {PARTS[name]}", style="dim")
    if prices is None:
        out.print(
            f"  no cost, as there are no prices: luthier estimate --prices-example > {prices_file()}",
            style="dim",
            soft_wrap=True,
        )


def _show_plan(found: Estimate, seconds: float, when: str) -> None:
    from luthier.workflows.estimate.budget import advice, plan

    planned, out = plan(found, seconds), new_console(highlight=False)
    if planned.fits:
        left = format_duration(seconds - planned.needed)
        out.print(f"[bold green]{when}[/bold green]: all of it fits, with {left} to spare")
        return
    text = advice(planned, found.epochs)
    out.print(f"[bold yellow]{when}[/bold yellow]: all of it does not fit. {text}", soft_wrap=True)
