"""Grading the calls of tools in a reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from luthier.data.tools import parse_calls
from luthier.graders.base import Answer, Grader
from luthier.types import Tool


class ToolCalls(Grader):
    """1 when the reply calls what the expected reply calls: the same functions with equal arguments.

    Calls are what stands between ``<tool_call>`` tags, in JSON or XML, or a JSON object with ``name``
    and ``arguments``. Their order does not matter, nor do words beside them. Where the expected reply
    calls nothing, a reply is right that calls nothing either. The AST check of the Berkeley
    Function-Calling Leaderboard accepts several values for an argument; here they must be equal.
    """

    method: Literal["tool_calls"] = "tool_calls"

    watched = False

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        tools, expected = answer.row.tools, self.expected_of(answer)
        return float(_calls(answer.reply, tools) == _calls(expected, tools))


def _calls(text: str, tools: Sequence[Tool]) -> list[tuple[str, Any]]:
    calls = [(call.name, dict(call.arguments)) for call in parse_calls(text, tools)]
    return sorted(calls, key=repr)
