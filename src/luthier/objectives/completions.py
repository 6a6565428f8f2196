"""What is asked in a row and what was written to it, as graders and people see it."""

from __future__ import annotations

from typing import Any

from luthier.graders import Answer
from luthier.types import Example, Row


def answer(example: Example, reply: str) -> Answer:
    """``reply`` to the prompt of an example, for a grader."""
    assert example.given is not None
    row = example.given
    return Answer(row.prompt_turns(), reply, row.expected_reply(), row)


def record(row: Row, reply: str, tokens: int, stopped: bool) -> dict[str, Any]:
    """A text that the network wrote in training, as ``samples.jsonl`` keeps it."""
    return {
        "line": row.line,
        "prompt": row.prompt_turns()[-1].content,
        "expected": row.expected_reply(),
        "completion": reply,
        "tokens": tokens,
        "stopped": stopped,
    }
