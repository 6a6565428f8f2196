"""``luthier search``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.console import LiveReporter, heavy_imports, print_json
from luthier.cli.tuning import print_result, recipe_of

if TYPE_CHECKING:
    from luthier.engine.search import Found, Trial


def search(
    data: Path,
    flags: Mapping[str, Any],
    settings: Sequence[str],
    trials: int,
    space: Sequence[str],
    resume: bool,
    as_json: bool,
) -> None:
    """Build the recipe, search, print the trials and the stored model."""
    from luthier.engine.space import parse_space

    recipe = recipe_of(data, flags, settings)
    parse_space(space, recipe)  # a wrong space is refused before torch is loaded
    with heavy_imports():
        from luthier.engine.search import search as find_settings

    reporter = LiveReporter(quiet=as_json)
    try:
        found = find_settings(recipe, trials, space, resume, reporter)
    finally:
        reporter.close()
    if as_json:
        print_json({**asdict(found), "model_id": found.result.model_id})
    else:
        _print(found)


def _print(found: Found) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
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
    value = "" if trial.value is None else f"{trial.value:.4f}"
    shown = [trial.settings[key] for key in keys]
    settings = [f"{item:.3g}" if isinstance(item, float) else str(item) for item in shown]
    state = trial.state if not trial.reason else f"{trial.state}: {trial.reason.splitlines()[0]}"
    return [str(trial.number), value, *settings, "" if trial.state == "complete" else state]
