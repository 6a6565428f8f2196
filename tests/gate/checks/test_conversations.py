"""Conversations inside texts, and calls of undeclared functions."""

from __future__ import annotations

import json

import pytest

from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.shapes.texts import RawText
from luthier.gate.checks.conversations import IN_TEXT, SEVERAL_REPLIES, UNDECLARED, Conversations
from luthier.gate.scan import inspect_rows
from luthier.types import Message, Row, Tool, ToolCall

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def found(row: Row) -> list[tuple[str, str]]:
    report = inspect_rows({"train": [row]}, [Conversations()])
    return [(each.rule.id, each.fix) for some in report.findings.examples.values() for each in some]


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        (json.dumps(TURNS), "data.columns.messages=text"),
        (json.dumps(TURNS, indent=1), "data.columns.messages=text"),
        (json.dumps([{"from": "human", "value": "q"}]), "data.columns.conversations=text"),
        (json.dumps({"messages": TURNS}), "fromjson"),
        (str(TURNS), "double quotes"),
    ],
)
def test_a_conversation_inside_a_text(text: str, fix: str) -> None:
    ((rule, advice),) = found(RawText("rows", 1, text))
    assert rule == IN_TEXT.id and fix in advice
    ((rule, advice),) = found(PromptCompletion("rows", 1, text, "a"))
    assert rule == IN_TEXT.id and "messages" in advice


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"role": "x"}', "[role]", "the role: user", '["role", "from"]', ""]
)
def test_text_without_conversation_has_no_finding(text: str) -> None:
    assert found(RawText("rows", 1, text)) == []


def test_several_replies_are_a_note() -> None:
    row = PromptCompletion("rows", 1, "q", "a", ("b",))
    assert [rule for rule, _ in found(row)] == [SEVERAL_REPLIES.id]


def test_calls_of_undeclared_functions_are_found() -> None:
    turns = (
        Message("user", "q"),
        Message("assistant", calls=(ToolCall("1", "f", {}),)),
        Message("tool", "r", call_id="1"),
        Message("assistant", "a"),
    )
    assert [rule for rule, _ in found(Conversation("rows", 1, turns))] == [UNDECLARED.id]
    declared = Conversation("rows", 1, turns, tools=(Tool("f", "", {}),))
    assert found(declared) == []


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}


@pytest.mark.parametrize(
    ("schema", "arguments", "rules"),
    [
        (SCHEMA, {"city": "Ghent", "days": 2}, []),
        (SCHEMA, {"days": 2}, ["message.tool_arguments"]),
        (SCHEMA, {"city": "Ghent", "day": 2}, ["message.tool_arguments"]),
        (SCHEMA, {"city": "Ghent", "days": "two"}, ["message.tool_arguments"]),
        ({**SCHEMA, "additionalProperties": True}, {"city": "Ghent", "day": 2}, []),
        ({"type": "object"}, {"day": 2}, []),
        ({"type": "dict", "properties": {}}, {"day": 2}, []),  # no JSON Schema
    ],
)
def test_call_arguments_are_checked_against_tool_schema(
    schema: dict[str, object], arguments: dict[str, object], rules: list[str]
) -> None:
    turns = (
        Message("user", "q"),
        Message("assistant", calls=(ToolCall("1", "f", arguments),)),
        Message("tool", "r", call_id="1"),
        Message("assistant", "a"),
    )
    row = Conversation("rows", 1, turns, tools=(Tool("f", "", schema),))
    assert [rule for rule, _ in found(row)] == rules


@pytest.mark.parametrize(
    ("text", "noted"),
    [
        ("Agent: Hello.\nCustomer: My bike.\nAgent: Which hub?\n", True),
        ("agent: Hello. customer: My bike is broken! agent: Which hub?", True),
        ("[Doctor]: How?\n[Patient]: Bad.\n[Doctor]: Since when?", True),
        ("**User:** Hi\n**Assistant:** Hello\n**User:** Bye", True),
        ("Speaker 1: Hi\nSpeaker 2: Hello\nSpeaker 1: Bye", True),
        ("ROMEO:\nHi\nJULIET:\nHello\nROMEO:\nBye", False),
        ("User: the person who logs in.\nAgent: a program.", False),
        ("The agent told the customer: wait. The customer told the agent: no.", False),
    ],
)
def test_transcript_as_raw_text_is_a_note(text: str, noted: bool) -> None:
    rules = [rule for rule, _ in found(RawText("rows", 1, text))]
    assert rules == ["message.transcript"] * noted
    assert found(PromptCompletion("rows", 1, text, "a")) == []
