"""Grading the form of a reply."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from luthier.graders.base import Answer, Grader
from luthier.graders.patterns import check_pattern, found


class Regex(Grader):
    r"""1 when a regular expression matches the reply: for its form, whatever it says.

    For R1's format (DeepSeek-AI 2025, section 2.2.2), for example:
    ``pattern = '(?s)\s*<think>.+</think>\s*<answer>.+</answer>\s*'`` with ``match = "whole"``.
    Patterns are those of the ``regex`` library, which knows a time limit: one search that takes more
    than a second is an error.
    """

    method: Literal["regex"] = "regex"
    pattern: Annotated[str, AfterValidator(check_pattern)]
    """The regular expression; ``(?s)`` in front lets the dot match line ends, ``(?i)`` ignores case."""
    match: Literal["search", "whole"] = "search"
    """Whether it must match somewhere in the reply or the whole of it."""

    needs_expected = False

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        reply = answer.check_length(answer.reply, "the reply")
        return float(found(self.pattern, reply, whole=self.match == "whole"))
