"""A teacher's knowledge into a smaller student.

By ``responses`` the student is tuned on what the teacher answers (``responses.py``). The other
methods use what the teacher thinks, not only what it says, and an objective does the work: the
rows' own replies are what both networks read. Where rows are prompts alone, the teacher answers
them first, as for ``responses``, and the student learns the teacher's distribution on those
answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.data.rows import load_rows
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.sources import hash_of
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
    """Carry out ``recipe`` by the method it names; the student is stored and verified.

    So many ``processes`` of this machine share its training; a teacher is asked by this one.

    Raises:
        RefusedInput: before the teacher is asked, for what cannot work; after, where too few of its
            answers are accepted.
        Interrupted: on Ctrl-C; with ``resume`` the same call goes on.
        LuthierError: where the teacher cannot be reached any more; the same holds.
    """
    if recipe.method not in METHODS:
        raise RecipeError(f"unknown method {recipe.method!r}; there are {', '.join(METHODS)}")
    method = by_responses if recipe.method == "responses" else by_objective
    made = method(recipe, resume, reporter or Reporter(), processes)
    certify(made.result.model_id)
    return made


def by_objective(
    recipe: DistilRecipe, resume: bool, reporter: Reporter, processes: int = 1
) -> Distilled:
    """Train the student with the objective of ``recipe.method``, the teacher beside it."""
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
    further = {"distillation": lineage}
    result = train_in_processes(recipe.tuning_recipe(), processes, resume, reporter, further)
    return Distilled(result, lineage)


def _objective(recipe: DistilRecipe) -> Objective:
    name = OBJECTIVE_OF[recipe.method]
    if recipe.teacher.url is not None:
        raise RecipeError(
            f"method {recipe.method} compares the networks themselves, and {recipe.teacher.url} gives "
            "texts only. Use `method=responses`, or a teacher on this machine",
            rule="teacher.network",
        )
    fields = {} if recipe.objective is None else recipe.objective.model_dump(exclude_unset=True)
    if fields.get("method", name) != name:
        raise RecipeError(
            f"method {recipe.method} trains with objective {name}, and {fields['method']} was asked "
            "for; leave objective.method out",
            rule="objective.conflict",
        )
    fields |= {"method": name, "teacher": recipe.teacher.model}
    return OBJECTIVES[name].model_validate(fields)


def _has_bare_prompts(recipe: DistilRecipe, objective: Objective) -> bool:
    """Whether the rows are prompts, and what is learned are replies."""
    if "prompt" not in objective.shapes | objective.further_shapes:
        return False
    first = load_rows(recipe.data.train, recipe.data.columns)[0]
    return not isinstance(first, PromptCompletion | Conversation)
