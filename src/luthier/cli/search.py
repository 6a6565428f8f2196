"""``luthier search``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.console import (
    extra,
    heavy_imports,
    new_console,
    new_table,
    print_json,
    print_table,
)
from luthier.cli.options import (
    Adaptation,
    Base,
    Columns,
    Data,
    Json,
    LongRows,
    Mix,
    Objective,
    RayAddress,
    RayGpus,
    Resume,
    Settings,
    Validation,
    read_recipe,
    recipe_options,
)
from luthier.errors import RefusedInput

if TYPE_CHECKING:
    from luthier.workflows.search import SearchResult
    from luthier.workflows.trial_processes import TrialRunner


def search(
    data: Data,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try.")] = 12,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="Field to search: KEY=LOW..HIGH or KEY=a,b,c; the rate if none is given."
        ),
    ] = None,
    validation: Validation = None,
    columns: Columns = None,
    mix: Mix = None,
    long_rows: LongRows = None,
    base: Base = None,
    name: Annotated[str | None, typer.Option(help="Name of search and custom model.")] = None,
    objective: Objective = None,
    adaptation: Adaptation = None,
    set_: Settings = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Trials at once, each with a share of the cores. One here, on a cluster as many as "
            "it has room for, at most five.",
        ),
    ] = None,
    ray_address: RayAddress = None,
    ray_gpus: RayGpus = 0.0,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Search for the best settings.

    Poor trials stop early, and the best trial becomes a custom model.
    """
    from luthier.workflows.space import parse_space

    recipe = read_recipe(data, recipe_options(locals()), set_)
    if ray_gpus and ray_address is None:
        raise RefusedInput("--ray-gpus says what trials reserve on a cluster: give --ray-address")
    ranges: Sequence[str] = space or ()
    parse_space(ranges, recipe)  # a wrong space is refused before torch is loaded
    with heavy_imports():
        from luthier.cli.progress import LiveReporter
        from luthier.workflows.search import search as find_settings

    runner: TrialRunner | None = None
    if ray_address is not None:
        with extra("server"):
            from luthier.cluster.ray_commands import RayTrialRunner

        runner = RayTrialRunner(ray_address, ray_gpus)
    with LiveReporter() as reporter:
        found = find_settings(recipe, trials, ranges, resume, reporter, parallel, runner)
    if json_:
        print_json({**asdict(found), "model_id": found.result.model_id})
    else:
        _print(found)


def _print(found: SearchResult) -> None:
    from luthier.cli.tune import print_result

    keys = list(found.trials[0].settings)
    table = new_table("trial", "validation", *keys, "", numbers=("trial", "validation", *keys))
    for place, trial in enumerate(found.trials):
        values = [trial.settings[key] for key in keys]
        settings = [f"{item:.3g}" if isinstance(item, float) else str(item) for item in values]
        state = f"{trial.state}: {trial.reason.splitlines()[0]}" if trial.reason else trial.state
        if trial.state == "complete":
            state = ""
        style = "bold green" if place == 0 else None
        table.add_row(str(trial.number), trial.measurement, *settings, state, style=style)
    out = new_console(highlight=False)
    print_table(table)
    print_result(found.result)
    out.print(f"  recipe      {found.recipe}", soft_wrap=True)
    out.print(f"  again       luthier tune {found.recipe} --name NAME", soft_wrap=True)
