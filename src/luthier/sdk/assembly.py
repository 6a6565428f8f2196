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
    from luthier.recipe import Recipe, assign

    if isinstance(data, Recipe):
        if fields:
            raise RecipeError("a Recipe is complete; give no further fields beside it")
        return data
    plain = fields_of(data)
    for key, value in fields.items():
        assign(plain, key.split("__"), value)
    return Recipe.parse(plain)
