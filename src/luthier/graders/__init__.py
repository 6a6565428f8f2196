"""Text to a score between 0 and 1. The same grader measures a model and rewards one in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luthier.errors import RecipeError
from luthier.graders.exact import exact, first_line

Grader = Callable[[str, str], float]
"""``grade(reply, expected)`` gives a score from 0 to 1."""

GRADERS: dict[str, Grader] = {
    "exact": exact,
    "first_line": first_line,
}


def graders_named(names: Sequence[str]) -> dict[str, Grader]:
    """The graders called ``names``; :class:`RecipeError` for one that there is not."""
    unknown = [name for name in names if name not in GRADERS]
    if unknown:
        raise RecipeError(f"unknown grader {unknown[0]!r}; there are {', '.join(GRADERS)}")
    return {name: GRADERS[name] for name in names}


__all__ = ["GRADERS", "Grader", "exact", "first_line", "graders_named"]
