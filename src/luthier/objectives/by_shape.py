"""Default objective for the shape of the rows."""

from __future__ import annotations

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes import describe_shapes
from luthier.data.shapes.choices import MultipleChoice
from luthier.data.shapes.media import MediaRow
from luthier.errors import DataError, Problem, RecipeError
from luthier.objectives import OBJECTIVES, Objective
from luthier.objectives.base import check_base
from luthier.tasks import GENERATION, MASKED_WORDS, Task
from luthier.types import Row


def objective_for(row: Row, chat: ChatFormat) -> Objective:
    """Return the first objective of the table for the row's shape and the tokenizer.

    Raises:
        DataError: if no objective learns from rows of this shape.
    """
    kinds = [kind for kind in OBJECTIVES.values() if row.shape in kind.shapes]
    if not kinds:
        message = f"no objective trains on {describe_shapes([row.shape])} by default."
        fix = (
            "Add replies as `completion`, generate replies with a teacher (`luthier distil`), or train "
            "on rewards with `objective.method=grpo`."
        )
        if isinstance(row, MultipleChoice):
            fix = (
                "Evaluate a model with the rows (`luthier evaluate`). To train, write each prompt with "
                "the right choice as `completion`."
            )
        if isinstance(row, MediaRow):
            choices = [
                f"`objective.method={name}`"
                for name, kind in OBJECTIVES.items()
                if row.shape in kind.shapes | kind.further_shapes
            ]
            fix = (
                f"Set {', or '.join(choices)}, or add labels: a folder for each label, or a table with "
                f'"{row.media.kind}" and "label".'
            )
        raise DataError([Problem("row.objective", message, fix, row.location)])
    # A stable sort: raw text alone changes the order of the table, by the tokenizer.
    later = GENERATION if chat.fills_masks else MASKED_WORDS
    kinds.sort(key=lambda kind: kind.task is later)
    # If no objective suits the base, the check of the first one reports the reason later.
    able = [objective for kind in kinds if _suits(objective := kind.model_validate({}), chat)]
    return able[0] if able else kinds[0].model_validate({})


def task_of(row: Row) -> Task:
    """Return the task of the first objective of the table for the row's shape."""
    kinds = (kind.task for kind in OBJECTIVES.values() if row.shape in kind.shapes)
    return next(kinds, GENERATION)


def needs_writing(row: Row) -> bool:
    """Return whether every default objective for the row's shape needs a base that generates text."""
    tasks = [kind.task for kind in OBJECTIVES.values() if row.shape in kind.shapes]
    return bool(tasks) and all(task is GENERATION for task in tasks)


def _suits(objective: Objective, chat: ChatFormat) -> bool:
    try:
        check_base(objective, chat)
    except RecipeError:
        return False
    return True
