"""Grading a program by tests that it must pass."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from luthier.errors import RowRefused
from luthier.graders.base import Answer, Grader
from luthier.graders.code_blocks import code_blocks
from luthier.graders.sandbox import Limits, check_sandbox, passes, side_by_side


class Code(Grader):
    """1 when the Python code of a reply passes the tests that are the row's expected text.

    The code is the last fenced block marked as Python or not marked, and the whole reply where there is
    none. The tests are Python too: asserts that use the names the code defines, as in MBPP
    (Austin et al. 2021) and HumanEval (Chen et al. 2021), whose authors warn of running such code.

    It runs in a sandbox (:mod:`luthier.graders.sandbox`, which says what that does not protect from)
    with the standard library alone. It shares the interpreter with its tests, so a reply can cheat:
    an object that equals everything passes ``assert f(1) == 2``. A reply that ends the process before
    the tests are through does not pass. Look at rewarded samples.
    """

    method: Literal["code"] = "code"
    allow_code: bool = Field(default=False, validate_default=True)
    """Must be ``true``: whoever grades agrees that code a model wrote runs on this machine."""
    unisolated: bool = False
    """Run it also where the kernel gives no namespaces; then it sees the network and all your files."""
    seconds: float = Field(default=5.0, gt=0, le=600)
    """Wall-clock time of a reply's code and tests together, and the processor time of each process."""
    memory_mb: int = Field(default=512, ge=64, le=1_048_576)
    """Memory of all its processes together, and address space of each, in MiB."""

    prefers_batches: ClassVar[bool] = True
    """As many sandboxes at once as there are cores."""

    @field_validator("allow_code")
    @classmethod
    def _check_allowed(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "this grader runs code that a model wrote; set allow_code=true to agree to that"
            )
        return value

    def check(self) -> None:
        """Refuse machines that cannot isolate the code, unless that was waived."""
        check_sandbox(self._limits)

    def check_expected(self, expected: str | None) -> None:
        """Refuse tests that are no Python, or that test nothing."""
        super().check_expected(expected)
        fix = "Give Python asserts as the expected reply, for example `assert add(1, 2) == 3`."
        try:
            tests: Any = ast.parse(expected or "")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            message = f"the tests are no Python: {error}."
            raise RowRefused("grader.bad_tests", message, fix) from error
        if not any(isinstance(node, ast.Assert | ast.Raise | ast.Call) for node in ast.walk(tests)):
            raise RowRefused("grader.bad_tests", "there are no tests, so any code would pass.", fix)

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0 for each."""
        return side_by_side(lambda group: [*map(self.score, group)], [[each] for each in answers])

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        return float(passes(code_of(answer.reply), self.expected_of(answer), self._limits))

    @property
    def _limits(self) -> Limits:
        return Limits(self.seconds, self.memory_mb, not self.unisolated)


def code_of(reply: str) -> str:
    """The program in a reply."""
    blocks = [block.text for block in code_blocks(reply) if block.language in ("python", "py", "")]
    return blocks[-1] if blocks else reply
