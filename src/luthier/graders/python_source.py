"""Grading by a Python function that comes with the grader, as OpenAI's ``python`` does."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from luthier.errors import LuthierError
from luthier.graders.base import Answer, Grader
from luthier.graders.sandbox import Limits, check_sandbox, value_of
from luthier.graders.templates import scope_of

MOST_SOURCE = 256 * 1024
_CALL = """
import json as _json
try:
    result = {"score": float(grade(**_json.loads(%r)))}
except Exception as error:
    result = {"error": f"{type(error).__name__}: {error}"[:500]}
"""


def _defines_grade(source: str) -> str:
    if len(source.encode()) > MOST_SOURCE:
        raise ValueError(f"the source has more than {MOST_SOURCE:,} bytes")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the source is no Python: {error}") from error
    if not any(isinstance(each, ast.FunctionDef) and each.name == "grade" for each in tree.body):
        raise ValueError("the source defines no function grade(sample, item)")
    return source


class PythonSource(Grader):
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
    """Address space, in MiB."""

    needs_expected = False

    @property
    def bounded(self) -> bool:
        """The function may give any number."""
        return False

    @property
    def batched(self) -> bool:
        """As many sandboxes at once as there are cores."""
        return True

    def check(self) -> None:
        """Refuse machines that cannot isolate the source."""
        check_sandbox(self._limits)

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """A number for each."""
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            return list(pool.map(self.score, answers))

    def score(self, answer: Answer) -> float:
        """The number; :class:`LuthierError` where the function raised or took too long."""
        given = json.dumps(dict(scope_of(answer)))
        result = value_of(self.source, _CALL % given, self._limits)
        if result is None:
            raise LuthierError("the source did not end in time, or ended its process")
        if "error" in result:
            raise LuthierError(str(result["error"]))
        return float(result["score"])

    @property
    def _limits(self) -> Limits:
        return Limits(self.seconds, self.memory_mb)
