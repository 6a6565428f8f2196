"""Grading of tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from luthier.data.conversations.tools import parse_calls
from luthier.graders.base import Answer, Grader
from luthier.types import Tool


class ToolCalls(Grader):
    """1 if the reply calls the same functions with the same arguments as the expected reply.

    A call stands between ``<tool_call>`` tags, in JSON or XML, or is a JSON object with ``name``
    and ``arguments``. Order and other text do not matter. Without an expected call, a reply without
    a call is right. The AST check of the Berkeley Function-Calling Leaderboard accepts several
    values for an argument; here the values must be equal.
    """

    method: Literal["tool_calls"] = "tool_calls"

    has_time_limit: ClassVar[bool] = False

    def score(self, answer: Answer) -> float:
        """Return 1 or 0."""
        tools, expected = answer.row.tools, self.expected_of(answer)
        return float(_calls(answer.reply, tools) == _calls(expected, tools))


def _calls(text: str, tools: Sequence[Tool]) -> list[tuple[str, Any]]:
    calls = [(call.name, dict(call.arguments)) for call in parse_calls(text, tools)]
    return sorted(calls, key=repr)
