"""Grading by a Python function that comes with the grader, as OpenAI's ``python`` does."""

from __future__ import annotations

import ast
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from luthier.errors import RecipeError
from luthier.graders.base import Answer, Grader, Trouble
from luthier.graders.sandbox import Limits, check_sandbox, side_by_side, value_of
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
"""Seconds in which a source is tried before it is used; what takes longer may be right."""


def defines(source: str, name: str, arguments: str) -> str:
    """``source``, where it is Python that defines a function ``name``; else :class:`ValueError`."""
    if len(source.encode()) > MOST_SOURCE:
        raise ValueError(f"the source has more than {MOST_SOURCE:,} bytes")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the source is no Python: {error}") from error
    if not any(isinstance(each, ast.FunctionDef) and each.name == name for each in tree.body):
        raise ValueError(f"the source defines no function {name}({arguments})")
    return source


def no_end(grader: str, seconds: float) -> Trouble:
    """That a grader in its sandbox said nothing."""
    return Trouble(
        "grader.time",
        f"grader `{grader}` did not end within {seconds:g} s, or ended its process.",
        "Make it faster, or raise `seconds` of the grader.",
    )


def _defines_grade(source: str) -> str:
    defines(source, "grade", "sample, item")
    functions = [each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef)]
    grade = next(each for each in reversed(functions) if each.name == "grade")
    given = grade.args
    names = [each.arg for each in (*given.args, *given.kwonlyargs)]
    needed = [each.arg for each in (*given.posonlyargs, *given.args)]
    needed = needed[: len(needed) - len(given.defaults)] + [
        each.arg
        for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        if default is None
    ]
    lacks = {"sample", "item"} - set(names) if given.kwarg is None else set()
    if not grade.decorator_list and (lacks or set(needed) - {"sample", "item"}):
        raise ValueError("the arguments of grade are called sample and item")
    return source


@lru_cache(maxsize=32)
def _error_at_start(source: str, limits: Limits) -> str:
    """What ``source`` raises before ``grade`` is called; empty where it does not, or takes long."""
    limits = replace(limits, seconds=min(limits.seconds, START_S))
    return str(value_of("", _START % json.dumps(source), limits) or "")


class SandboxedFunction(Grader):
    """Base of graders that call a function of a source, in a sandbox; it may give any number."""

    needs_expected = False
    is_share: ClassVar[bool] = False
    prefers_batches: ClassVar[bool] = True
    """As many sandboxes at once as there are cores."""

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """What one call may take."""

    def check(self) -> None:
        """Refuse machines that cannot isolate the source."""
        check_sandbox(self.limits)

    def score(self, answer: Answer) -> float:
        """The number of one answer."""
        return self.grade([answer])[0]


class PythonSource(SandboxedFunction):
    """What ``grade(sample, item)`` of the source gives: any finite number.

    ``sample`` has ``output_text``, and ``output_json`` where the reply is JSON; ``item`` has the
    members of the row. The source runs in a sandbox (:mod:`luthier.graders.sandbox`) with the standard
    library alone, in a new process for each answer.
    """

    method: Literal["python"] = "python"
    source: Annotated[str, AfterValidator(_defines_grade)]
    """Python that defines ``grade``."""
    seconds: float = Field(default=10.0, gt=0, le=120)
    """Wall-clock time for one answer."""
    memory_mb: int = Field(default=512, ge=64, le=4096)
    """Memory of all its processes together, and address space of each, in MiB."""

    def check(self) -> None:
        """Refuse machines that cannot isolate the source, and a source that raises when it is read."""
        super().check()
        if said := _error_at_start(self.source, self.limits):
            raise RecipeError(
                f"grader `{self.method}`: the source raises {said.rstrip('.: ')}. It runs with the "
                "standard library alone"
            )

    @property
    def limits(self) -> Limits:
        """Those of the fields."""
        return Limits(self.seconds, self.memory_mb)

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """A number for each; :class:`Ungraded` where the function raised or took too long."""
        return side_by_side(self._score_row, [[answer] for answer in answers])

    def _score_row(self, answers: Sequence[Answer]) -> list[float | Trouble]:
        given = json.dumps(dict(scope_of(answers[0])))
        result = value_of(self.source, _CALL % given, self.limits)
        if result is None:
            return [no_end(self.method, self.seconds)]
        if "error" in result:
            text = f"grader `{self.method}` raised {result['error']}"
            return [Trouble("grader.raised", text, "Mend the grader or the row.")]
        return [float(result["score"])]
