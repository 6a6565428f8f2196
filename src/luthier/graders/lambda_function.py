"""Grading by an AWS Lambda handler, as in Bedrock's reinforcement fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from luthier.errors import RowRefused
from luthier.graders.base import Answer
from luthier.graders.python_source import SandboxedFunction, defined_function, timeout_fault
from luthier.graders.sandbox.launcher import Limits, side_by_side, value_of
from luthier.graders.templates import scope_of

AT_ONCE = 16
"""Maximum number of answers per event. The scores fit into the output of a sandbox."""
_CALL = """
import json as _json, math as _math, time as _time
_given = _json.loads(%r)
class _Context:
    function_name = invoked_function_arn = _given["name"]
    function_version = "$LATEST"
    aws_request_id = log_group_name = log_stream_name = "-"
    memory_limit_in_mb = _given["memory_mb"]
    _end = _time.monotonic() + _given["seconds"]
    def get_remaining_time_in_millis(self):
        return max(0, int(1000 * (self._end - _time.monotonic())))
try:
    _answer = lambda_handler(_given["event"], _Context())
    _scores = {str(each["id"]): float(each["aggregate_reward_score"]) for each in _answer}
    _missing = [each["id"] for each in _given["event"] if each["id"] not in _scores]
    if _missing or not all(map(_math.isfinite, _scores.values())):
        raise ValueError(f"its answer lacks ids {_missing}, or has numbers that are not finite")
    result = {"scores": [_scores[each["id"]] for each in _given["event"]]}
except Exception as error:
    result = {"error": f"{type(error).__name__}: {error}"[:500]}
"""
_FIX = (
    "Fix the function or the row: the function returns a list of {id, aggregate_reward_score}, one per "
    "element of the event, with a finite number."
)


def _check_handler(source: str) -> str:
    defined_function(source, "lambda_handler", "event, context")
    return source


class LambdaFunction(SandboxedFunction):
    """The finite number that ``lambda_handler(event, context)`` of the source returns.

    The event is a list of up to 16 answers: ``{"id", "messages", "metadata"}`` and the members of
    the row. The reply is the last message, and ``metadata`` has the members again. The handler
    returns a list of ``{"id", "aggregate_reward_score"}``; ``metrics_list`` is ignored. The source
    runs in a sandbox (:mod:`luthier.graders.sandbox.launcher`) with the standard library, without
    network and keys, in a new process per event.
    """

    method: Literal["lambda"] = "lambda"
    source: Annotated[str, AfterValidator(_check_handler)]
    """Python that defines ``lambda_handler``."""
    name: str = Field(default="lambda", pattern=r"^[a-zA-Z0-9_-]{1,140}$")
    """Name of the function in messages and in its context."""
    seconds: float = Field(default=10.0, gt=0, le=900)
    """Wall-clock time per event."""
    memory_mb: int = Field(default=512, ge=64, le=4096)
    """Memory of all processes together, and address space of each, in MiB."""

    @property
    def limits(self) -> Limits:
        """Limits of one call."""
        return Limits(self.seconds, self.memory_mb)

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """Return the scores; raise :class:`Ungraded` if the function raised or took too long."""
        starts = range(0, len(answers), AT_ONCE)
        return side_by_side(self._score_events, [answers[i : i + AT_ONCE] for i in starts])

    def _score_events(self, answers: Sequence[Answer]) -> list[float | RowRefused]:
        event = [_element(number, answer) for number, answer in enumerate(answers)]
        given = {"event": event, **self.model_dump(include={"name", "seconds", "memory_mb"})}
        result = value_of(self.source, _CALL % json.dumps(given), self.limits)
        if result is not None and "scores" in result:
            return list(map(float, result["scores"]))
        if len(answers) > 1:  # find the answer that failed
            return [each for answer in answers for each in self._score_events([answer])]
        if result is None:
            return [timeout_fault(self.name, self.seconds)]
        return [RowRefused("grader.raised", f"grader `{self.name}` raised {result['error']}", _FIX)]


def _element(number: int, answer: Answer) -> dict[str, Any]:
    members = dict(scope_of(answer)["item"])
    messages = [*members.pop("messages"), {"role": "assistant", "content": answer.reply}]
    return {**members, "id": str(number), "messages": messages, "metadata": members}
