"""``luthier search``: hyperparameter search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.cli.terminal.console import extra, heavy_imports, new_console, new_table, print_table
from luthier.cli.terminal.options import (
    AtLeastOne,
    DataSource,
    OptionalAtLeastOne,
    RayAddress,
    TuningFields,
    tuning_recipe,
)
from luthier.errors import RefusedInput

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.search import SearchResult
    from luthier.workflows.trial_processes import TrialRunner


def search(
    data: DataSource,
    *,
    trials: AtLeastOne = 12,
    space: Sequence[str] = (),
    parallel: OptionalAtLeastOne = None,
    ray_address: RayAddress = None,
    ray_gpus: float = 0.0,
    resume: bool = False,
    reporter: Reporter | None = None,
    **fields: TuningFields,
) -> SearchResult:
    """Search for the best settings.

    Poor trials stop early, and the best trial becomes a custom model.

    Args:
        data: Data file, folder, 'pattern*', s3:// or recipe (.toml).
        trials: Number of settings to try.
        space: Field to search: KEY=LOW..HIGH or KEY=a,b,c; repeatable.
        parallel: Trials at the same time; at most 5 on a cluster.
        ray_address: Head of a Ray cluster that runs the trials.
        ray_gpus: GPUs that each trial reserves on a node.
        resume: Resume an interrupted search.
        reporter: Receives progress; silent if not given.
        **fields: Fields of the recipe, as in :func:`luthier.tune`.

    Returns:
        The trials, best first, the recipe found and the run that stored its model.

    Raises:
        RefusedInput: before training, for invalid data, settings or space.
    """
    from luthier.workflows.space import parse_space

    recipe = tuning_recipe(data, fields)
    if ray_gpus and ray_address is None:
        raise RefusedInput("--ray-gpus needs --ray-address")
    parse_space(space, recipe)  # an invalid space is an error before torch is loaded
    with heavy_imports():
        from luthier.workflows.search import search as run

    runner: TrialRunner | None = None
    if ray_address is not None:
        with extra("server"):
            from luthier.cluster.ray_commands import RayTrialRunner

        runner = RayTrialRunner(ray_address, ray_gpus)
    return run(recipe, trials, space, resume, reporter, parallel, runner)


def show_search(found: SearchResult) -> None:
    """Print the trials, the best run and the recipe's path."""
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
    out = new_console(highlight=False, soft_wrap=True)
    print_table(table)
    print_result(found.result)
    out.print(f"  recipe      {found.recipe}")
    out.print(f"  tune again  luthier tune {found.recipe} --name NAME")
