"""``luthier estimate``: time, memory, disk and cost of a tuning before the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from luthier.cli.terminal.bridge import FromText
from luthier.cli.terminal.console import heavy_imports, new_console, new_table, print_table
from luthier.cli.terminal.options import (
    DataSource,
    OptionalAtLeastOne,
    TuningFields,
    parse_duration,
    tuning_recipe,
)
from luthier.errors import RecipeError
from luthier.formatting import format_duration

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.estimate.estimate import Estimate


def estimate(
    data: DataSource,
    *,
    finish_by: str | None = None,
    within: Annotated[float | None, FromText(str, parse_duration)] = None,
    prices: Path | None = None,
    per_month: OptionalAtLeastOne = None,
    reporter: Reporter | None = None,
    **fields: TuningFields,
) -> Estimate:
    """Estimate time, memory, disk and cost of a tuning.

    The estimate comes from a few real training steps.

    Args:
        data: Data file, folder, 'pattern*', s3:// or recipe (.toml).
        finish_by: Plan for a time of day, e.g. 18:00.
        within: Plan for a duration, e.g. 2h or 90m; in Python seconds.
        prices: Price table; prices.toml in LUTHIER_HOME by default.
        per_month: Answers a month, to compare with the endpoints of the table.
        reporter: Receives progress; silent if not given.
        **fields: Fields of the recipe, as in :func:`luthier.tune`.

    Returns:
        ``seconds``, ``memory``, ``disk`` and ``tokens`` with an interval, the ``cost`` if prices are
        known, and the ``plan`` for a deadline.

    Raises:
        RefusedInput: for invalid data or settings.
    """
    from luthier.workflows.estimate.budget import (
        check_load,
        cost_of,
        monthly_costs,
        plan,
        read_prices,
        seconds_until,
    )

    recipe = tuning_recipe(data, fields)
    table = read_prices(prices)
    check_load(per_month, table)
    if per_month and table and not table.endpoints:
        raise RecipeError("`per_month` needs `[endpoints.NAME]` in the price table.")
    if finish_by and within:
        raise RecipeError("`finish_by` and `within` exclude each other")
    if finish_by:
        seconds_until(finish_by)  # an invalid time is an error before the trial steps
    with heavy_imports():
        from luthier.workflows.estimate.estimate import estimate as run

    found = run(recipe, reporter)
    # The trial steps used part of the time.
    seconds = seconds_until(finish_by) if finish_by else within
    return replace(
        found,
        cost=cost_of(found, table) if table else None,
        plan=plan(found, seconds) if seconds is not None else None,
        monthly=monthly_costs(found, table, per_month) if table and per_month else (),
    )


def show_estimate(found: Estimate) -> None:
    """Print an estimate, and the plan for the deadline."""
    from luthier.engine.timings import PARTS
    from luthier.workflows.estimate.budget import advice, prices_file

    out = new_console(highlight=False, soft_wrap=True)
    refit = f", and up to {found.refit_steps:,} steps on all rows" if found.refit_steps else ""
    out.print(
        f"[bold]{found.objective}[/bold] with [bold]{found.adaptation}[/bold] on "
        f"[bold]{found.base}[/bold]: {found.rows:,} rows, {found.steps:,} steps, "
        f"{found.epochs:g} epoch{'s' * (found.epochs != 1)}{refit}"
    )
    table = new_table("", "estimate", "90 % interval", "", numbers=("estimate", "90 % interval"))

    def add(name: str, value: str, interval: str, remark: str = "") -> None:
        table.add_row(f"  {name}", f"[bold]{value}[/bold]", interval, remark)

    time, memory, cost = found.seconds, found.memory, found.cost
    interval = f"{format_duration(time.low)} to {format_duration(time.high)}"
    add("time", format_duration(time.value), interval, "without early stopping")
    interval = f"{memory.low / 1e9:.2f} to {memory.high / 1e9:.2f} GB"
    add("peak memory", f"{memory.value / 1e9:.2f} GB", interval)
    add("disk", f"{found.disk.value / 1e6:,.0f} MB", f"at most {found.disk.high / 1e6:,.0f} MB")
    add("tokens", f"{found.tokens.value:,.0f}", "", f"{found.learned.value:,.0f} with loss")
    if cost is not None:
        add("cost", f"{cost.value:.2f} {cost.currency}", f"{cost.low:.2f} to {cost.high:.2f}")
    print_table(table)
    whole = sum(part.value for part in found.parts.values()) or 1.0
    for name, part in sorted(found.parts.items(), key=lambda item: -item[1].value):
        if part.value > 0.02 * whole:
            out.print(f"    {part.value / whole:>4.0%}  {PARTS[name]}", style="dim")
    if cost is None:
        out.print(f"  For a cost, write a price table to {prices_file()}", style="dim")
    for month in found.monthly:
        out.print(f"  {month.verdict()}")
    if (planned := found.plan) is None:
        return
    if planned.fits:
        left = format_duration(planned.seconds - planned.needed)
        out.print(f"[bold green]The run fits[/bold green], with {left} to spare")
    else:
        text = advice(planned, found.epochs)
        out.print(f"[bold yellow]The run does not fit.[/bold yellow] Instead: {text}")
