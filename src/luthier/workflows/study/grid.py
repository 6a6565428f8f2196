"""Grid of a study: the recipes of all combinations of values, each once.

On the command line a field is varied as ``KEY=a,b,c``, and in a search also as ``KEY=LOW..HIGH``. A
key is a path in the recipe, such as ``training.learning_rate``, or a key of :data:`SPECIAL`. The
module is light to import, so that an invalid grid is an error before torch is loaded.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.augmentation import Augmentation
from luthier.errors import RecipeError
from luthier.recipe import Recipe, assign, toml_value

MAX_TRAININGS = 200
"""Maximum number of trainings in a study."""
LOG_FROM = 10
"""Ratio of the ends from which a range is searched, and an axis is drawn, on a logarithmic scale."""
SPECIAL = frozenset({"rows", "before", "mix.share"})
"""Keys without a field of the recipe."""
_OF_PRESETS = frozenset({"prompts", "student"})
"""Keys of presets alone."""
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
EARLIER = "earlier ±"
"""Heading of the score of an earlier task."""
FIGURES = {"ms": "ms", "mb": "MB", "minutes": "minutes", "drift": "drift ±", "earlier": EARLIER}
"""Figures with a limit, and their headings in the table. The limit of ``earlier`` is the loss, in
points for shares."""
NONE, ALL = "none", "all"
TEACHER, TAUGHT = "teacher", "taught"
"""Name of a configuration, and value of the key ``student``."""
UNKNOWN_ROWS = 10**12
"""Number of rows before the data is read: any count in a grid is a valid share."""


@dataclass(frozen=True)
class Dimension:
    """A varied field with the values in the given order, or with the ends of a range."""

    key: str
    values: tuple[Any, ...]
    is_range: bool = False

    @property
    def is_whole(self) -> bool:
        """True for a range of whole numbers."""
        return all(isinstance(each, int) for each in self.values)

    @property
    def is_logarithmic(self) -> bool:
        """True for a range over at least one order of magnitude."""
        low, high = self.values
        return bool(low > 0 and high >= LOG_FROM * low)

    def __contains__(self, value: Any) -> bool:
        if not self.is_range:
            return value in self.values
        low, high = self.values
        return isinstance(value, int | float) and low <= value <= high

    def __str__(self) -> str:
        return f"{self.key}={('..' if self.is_range else ',').join(map(str, self.values))}"

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

    def suits(self, input_kind: str) -> bool:
        """Return False for a preset's augmentation of another kind of input."""
        changes = self.settings.get("data.augmentation") if self.label else None
        return Augmentation.model_validate(changes or {}).kinds <= {input_kind}

    def recipe(self, recipe: Recipe, seed: int, rows: int) -> Recipe:
        """Return the recipe of a training of ``recipe`` with these settings.

        ``rows`` is the number of training rows of ``recipe``.

        Raises:
            RecipeError: for a value that the recipe rejects.
        """
        others = SPECIAL | _OF_PRESETS
        fields = {key: value for key, value in self.settings.items() if key not in others}
        fields["training.seed"] = seed
        if recipe.data.split_seed is None:
            fields["data.split_seed"] = recipe.training.seed
        if (count := self.settings.get("rows", ALL)) != ALL:
            # Relative to the share that the recipe itself sets.
            fields["data.train_share"] = count / rows * (recipe.data.train_share or 1.0)
        if (share := self.settings.get("mix.share")) is not None:
            mixed = {**recipe.data.mix[0].model_dump(mode="json"), "weight": share / (1 - share)}
            fields["data.mix"] = [mixed] if share else []
        return with_settings(recipe, fields)


def parse_dimensions(texts: Sequence[str]) -> list[Dimension]:
    """Parse each ``KEY=a,b,c``.

    Raises:
        RecipeError: for an invalid text, a key given twice or a single value.
    """
    dimensions: list[Dimension] = []
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        separator = ".." if _is_range(values) else ","
        parts = tuple(toml_value(part.strip()) for part in dict.fromkeys(values.split(separator)))
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
                f"`--vary {key}` has a single value. List several values, or set `{key}` for all.",
                setting=key,
            )
        if separator == ".." and not (
            len(parts) == 2 and all(type(each) in (int, float) for each in parts)
            and parts[0] < parts[1]
        ):  # fmt: skip
            raise RecipeError(f"`--vary {key}`: write a range as LOW..HIGH.", setting=key)
        dimensions.append(Dimension(key, parts, separator == ".."))
    return dimensions


def _is_range(values: str) -> bool:
    """Return True for ``LOW..HIGH``; paths such as ``none,../file`` have no digit at the dots."""
    return re.search(r"\d\.\.\s*[-.\d]", values) is not None


def grid_of(dimensions: Sequence[Dimension], trials: int | None = None) -> list[Configuration]:
    """Return all combinations of values.

    A search of ``trials`` in a larger space gets some combinations, with each value and the ends of
    ranges.

    Raises:
        RecipeError: for too many combinations, or a range without a search.
    """
    count = math.prod(len(each.values) for each in dimensions)
    for each in dimensions:
        if trials is None and each.is_range:
            raise RecipeError(f"The range `--vary {each}` needs `--search N`.", setting=each.key)
    if count > MAX_TRAININGS and trials is None:
        raise RecipeError(
            f"The grid has {count:,} combinations, more than {MAX_TRAININGS}. Vary fewer fields or "
            "values, or search: `--search 20` with ranges, KEY=LOW..HIGH.",
            setting="vary",
        )
    keys = [each.key for each in dimensions]
    every = itertools.product(*(each.values for each in dimensions))
    combinations = list(itertools.islice(every, MAX_TRAININGS))
    if count > MAX_TRAININGS:  # the first combinations vary only the last fields
        first = combinations[0]
        combinations += [
            (*first[:number], value, *first[number + 1 :])
            for number, each in enumerate(dimensions)
            for value in each.values
        ]
    return [Configuration(dict(zip(keys, values, strict=True))) for values in combinations]


def is_search(dimensions: Sequence[Dimension], trials: int | None) -> bool:
    """Return True if ``trials`` do not suffice for all combinations of values."""
    if trials is None:
        return False
    is_finite = dimensions and not any(each.is_range for each in dimensions)
    return not is_finite or math.prod(len(each.values) for each in dimensions) > trials


def check_grid(
    grid: Sequence[Configuration],
    dimensions: Sequence[Dimension],
    recipe: Recipe,
    seeds: int,
    trials: int | None = None,
) -> None:
    """Check the recipe of each configuration, before the data is read.

    Raises:
        RecipeError: for fewer than two configurations, too many trainings, or an invalid value.
    """
    if len(grid) < 2 and trials is None and not any("prompts" in each.settings for each in grid):
        raise RecipeError(
            "A study needs a varied field: `--vary adaptation.method=lora,full`, or a `--preset`.",
            setting="vary",
        )
    count = trials if is_search(dimensions, trials) and trials else len(grid)
    if seeds * count > MAX_TRAININGS:
        raise RecipeError(
            f"{count:,} combinations with {seeds:,} seeds are {seeds * count:,} trainings, more than "
            f"{MAX_TRAININGS}.",
            setting="seeds",
        )
    for each in dimensions:
        if message := next(_faults(each, recipe), None):
            raise RecipeError(message, setting=each.key)
    for configuration in grid:
        try:
            configuration.recipe(recipe, 0, UNKNOWN_ROWS)
        except RecipeError as error:
            raise RecipeError(f"`{configuration.name}`: {error}", setting="vary") from error


def check_limits(limits: Mapping[str, float], forgetting: bool, earlier: bool = False) -> None:
    """Check the limits of the choice.

    Raises:
        RecipeError: for an unknown figure, a limit that is not above 0, or a limit of the drift or
            of an earlier task without its measurement.
    """
    if unknown := next((name for name in limits if name not in FIGURES), None):
        raise RecipeError(
            f"`at_most`: {unknown!r} is none of {', '.join(FIGURES)}.", setting="at_most"
        )
    for name, limit in limits.items():
        if not limit > 0:
            raise RecipeError(
                f"`at_most` {name}: {limit:g} is not above 0. Write a number such as 20.",
                setting="at_most",
            )
    if "drift" in limits and not forgetting:
        raise RecipeError("`at_most` drift needs `forgetting`.", setting="at_most")
    if "earlier" in limits and not earlier:
        raise RecipeError("`at_most` earlier needs `earlier`.", setting="at_most")


def _faults(dimension: Dimension, recipe: Recipe) -> Iterator[str]:
    """Yield the faults of a key of :data:`SPECIAL` and its values."""
    key = dimension.key
    if key == "rows" and recipe.data.mix:
        yield "`--vary rows` excludes `--mix`: only the rows of the main file can be a part."
    if key == "mix.share" and len(recipe.data.mix) != 1:
        yield "`--vary mix.share` needs one file: `--mix FILE=0.5`. The study sets the ratio."
    for value in dimension.values:
        number = type(value) in (int, float)
        if key == "rows" and value != ALL and (type(value) is not int or value < 1):
            yield f"`--vary rows`: {value!r} is not a number of rows. Write rows=50,200,all."
        elif key == "before" and value != NONE and not Path(str(value)).is_file():
            yield f"`--vary before`: {value} is not a file. Write before=none,FILE."
        elif key == "mix.share" and not (number and 0 <= value < 1):
            yield f"`--vary mix.share`: {value!r} is not a share from 0 to less than 1."


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """Return ``recipe`` with the fields in ``settings`` replaced, or raise :class:`RecipeError`.

    Only explicit fields are kept, so that a new adaptation does not inherit fields of the old
    adaptation.
    """
    fields = deepcopy(recipe.model_dump(mode="json", exclude_unset=True))
    for key, value in settings.items():
        assign(fields, key.split("."), value)
    return Recipe.parse(fields)
