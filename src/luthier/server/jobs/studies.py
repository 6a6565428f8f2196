"""Configurations of a study on the server, and checks of a new study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from luthier.errors import RecipeError
from luthier.recipe import Recipe, assign
from luthier.server.jobs.data import check_first_rows
from luthier.server.jobs.submit import Submission, recipe_of
from luthier.server.stores.locations import Locations
from luthier.server.tables.measurements import MeasuredModel
from luthier.workflows.study.grid import (
    SPECIAL,
    Configuration,
    Dimension,
    check_grid,
    check_limits,
)
from luthier.workflows.study.presets import PRESETS, grid_from

ROWS = "rows"
"""Key without a field of the recipe that a client may vary: the others need files of the server."""
PRESETS_HERE = tuple(
    name for name, each in PRESETS.items() if not each.needs_file and name != "student"
)
"""Presets without further files and without models that stay in the library."""


def configurations_of(
    request: Mapping[str, Any], models: Sequence[MeasuredModel]
) -> tuple[list[Configuration], list[Dimension]]:
    """Return the configurations and dimensions of a request, with stored ids as bases.

    Raises:
        RecipeError: for an invalid grid, or a key or preset that clients cannot use.
    """
    preset = request["preset"]
    # Before any look at a file that the preset names.
    if (preset or "").partition("=")[0] in PRESETS.keys() - {*PRESETS_HERE}:
        raise RecipeError(
            f"The preset {preset!r} needs files next to the rows. Use `luthier study`, or one of "
            f"{', '.join(PRESETS_HERE)}.",
            setting="preset",
        )
    grid, dimensions = grid_from(preset, request["vary"], request["search"])
    for key in {key for each in grid for key in each.settings}:
        if key in SPECIAL and key != ROWS:
            message = f"`{key}` needs files next to the rows. Use `luthier study`."
            raise RecipeError(message, setting="vary")
    ids = {each["name"]: each["stored_id"] for each in models}
    if missing := bases_of(dimensions) - ids.keys():
        raise RecipeError(f"There is no model {missing.pop()!r}.", setting="vary")
    for number, each in enumerate(dimensions):
        if each.key == "base":
            dimensions[number] = replace(each, values=tuple(ids[str(v)] for v in each.values))
    for number, one in enumerate(grid):
        if "base" in one.settings:
            base = ids[str(one.settings["base"])]
            grid[number] = replace(one, settings={**one.settings, "base": base})
    return grid, dimensions


def bases_of(dimensions: Sequence[Dimension]) -> set[str]:
    """Return the varied base models."""
    return {str(value) for each in dimensions if each.key == "base" for value in each.values}


def check_study(
    locations: Locations,
    submission: Submission,
    request: Mapping[str, Any],
    models: Sequence[MeasuredModel],
) -> Recipe:
    """Check a new study, and return the recipe that all trainings share.

    Raises:
        RefusedInput: for a study that would fail.
    """
    recipe = recipe_of(submission, "study")
    grid, dimensions = configurations_of(request, models)
    check_grid(grid, dimensions, recipe, request["seeds"], request["search"])
    check_limits(request["at_most"], request["forgetting"])
    if request["search"] and find_spec("optuna") is None:
        message = "The server has no optuna. Install luthier[search], or vary values."
        raise RecipeError(message, setting="search")
    for each in grid:
        fields: dict[str, Any] = {group: dict(own) for group, own in submission.settings.items()}
        for key, value in each.settings.items():
            if key not in (ROWS, "base"):
                assign(fields, key.split("."), value)
        # A varied field obeys the rules of a job's settings.
        recipe_of(replace(submission, settings=fields), "study")
    if request["earlier"]:
        locations.check(submission.account, request["earlier"])
    check_first_rows(locations, submission)
    return recipe
