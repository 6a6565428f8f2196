"""Grading by a Python function of the grader, as OpenAI's ``python`` grader."""

from __future__ import annotations

import ast
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from luthier.errors import RecipeError, RowRefused
from luthier.graders.base import Answer, Grader
from luthier.graders.sandbox.launcher import Limits, check_sandbox, side_by_side, value_of
from luthier.graders.templates import scope_of

MOST_SOURCE = 256 * 1024
_CALL = """
import json as _json
try:
    result = {"score": float(grade(**_json.loads(%r)))}
except Exception as error:
    result = {"error": f"{type(error).__name__}: {error}"[:500]}
"""
_START = """
import json as _json
try:
    exec(_json.loads(%r), {"__name__": "grader"})
    result = ""
except BaseException as error:
    result = f"{type(error).__name__}: {error}"[:300]
"""
START_S = 2.0
"""Time limit for the trial run of a source, in seconds. A slower source may be correct."""


def defined_function(source: str, name: str, arguments: str) -> ast.FunctionDef:
    """Return the function ``name`` of a Python source, or raise :class:`ValueError`."""
    if len(source.encode()) > MOST_SOURCE:
        raise ValueError(f"the source has more than {MOST_SOURCE:,} bytes")
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the source is not Python: {error}") from error
    found = [each for each in body if isinstance(each, ast.FunctionDef) and each.name == name]
    if not found:
        raise ValueError(f"the source defines no function {name}({arguments})")
    return found[-1]


def timeout_fault(grader: str, seconds: float) -> RowRefused:
    """Return the fault of a sandbox that returned nothing."""
    text = f"grader `{grader}` did not end within {seconds:g} s, or ended its process."
    return RowRefused("grader.time", text, "Make the grader faster, or raise its `seconds`.")


def _check_grade(source: str) -> str:
    given = defined_function(source, "grade", "sample, item").args
    known = {"sample", "item"}
    names = {each.arg for each in (*given.args, *given.kwonlyargs)}
    required = given.args[: len(given.args) - len(given.defaults)]
    if given.posonlyargs or not {each.arg for each in required} <= known:
        raise ValueError("the arguments of grade are called sample and item")
    if given.kwarg is None and not known <= names:
        raise ValueError("the arguments of grade are called sample and item")
    return source


@lru_cache(maxsize=32)
def _error_at_start(source: str, limits: Limits) -> str:
    """Return the error of loading ``source``; empty without an error or after the time limit."""
    limits = replace(limits, seconds=min(limits.seconds, START_S))
    return str(value_of("", _START % json.dumps(source), limits) or "")


class SandboxedFunction(Grader):
    """Base class of graders that call a function in a sandbox. Scores may have any value."""

    needs_expected = False
    is_share: ClassVar[bool] = False
    prefers_batches: ClassVar[bool] = True  # one sandbox per core at a time

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """Limits of one call."""

    def check(self) -> None:
        """Raise :class:`RecipeError` if this machine cannot isolate the source."""
        check_sandbox(self.limits)

    def score(self, answer: Answer) -> float:
        """Return the score of one answer."""
        return self.grade([answer])[0]


class PythonSource(SandboxedFunction):
    """The finite number that ``grade(sample, item)`` of the source returns.

    ``sample`` has ``output_text``, and ``output_json`` if the reply is JSON. ``item`` has the
    members of the row. The source runs in a sandbox (:mod:`luthier.graders.sandbox.launcher`) with the
    standard library, in a new process per answer.
    """

    method: Literal["python"] = "python"
    source: Annotated[str, AfterValidator(_check_grade)]
    """Python that defines ``grade``."""
    seconds: float = Field(default=10.0, gt=0, le=120)
    """Wall-clock time per answer."""
    memory_mb: int = Field(default=512, ge=64, le=4096)
    """Memory of all processes together, and address space of each, in MiB."""

    def check(self) -> None:
        """Reject a source that cannot be isolated or that raises an error when loaded.

        Raises:
            RecipeError: the source is unsuitable.
        """
        super().check()
        if error := _error_at_start(self.source, self.limits):
            raise RecipeError(
                f"grader `{self.method}`: the source raises {error.rstrip('.: ')}. Only the standard "
                "library is available",
                setting="source",
            )

    @property
    def limits(self) -> Limits:
        """Limits of one call."""
        return Limits(self.seconds, self.memory_mb)

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """Return the scores; raise :class:`Ungraded` if the function raised or took too long."""
        return side_by_side(self._score_row, [[answer] for answer in answers])

    def _score_row(self, answers: Sequence[Answer]) -> list[float | RowRefused]:
        given = json.dumps(dict(scope_of(answers[0])))
        result = value_of(self.source, _CALL % given, self.limits)
        if result is None:
            return [timeout_fault(self.method, self.seconds)]
        if "error" in result:
            text = f"grader `{self.method}` raised {result['error']}"
            return [RowRefused("grader.raised", text, "Fix the grader or the row.")]
        return [float(result["score"])]
