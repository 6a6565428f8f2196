"""Grid of a study: the recipes of all combinations of values, each once.

On the command line a field is varied as ``KEY=a,b,c``. A key is a path in the recipe, such as
``training.learning_rate``, or a key of :data:`SPECIAL`. The module is light to import, so that an
invalid grid is an error before torch is loaded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.recipe import Recipe, toml_value
from luthier.workflows.space import with_settings

MAX_TRAININGS = 200
"""Maximum number of trainings in a study. Use ``luthier search`` for more."""
SPECIAL = frozenset({"rows", "before", "mix.share"})
"""Keys without a field of the recipe."""
FIXED = frozenset(
    {
        "name", "training.seed", "training.refit", "training.track", "training.baseline_seconds",
        *(f"data.{field}" for field in (
            "train", "validation", "validation_share", "test_share", "split_seed", "group_column",
            "columns", "long_rows",
        )),
    }
)  # fmt: skip
"""Fields that a study sets, or that change the held-out rows."""
_GROUPS = ("base", "objective", "adaptation")
NONE, ALL = "none", "all"
_UNKNOWN = 10**12
"""Number of rows before the data is read: any count in a grid is a valid share."""


@dataclass(frozen=True)
class Dimension:
    """A varied field with the values in the given order."""

    key: str
    values: tuple[Any, ...]

    @property
    def is_ordered(self) -> bool:
        """True if the values are numbers, such as rows or rates."""
        return all(type(each) in (int, float) or each == ALL for each in self.values)


@dataclass(frozen=True)
class Configuration:
    """A combination of values."""

    settings: Mapping[str, Any]
    """Value of each varied key."""
    label: str = ""
    """Name of a combination of a preset."""

    @property
    def name(self) -> str:
        """The values as text; the key is added to numbers and truth values."""
        return self.label or ", ".join(
            str(value)
            if isinstance(value, str) and key != "rows"
            else f"{key.rpartition('.')[2]} {value}"
            for key, value in self.settings.items()
        )

    def recipe(self, recipe: Recipe, seed: int, rows: int) -> Recipe:
        """Return the recipe of a training of ``recipe`` with these settings.

        ``rows`` is the number of training rows of ``recipe``.

        Raises:
            RecipeError: for a value that the recipe rejects.
        """
        fields = {key: value for key, value in self.settings.items() if key not in SPECIAL}
        fields["training.seed"] = seed
        fields["data.split_seed"] = _split_seed(recipe)
        if (count := self.settings.get("rows", ALL)) != ALL:
            # Relative to the share that the recipe itself sets.
            fields["data.train_share"] = count / rows * (recipe.data.train_share or 1.0)
        if (share := self.settings.get("mix.share")) is not None:
            mixed = {**recipe.data.mix[0].model_dump(mode="json"), "weight": share / (1 - share)}
            fields["data.mix"] = [mixed] if share else []
        return with_settings(recipe, fields)


def _split_seed(recipe: Recipe) -> int:
    seed = recipe.data.split_seed
    return recipe.training.seed if seed is None else seed


def parse_dimensions(texts: Sequence[str]) -> list[Dimension]:
    """Parse each ``KEY=a,b,c``.

    Raises:
        RecipeError: for an invalid text, a key given twice or a single value.
    """
    dimensions: list[Dimension] = []
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        parts = tuple(toml_value(part.strip()) for part in dict.fromkeys(values.split(",")))
        is_known = "." in key or key in {*SPECIAL, *_GROUPS}
        if not equals or not is_known or "" in parts or any(c in values for c in "[]{}"):
            raise RecipeError(
                f"`--vary` {text!r} is invalid. Write KEY=a,b,c, such as "
                "adaptation.method=lora,full.",
                setting="vary",
            )
        if key in FIXED:
            raise RecipeError(
                f"`--vary {key}`: all trainings of a study have the same {key}.", setting=key
            )
        if any(key == each.key for each in dimensions):
            raise RecipeError(f"`--vary {key}` is given twice. List all values once.", setting=key)
        if len(parts) < 2:
            raise RecipeError(
                f"`--vary {key}` has a single value. Use `--set {key}={parts[0]}`.", setting=key
            )
        dimensions.append(Dimension(key, parts))
    return dimensions


def grid_of(dimensions: Sequence[Dimension]) -> list[Configuration]:
    """Return all combinations of values.

    Raises:
        RecipeError: for too many combinations.
    """
    count = math.prod(len(each.values) for each in dimensions)
    if count > MAX_TRAININGS:
        raise RecipeError(
            f"The grid has {count:,} combinations, more than {MAX_TRAININGS}. Vary fewer fields or "
            "values, or use `luthier search`.",
            setting="vary",
        )
    keys = [each.key for each in dimensions]
    combinations = itertools.product(*(each.values for each in dimensions))
    return [Configuration(dict(zip(keys, values, strict=True))) for values in combinations]


def check_grid(
    grid: Sequence[Configuration], dimensions: Sequence[Dimension], recipe: Recipe, seeds: int
) -> None:
    """Check the recipe of each configuration, before the data is read.

    Raises:
        RecipeError: for fewer than two configurations, too many trainings, or an invalid value.
    """
    if len(grid) < 2:
        raise RecipeError(
            "A study needs a varied field: `--vary adaptation.method=lora,full`, or a `--preset`.",
            setting="vary",
        )
    if seeds * len(grid) > MAX_TRAININGS:
        raise RecipeError(
            f"{len(grid):,} combinations with {seeds:,} seeds are {seeds * len(grid):,} trainings, "
            f"more than {MAX_TRAININGS}.",
            setting="seeds",
        )
    for each in dimensions:
        if each.key in _CHECKS:
            _CHECKS[each.key](each, recipe)
    for configuration in grid:
        try:
            configuration.recipe(recipe, 0, _UNKNOWN)
        except RecipeError as error:
            raise RecipeError(f"`{configuration.name}`: {error}", setting="vary") from error


def _check_rows(dimension: Dimension, recipe: Recipe) -> None:
    if recipe.data.mix:
        message = "`--vary rows` excludes `--mix`: only the rows of the main file can be a part."
        raise RecipeError(message, setting="rows")
    for value in dimension.values:
        if value != ALL and (type(value) is not int or value < 1):
            message = f"`--vary rows`: {value!r} is not a number of rows. Write rows=50,200,all."
            raise RecipeError(message, setting="rows")


def _check_before(dimension: Dimension, recipe: Recipe) -> None:
    for value in dimension.values:
        if value != NONE and not Path(str(value)).is_file():
            message = f"`--vary before`: {value} is not a file. Write before=none,FILE."
            raise RecipeError(message, setting="before")


def _check_mix(dimension: Dimension, recipe: Recipe) -> None:
    if len(recipe.data.mix) != 1:
        message = "`--vary mix.share` needs one file: `--mix FILE=0.5`. The study sets the ratio."
        raise RecipeError(message, setting="mix.share")
    for value in dimension.values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            message = f"`--vary mix.share`: {value!r} is not a share from 0 to less than 1."
            raise RecipeError(message, setting="mix.share")


_CHECKS: Mapping[str, Callable[[Dimension, Recipe], None]] = {
    "rows": _check_rows,
    "before": _check_before,
    "mix.share": _check_mix,
}
