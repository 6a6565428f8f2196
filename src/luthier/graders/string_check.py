"""Comparing two texts with places in them, as OpenAI's ``string_check`` does."""

from __future__ import annotations

from typing import Literal

from luthier.graders.base import Answer, Grader
from luthier.graders.templates import Template, fill_template, scope_of


class StringCheck(Grader):
    """1 when ``input`` and ``reference`` stand to each other as ``operation`` says.

    Both may hold places such as ``{{sample.output_text}}`` (the reply) and ``{{item.answer}}`` (a
    member of the row).
    """

    method: Literal["string_check"] = "string_check"
    input: Template = "{{sample.output_text}}"
    """The text that is looked at."""
    reference: Template
    """The text it is compared with."""
    operation: Literal["eq", "ne", "like", "ilike"] = "eq"
    """Equal, not equal, contains it, or contains it in any case."""

    needs_expected = False
    watched = False

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        scope = scope_of(answer)
        text, wanted = (fill_template(each, scope, answer) for each in (self.input, self.reference))
        if self.operation == "ilike":
            return float(wanted.casefold() in text.casefold())
        if self.operation == "like":
            return float(wanted in text)
        return float((text == wanted) == (self.operation == "eq"))
