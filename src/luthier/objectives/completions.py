"""What is asked in a row and what was written to it, as graders and people see it."""

from __future__ import annotations

from typing import Any

from luthier.graders import Answer
from luthier.types import Example, Message, Row


def asked(row: Row) -> tuple[tuple[Message, ...], str | None]:
    """The turns that a completion answers, and the text it is compared with where the row has one."""
    if row.messages is None:
        return (Message("user", row.prompt or ""),), row.expected or row.completion
    if row.messages[-1].role == "assistant":
        return row.messages[:-1], row.expected or row.messages[-1].content
    return row.messages, row.expected


def answer(example: Example, reply: str) -> Answer:
    """``reply`` to the prompt of an example, for a grader."""
    assert example.given is not None
    messages, expected = asked(example.given)
    return Answer(messages, reply, expected, example.given)


def record(row: Row, reply: str, tokens: int, stopped: bool) -> dict[str, Any]:
    """A text that the network wrote in training, as ``samples.jsonl`` keeps it."""
    messages, expected = asked(row)
    return {
        "line": row.line,
        "prompt": messages[-1].content,
        "expected": expected,
        "completion": reply,
        "tokens": tokens,
        "stopped": stopped,
    }
