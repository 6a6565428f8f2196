"""A teacher's knowledge into a smaller student. One file for each method; this table is the map."""

from __future__ import annotations

from luthier.distillation.base import Distilled, Method
from luthier.distillation.objectives import by_objective
from luthier.distillation.recipe import OBJECTIVE_OF, DistilRecipe
from luthier.distillation.responses import by_responses
from luthier.engine.metrics import Reporter
from luthier.errors import RecipeError

METHODS: dict[str, Method] = {
    "responses": by_responses,
    **dict.fromkeys(OBJECTIVE_OF, by_objective),
}


def distil(
    recipe: DistilRecipe, resume: bool = False, reporter: Reporter | None = None
) -> Distilled:
    """Carry out ``recipe`` by the method it names; the student is stored and verified.

    Raises:
        RefusedInput: before the teacher is asked, for what cannot work; after, where too few of its
            answers are accepted.
        Interrupted: on Ctrl-C; with ``resume`` the same call goes on.
        LuthierError: where the teacher cannot be reached any more; the same holds.
    """
    if recipe.method not in METHODS:
        raise RecipeError(f"unknown method {recipe.method!r}; there are {', '.join(METHODS)}")
    return METHODS[recipe.method](recipe, resume, reporter or Reporter())


__all__ = ["METHODS", "DistilRecipe", "Distilled", "Method", "distil"]
