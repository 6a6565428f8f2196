"""Text to a score between 0 and 1. The same grader measures a model and rewards one in training."""

from __future__ import annotations

from collections.abc import Callable

from luthier.graders.exact import exact, first_line

Grader = Callable[[str, str], float]
"""``grade(reply, expected)`` gives a score from 0 to 1."""

GRADERS: dict[str, Grader] = {
    "exact": exact,
    "first_line": first_line,
}

__all__ = ["GRADERS", "Grader", "exact", "first_line"]
