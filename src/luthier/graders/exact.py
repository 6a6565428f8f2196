"""Exact comparison of texts."""

from __future__ import annotations

import string
import unicodedata
from typing import ClassVar, Literal

from luthier.graders.base import Answer, Grader


class Exact(Grader):
    """1 if both texts are equal, without white space at their ends."""

    method: Literal["exact"] = "exact"
    ignore_case: bool = False
    """Ignore case."""
    ignore_punctuation: bool = False
    """Ignore punctuation and the amount of white space."""

    has_time_limit: ClassVar[bool] = False

    def score(self, answer: Answer) -> float:
        """Return 1 or 0."""
        return float(self._plain(answer.reply) == self._plain(self.expected_of(answer)))

    def _plain(self, text: str) -> str:
        text = text.casefold() if self.ignore_case else text
        return (
            " ".join(without_punctuation(text).split()) if self.ignore_punctuation else text.strip()
        )


class FirstLine(Exact):
    """1 if the first lines are equal, for replies that begin with a label."""

    method: Literal["first_line"] = "first_line"  # type: ignore[assignment]

    def _plain(self, text: str) -> str:
        return super()._plain(text.strip().partition("\n")[0])


def without_punctuation(text: str) -> str:
    """Return ``text`` without ASCII symbols and Unicode punctuation."""
    return "".join(
        c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P"
    )
