"""Distillation of a teacher into a smaller student.

The method ``responses`` tunes the student on the teacher's answers (``responses.py``). All further
methods are objectives that compare the networks on the rows' own replies. For rows of prompts
alone, the teacher answers the prompts first, and the student learns the teacher's distribution on
the answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.data.files.sources import hash_of
from luthier.data.rows import load_rows
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.engine.metrics import Reporter
from luthier.errors import RecipeError
from luthier.objectives import OBJECTIVES
from luthier.workflows.certificate.certificate import certify
from luthier.workflows.distil.recipe import OBJECTIVE_OF, DistilRecipe
from luthier.workflows.distil.responses import Distilled, by_responses

if TYPE_CHECKING:
    from luthier.objectives import Objective


METHODS = ("responses", *OBJECTIVE_OF)


def distil(
    recipe: DistilRecipe,
    resume: bool = False,
    reporter: Reporter | None = None,
    processes: int = 1,
) -> Distilled:
    """Carry out ``recipe``, and store and verify the student.

    ``processes`` of this machine share the training. This process queries the teacher.

    Raises:
        RefusedInput: before the teacher is queried, for an invalid request; afterwards, for too few
            accepted answers.
        Interrupted: on Ctrl-C; the same call with ``resume`` continues.
        LuthierError: if the teacher cannot be reached; the same call with ``resume`` continues.
    """
    if recipe.method not in METHODS:
        raise RecipeError(f"Unknown method {recipe.method!r}. Choose from {', '.join(METHODS)}.")
    method = by_responses if recipe.method == "responses" else by_objective
    distilled = method(recipe, resume, reporter or Reporter(), processes)
    certify(distilled.result.model_id)
    return distilled


def by_objective(
    recipe: DistilRecipe, resume: bool, reporter: Reporter, processes: int = 1
) -> Distilled:
    """Train the student with the objective of ``recipe.method`` and the teacher's network."""
    objective = _objective(recipe)
    recipe = recipe.model_copy(update={"objective": objective})
    if _has_bare_prompts(recipe, objective):
        return by_responses(recipe, resume, reporter, processes)
    from luthier.engine.processes import train_in_processes

    rows = recipe.data.train
    lineage = {
        "method": recipe.method,
        "teacher": {"model": recipe.teacher.model},
        "rows": {"file": str(rows), "sha256": hash_of(rows)},
    }
    origin = {"distillation": lineage}
    result = train_in_processes(recipe.tuning_recipe(), processes, resume, reporter, origin)
    return Distilled(result, lineage)


def _objective(recipe: DistilRecipe) -> Objective:
    name = OBJECTIVE_OF[recipe.method]
    if recipe.teacher.url is not None:
        raise RecipeError(
            f"Method {recipe.method} compares networks, and {recipe.teacher.url} returns text only. "
            "Use `method=responses`, or a teacher on this machine.",
            rule="teacher.network",
        )
    fields = {} if recipe.objective is None else recipe.objective.model_dump(exclude_unset=True)
    if fields.get("method", name) != name:
        raise RecipeError(
            f"Method {recipe.method} trains with objective {name}, not {fields['method']}. Remove "
            "`objective.method`.",
            rule="objective.conflict",
        )
    fields |= {"method": name, "teacher": recipe.teacher.model}
    return OBJECTIVES[name].model_validate(fields)


def _has_bare_prompts(recipe: DistilRecipe, objective: Objective) -> bool:
    """Return whether the rows are prompts without the replies to learn."""
    if "prompt" not in objective.shapes | objective.further_shapes:
        return False
    first = load_rows(recipe.data.train, recipe.data.columns)[0]
    return not isinstance(first, PromptCompletion | Conversation)
