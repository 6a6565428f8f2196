"""Grading of programs by tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from luthier.errors import RowRefused
from luthier.graders.base import Answer, Grader
from luthier.graders.sandbox.launcher import Limits, check_sandbox, passes, side_by_side

_BLOCK = re.compile(
    r"^[ \t]*```+[ \t]*([^\s`]*)[^\n]*\n?(.*?)(?:\n?^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL
)
"""Fenced block of Markdown: first word after the fence, and text."""


class Code(Grader):
    """1 if the Python code of a reply passes the tests in the row's expected text.

    The code is the last fenced block with no language or Python, or else the whole reply. The tests
    are asserts that use the names of the code, as in MBPP (Austin et al. 2021) and HumanEval (Chen
    et al. 2021).

    The code runs in a sandbox (:mod:`luthier.graders.sandbox.launcher` lists its limits) with the
    standard library. Code and tests share an interpreter, so a reply can cheat: an object that equals
    everything passes ``assert f(1) == 2``. Look at rewarded samples.
    """

    method: Literal["code"] = "code"
    allow_code: bool = Field(default=False, validate_default=True)
    """Must be ``true``: generated code runs on this machine."""
    unisolated: bool = False
    """Also run without namespaces: the code then reaches the network and all your files."""
    seconds: float = Field(default=5.0, gt=0, le=600)
    """Wall-clock time of code and tests, and processor time of each process."""
    memory_mb: int = Field(default=512, ge=64, le=1_048_576)
    """Memory of all processes together, and address space of each, in MiB."""

    prefers_batches: ClassVar[bool] = True  # one sandbox per core at a time

    @field_validator("allow_code")
    @classmethod
    def _check_allowed(cls, value: bool) -> bool:
        if not value:
            raise ValueError("this grader runs generated code; set allow_code=true to allow it")
        return value

    def check(self) -> None:
        """Raise :class:`RecipeError` if this machine cannot isolate the code."""
        check_sandbox(self._limits)

    def check_expected(self, expected: str | None) -> None:
        """Reject tests that are not Python, or test nothing."""
        super().check_expected(expected)
        fix = "Give Python asserts as the expected reply, for example `assert add(1, 2) == 3`."
        try:
            tests: Any = ast.parse(expected or "")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            message = f"the tests are not Python: {error}."
            raise RowRefused("grader.bad_tests", message, fix) from error
        if not any(isinstance(node, ast.Assert | ast.Raise | ast.Call) for node in ast.walk(tests)):
            raise RowRefused("grader.bad_tests", "there are no tests, so any code would pass.", fix)

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """Return 1 or 0 for each answer."""
        return side_by_side(lambda group: [*map(self.score, group)], [[each] for each in answers])

    def score(self, answer: Answer) -> float:
        """Return 1 or 0."""
        return float(passes(code_of(answer.reply), self.expected_of(answer), self._limits))

    @property
    def _limits(self) -> Limits:
        return Limits(self.seconds, self.memory_mb, not self.unisolated)


def code_of(reply: str) -> str:
    """Return the program in a reply."""
    blocks = [text for language, text in code_blocks(reply) if language in ("python", "py", "")]
    return blocks[-1] if blocks else reply


def code_blocks(reply: str) -> list[tuple[str, str]]:
    """Return language and text of the fenced blocks; an unclosed block ends with the reply."""
    return [(match[1].lower(), match[2]) for match in _BLOCK.finditer(reply)]
