"""``luthier search`` and its range test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from luthier.cli.console import LiveReporter, heavy_imports, print_json
from luthier.cli.tuning import print_result, recipe_of

if TYPE_CHECKING:
    from luthier.engine.search import Found
    from luthier.engine.trials import Trial


def search(
    data: str,
    flags: Mapping[str, Any],
    settings: Sequence[str],
    trials: int,
    space: Sequence[str],
    parallel: int,
    resume: bool,
    as_json: bool,
) -> None:
    """Build the recipe, search, print the trials and the stored model."""
    from luthier.engine.space import parse_space

    recipe = recipe_of(data, flags, settings)
    parse_space(space, recipe)  # a wrong space is refused before torch is loaded
    with heavy_imports():
        from luthier.engine.search import search as find_settings

    with closing(LiveReporter(quiet=as_json)) as reporter:
        found = find_settings(recipe, trials, space, resume, reporter, parallel)
    if as_json:
        print_json({**asdict(found), "model_id": found.result.model_id})
    else:
        _print(found)


def range_test(data: str, flags: Mapping[str, Any], settings: Sequence[str], as_json: bool) -> None:
    """Run a range test of the learning rate, print what it suggests."""
    recipe = recipe_of(data, flags, settings)
    with heavy_imports():
        from luthier.engine.range_test import range_test as find_rate

    with closing(LiveReporter(quiet=as_json)) as reporter:
        found = find_rate(recipe, reporter)
    if as_json:
        print_json(asdict(found))
        return
    from luthier.cli.console import new_console

    out = new_console(highlight=False)
    out.print(f"learning rate [bold green]{found.suggested:.1e}[/bold green] is suggested")
    out.print(
        f"  the loss falls fastest at {found.steepest:.1e}; a tenth of the rate of the lowest loss "
        f"is {found.tenth:.1e}"
    )
    low, high = found.suggested / 4, found.suggested * 4
    out.print(f"  plot     {found.picture}", soft_wrap=True)
    out.print(
        f"  use it   luthier tune {data} --learning-rate {found.suggested:.1e}", soft_wrap=True
    )
    space = f"training.learning_rate={low:.1e}..{high:.1e}"
    out.print(f"  or       luthier search {data} --space {space}", soft_wrap=True)


def _print(found: Found) -> None:
    from rich.table import Table

    from luthier.cli.console import new_console

    out = new_console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("trial", justify="right")
    table.add_column("validation", justify="right")
    keys = list(found.trials[0].settings)
    for key in keys:
        table.add_column(key, justify="right")
    table.add_column("")
    for place, trial in enumerate(found.trials):
        table.add_row(*_cells(trial, keys), style="bold green" if place == 0 else None)
    out.print(table)
    print_result(found.result)
    out.print(f"  recipe      {found.recipe}", soft_wrap=True)
    out.print(f"  again       luthier tune {found.recipe} --name NAME", soft_wrap=True)


def _cells(trial: Trial, keys: Sequence[str]) -> list[str]:
    shown = [trial.settings[key] for key in keys]
    settings = [f"{item:.3g}" if isinstance(item, float) else str(item) for item in shown]
    state = trial.state if not trial.reason else f"{trial.state}: {trial.reason.splitlines()[0]}"
    return [
        str(trial.number),
        trial.measured,
        *settings,
        "" if trial.state == "complete" else state,
    ]
