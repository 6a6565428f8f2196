"""Measuring a generating model on held-out rows: ask each prompt, grade each answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from luthier.evaluation.evaluate import Evaluation, grade, questions

if TYPE_CHECKING:
    from luthier.graders import Grader
    from luthier.serving.generation import Generator
    from luthier.types import Row


def measure(
    generator: Generator,
    rows: Sequence[Row],
    graders: Mapping[str, Grader],
    max_tokens: int,
    done: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Greedy replies to ``rows``, graded; ``done`` hears how many are finished."""
    from luthier.serving.generation import Sampling

    asked, _ = questions(rows)
    replies = generator.replies(asked, Sampling(max_tokens=max_tokens), done=done)
    return grade(rows, replies, graders)
