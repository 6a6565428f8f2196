"""Comparison of two templates, as OpenAI's ``string_check`` grader."""

from __future__ import annotations

from typing import ClassVar, Literal

from luthier.graders.base import Answer, Grader
from luthier.graders.templates import Template, fill_template, scope_of


class StringCheck(Grader):
    """1 if ``operation`` is true for ``input`` and ``reference``.

    Both may have placeholders: ``{{sample.output_text}}`` (the reply), ``{{item.answer}}`` (a key
    of the row).
    """

    method: Literal["string_check"] = "string_check"
    input: Template = "{{sample.output_text}}"
    """Template of the graded text."""
    reference: Template
    """Template of the text to compare with."""
    operation: Literal["eq", "ne", "like", "ilike"] = "eq"
    """``input`` equals, differs from, contains, or contains in any case ``reference``."""

    needs_expected = False
    has_time_limit: ClassVar[bool] = False

    def score(self, answer: Answer) -> float:
        """Return 1 or 0."""
        scope = scope_of(answer)
        text, wanted = (fill_template(each, scope, answer) for each in (self.input, self.reference))
        if self.operation == "ilike":
            return float(wanted.casefold() in text.casefold())
        if self.operation == "like":
            return float(wanted in text)
        return float((text == wanted) == (self.operation == "eq"))
