"""From what a caller of Python gives to a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.recipe import Recipe


def fields_of(data: str | Path) -> dict[str, Any]:
    """Fields of a TOML recipe, or those of a recipe for data."""
    from luthier.recipe import read_toml

    text = str(data)
    return read_toml(Path(text)) if text.endswith(".toml") else {"data": {"train": text}}


def recipe_of(data: str | Path | Recipe, fields: Mapping[str, Any]) -> Recipe:
    """The recipe of a data file, a TOML file or a recipe, with ``fields`` by dotted name (``__``).

    Raises:
        RecipeError: for a field that there is not, or fields beside a :class:`~luthier.recipe.Recipe`.
    """
    from luthier.recipe import Recipe

    if isinstance(data, Recipe):
        if fields:
            raise RecipeError("a Recipe is complete; give no further fields beside it")
        return data
    plain = fields_of(data)
    assign_fields(plain, fields)
    return Recipe.parse(plain)


SHORT_NAMES: Mapping[str, str] = {
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
    "seed": "training.seed",
}
"""Fields that may be given without their group, as on the command line."""


def field_path(key: str) -> str:
    """The dotted name of a field from a keyword: ``training__epochs``, or ``epochs`` for short."""
    return SHORT_NAMES.get(key, key.replace("__", "."))


def assign_fields(plain: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Set ``fields``, by keyword, in the plain values of a recipe.

    Raises:
        RecipeError: for a field that is given twice, in short and by its full name.
    """
    from luthier.recipe import assign

    paths: dict[str, str] = {}
    for key, value in fields.items():
        path = field_path(key)
        if path in paths:
            raise RecipeError(f"{paths[path]} and {key} are the same field; give one")
        paths[path] = key
        assign(plain, path.split("."), value)
