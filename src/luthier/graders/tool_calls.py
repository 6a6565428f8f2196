"""Grading the calls of tools in a reply."""

from __future__ import annotations

from typing import Any, Literal

from luthier.data.tools import parse_calls
from luthier.graders.base import Answer, Grader


class ToolCalls(Grader):
    """1 when the reply calls what the expected reply calls: the same functions with equal arguments.

    Calls are what stands between ``<tool_call>`` tags, or a JSON object with ``name`` and
    ``arguments``. Their order does not matter, nor do words beside them. Where the expected reply
    calls nothing, a reply is right that calls nothing either. The AST check of the Berkeley
    Function-Calling Leaderboard accepts several values for an argument; here they must be equal.
    """

    method: Literal["tool_calls"] = "tool_calls"

    watched = False

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        return float(_calls(answer.reply) == _calls(self.expected_of(answer)))


def _calls(text: str) -> list[tuple[str, Any]]:
    calls = [(call.name, dict(call.arguments)) for call in parse_calls(text)]
    return sorted(calls, key=repr)
