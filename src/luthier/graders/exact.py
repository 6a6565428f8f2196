"""Graders that compare texts as they are."""

from __future__ import annotations

import string
import unicodedata
from typing import Literal

from luthier.graders.base import Answer, Grader


class Exact(Grader):
    """1 when both texts are equal but for white space at their ends."""

    method: Literal["exact"] = "exact"
    ignore_case: bool = False
    """Take upper and lower case for the same letter."""
    ignore_punctuation: bool = False
    """Leave out punctuation, and take any run of white space for one blank."""

    watched = False

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        return float(self._plain(answer.reply) == self._plain(self.expected_of(answer)))

    def _plain(self, text: str) -> str:
        text = text.casefold() if self.ignore_case else text
        return (
            " ".join(without_punctuation(text).split()) if self.ignore_punctuation else text.strip()
        )


class FirstLine(Exact):
    """1 when the first lines are equal: for replies that begin with a label."""

    method: Literal["first_line"] = "first_line"  # type: ignore[assignment]

    def _plain(self, text: str) -> str:
        return super()._plain(text.strip().partition("\n")[0])


def without_punctuation(text: str) -> str:
    """``text`` without ASCII's punctuation and symbols, and all that Unicode calls punctuation."""
    return "".join(
        c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P"
    )
