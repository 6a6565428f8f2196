"""Which objective learns from rows of a shape, where none was asked for."""

from __future__ import annotations

from collections.abc import Iterable

from luthier.data.chat import ChatFormat
from luthier.errors import DataError, Problem, RecipeError
from luthier.objectives import OBJECTIVES, Objective
from luthier.types import Row

_FIELDS = {
    "rejected": "preference",
    "desirable": "thumb",
    "reply": "rated",
    "messages": "messages",
    "completion": "prompt",
    "prompt": "prompt_only",
    "label": "label",
    "rating": "rating",
    "tags": "tags",
    "positive": "pair",
    "text": "text",
}
"""What tells the shape of a row, in the order it is asked."""
_SHAPES = {
    "preference": "chosen and rejected answers",
    "thumb": "answers with a thumb",
    "rated": "answers with a rating",
    "prompt": "prompt and completion",
    "prompt_only": "a prompt without a reply",
    "messages": "messages",
    "text": "raw text",
    "label": "text with labels",
    "rating": "text with ratings",
    "tags": "tokens with tags",
    "pair": "pairs of anchor and positive",
}


def shape_of(row: Row) -> str:
    """Name of the shape of a row, as objectives give them in ``shapes``."""
    for name, shape in _FIELDS.items():
        if getattr(row, name) is not None:
            return shape
    raise ValueError("a row of no shape")


def shapes_named(shapes: Iterable[str]) -> str:
    """Shapes in words."""
    *others, last = (_SHAPES[shape] for shape in sorted(shapes))
    return f"{', '.join(others)} or {last}" if others else last


def objective_for(row: Row, chat: ChatFormat) -> Objective:
    """The first objective of the table that learns from rows of this shape, on this tokenizer.

    Raises:
        DataError: where there is nothing to learn in such rows.
    """
    masks = chat.tokenizer.mask_token_id is not None
    tasks = ("masked_lm", "causal_lm") if masks else ("causal_lm", "masked_lm")
    shape = shape_of(row)
    kinds = [kind for kind in OBJECTIVES.values() if shape in kind.shapes and kind.by_itself]
    if not kinds:
        raise DataError([unlearned(row, f"there is nothing to learn in {shapes_named([shape])}.")])
    kinds.sort(key=lambda kind: tasks.index(kind.task) if kind.task in tasks else 0)
    able = [objective for kind in kinds if _suits(objective := kind.model_validate({}), chat)]
    return able[0] if able else kinds[0].model_validate({})


def _suits(objective: Objective, chat: ChatFormat) -> bool:
    try:
        objective.check(chat)
    except RecipeError:
        return False
    return True


def unlearned(row: Row, message: str) -> Problem:
    """A row that holds nothing to learn by itself: a prompt without a reply."""
    fix = (
        "Add the replies as `completion`, or let a teacher write them with `luthier distil`, or "
        "learn from what replies are worth with `objective.method=grpo`."
    )
    return Problem(row.file, row.line, "row.objective", message, fix)
