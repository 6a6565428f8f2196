"""Tests of tools, calls, results and reasoning in third-party formats."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.conversations.tool_forms import read_tools, unify_turns
from luthier.data.rows import load_rows
from luthier.data.shapes.conversations import Conversation
from luthier.errors import DataError, RowRefused
from luthier.types import Row, Tool, ToolCall

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = Tool("weather", "Tells it.", SCHEMA)
PLAIN = {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}
ASK = {"role": "user", "content": "Rome?"}
ROME = {"city": "Rome"}


@pytest.mark.parametrize(
    "value",
    [
        [{"type": "function", "function": PLAIN}],
        [PLAIN],
        json.dumps([PLAIN]),
        [{"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}],
        {
            "tools": [
                {
                    "toolSpec": {
                        "name": "weather",
                        "description": "Tells it.",
                        "inputSchema": {"json": SCHEMA},
                    }
                }
            ]
        },
    ],
)
def test_every_form_of_tools(value: object) -> None:
    assert read_tools(value) == (WEATHER,)
    assert dict(read_tools(value)[0].parameters) == SCHEMA


def test_parameters_of_xlam() -> None:
    parameters = {
        "city": {"type": "str", "description": "City"},
        "days": {"type": "List[int], optional"},
        "unit": {"type": "str", "default": "C"},
    }
    (tool,) = read_tools([{"name": "weather", "parameters": parameters}])
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "City"},
            "days": {"type": "array"},
            "unit": {"type": "string", "default": "C"},
        },
        "required": ["city"],
    }


def test_rows_of_hermes(tmp_path: Path) -> None:
    system = (
        "You are a function calling AI model. Here are the tools: <tools> "
        f"{json.dumps([PLAIN])} </tools> Return each call in <tool_call> tags."
    )
    call = "<tool_call>\n{'arguments': {'city': 'Rome'}, 'name': 'weather'}\n</tool_call>\n"
    turns = [
        ("system", system),
        ("human", "Rome?"),
        ("gpt", f"I look.\n{call}"),
        ("tool", '<tool_response>\n{"t": 9}\n</tool_response>\n'),
        ("gpt", "9 degrees"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": f, "value": v} for f, v in turns]}))
    (row,) = load_rows(path)
    assert isinstance(row, Conversation) and row.tools == (WEATHER,)
    asked, called, result, reply = row.messages
    assert called.content == "I look." and called.calls == (ToolCall("call00000", "weather", ROME),)
    assert (result.content, result.call_id) == ('{"t": 9}', "call00000")
    assert (asked.content, reply.content) == ("Rome?", "9 degrees")


@pytest.mark.parametrize(
    "text", ["<tool_call>weather</tool_call>", '<tool_call>{"name": "a"}</tool_call> calls a.']
)
def test_text_about_the_tags_of_hermes(text: str) -> None:
    turns = [ASK, {"role": "assistant", "content": text}]
    assert unify_turns(turns) == turns


def test_minimal_and_empty_tools_are_read() -> None:
    assert read_tools([{"name": "now"}]) == (Tool("now"),)
    assert read_tools([]) == read_tools("") == read_tools("[]") == ()


@pytest.mark.parametrize(
    "value",
    [
        "weather",
        "[" * 100_000,
        '[{"name": "a", "parameters": {"const": NaN}}]',
        '[{"name": "a", "description": "\\ud800"}]',
        7,
        [7],
        [PLAIN, {"description": "x"}],
        [{"name": "a", "parameters": "none"}],
        [PLAIN, PLAIN],
        [{"name": str(n)} for n in range(129)],
    ],
)
def test_wrong_tools_are_refused(value: object) -> None:
    with pytest.raises(RowRefused) as refused:
        read_tools(value)
    assert refused.value.rule == "tools.type"


def openai(arguments: object, **fields: object) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **fields}


def assistant(*blocks: object) -> dict[str, Any]:
    return {"role": "assistant", "content": [*blocks]}


def user(*blocks: object) -> dict[str, Any]:
    return {"role": "user", "content": [*blocks]}


WRITTEN = json.dumps(ROME)
OLD_CALL = {"name": "weather", "arguments": WRITTEN}
CONVERSE_CALL = {"toolUse": {"toolUseId": "a", "name": "weather", "input": ROME}}
CONVERSE_RESULT = {"toolResult": {"toolUseId": "a", "content": [{"text": "sun"}]}}
BLOCK_CALL = {"type": "tool_use", "id": "a", "name": "weather", "input": ROME}
BLOCK_RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "sun"}


@pytest.mark.parametrize(
    "turns",
    [
        [openai(WRITTEN, content=None), {"role": "tool", "tool_call_id": "a", "content": "sun"}],
        [openai(ROME), {"role": "tool", "content": "sun"}],
        [
            {"role": "assistant", "content": None, "function_call": OLD_CALL},
            {"role": "function", "name": "weather", "content": "sun"},
        ],
        [assistant(CONVERSE_CALL), user(CONVERSE_RESULT)],
        [assistant(BLOCK_CALL), user(BLOCK_RESULT)],
        [
            {"role": "tool_call", "content": json.dumps({"name": "weather", "arguments": ROME})},
            {"role": "tool", "content": "sun"},
        ],
        [
            {"role": "function_call", "content": json.dumps([OLD_CALL])},
            {"role": "observation", "content": "sun"},
        ],
    ],
)
def test_all_forms_of_call_and_result_are_unified(turns: list[object]) -> None:
    asked, called, result = unify_turns([ASK, *turns])
    assert asked == ASK and isinstance(called, dict) and isinstance(result, dict)
    (call,) = called["tool_calls"]
    assert (call.name, dict(call.arguments), called["content"]) == ("weather", ROME, "")
    assert called["role"] == "assistant"
    assert (result["role"], result["content"], result["tool_call_id"]) == ("tool", "sun", call.id)


def test_calls_join_previous_text_and_match_results_by_order() -> None:
    turns = unify_turns(
        [
            ASK,
            {"role": "assistant", "content": "Let me look."},
            {"role": "tool_call", "content": '{"name": "a", "arguments": {}}'},
            {"role": "tool_call", "content": '{"name": "b", "arguments": {}}'},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ]
    )
    called, first, second = turns[1:]
    assert isinstance(called, dict) and isinstance(first, dict) and isinstance(second, dict)
    assert called["content"] == "Let me look."
    assert called["tool_calls"] == [ToolCall("call00000", "a", {}), ToolCall("call00001", "b", {})]
    assert [first["tool_call_id"], second["tool_call_id"]] == ["call00000", "call00001"]


TWO_CALLS: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}],
}


def test_results_go_by_the_names_they_have() -> None:
    results = [
        {"role": "tool", "name": name, "content": text} for name, text in (("b", "2"), ("a", "1"))
    ]
    found: list[Any] = unify_turns([ASK, TWO_CALLS, *results])
    assert [turn["tool_call_id"] for turn in found[2:]] == ["call00001", "call00000"]


@pytest.mark.parametrize(
    "result", [{"name": "clock"}, {"tool_call_id": "z"}, {"tool_call_id": "z", "name": "a"}]
)
def test_result_without_matching_call_is_refused(result: dict[str, str]) -> None:
    with pytest.raises(RowRefused) as refused:
        unify_turns([ASK, TWO_CALLS, {"role": "tool", "content": "1", **result}])
    assert refused.value.rule == "message.order"
    assert refused.value.rule == "message.order"


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "Sun.", "reasoning_content": "May."},
        {"role": "assistant", "content": "Sun.", "reasoning": "May."},
        {"role": "assistant", "content": "Sun.", "thinking": "May."},
        {
            "role": "assistant",
            "content": [
                {"reasoningContent": {"reasoningText": {"text": "May."}}},
                {"text": "Sun."},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "May."}, {"type": "text", "text": "Sun."}],
        },
    ],
)
def test_every_form_of_thoughts(turn: object) -> None:
    (found,) = unify_turns([turn])
    assert isinstance(found, dict) and found["reasoning_content"] == "May."
    assert found["content"] in ("Sun.", [{"text": "Sun."}], [{"type": "text", "text": "Sun."}])


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "Sun.", "reasoning_content": 5},
        {"role": "assistant", "content": "Sun.", "thinking": {"text": "May."}},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": 5}, {"text": "Sun."}]},
    ],
)
def test_reasoning_of_wrong_type_is_refused(turn: object) -> None:
    with pytest.raises(RowRefused) as refused:
        unify_turns([ASK, turn])
    assert refused.value.rule == "field.type"
    assert refused.value.rule == "field.type"


def test_turns_without_tools_are_unchanged() -> None:
    turns: list[object] = [ASK, {"role": "assistant", "content": [{"text": "Hi"}]}, 7, {"role": []}]
    assert unify_turns(turns) == turns


@pytest.mark.parametrize(
    "turn",
    [
        openai("{"),
        openai("[1]"),
        openai({"a": [None] * 10_000}),
        openai('{"a": "\\ud800"}'),
        openai('{"a": NaN}'),
        openai('{"a": [-Infinity]}'),
        openai('{"a": 1e400}'),
        openai("[" * 100_000),
        {"role": "tool_call", "content": '{"name": "a", "arguments": {"b": NaN}}'},
        {"role": "assistant", "tool_calls": 5, "function_call": {"name": "a"}},
        {"role": "assistant", "tool_calls": [7]},
        {"role": "assistant", "tool_calls": 7},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]},
        {"role": "tool_call", "content": "weather(Rome)"},
        {"role": "assistant", "content": [{"toolUse": None}]},
    ],
)
def test_wrong_calls_are_refused_with_their_message(turn: object) -> None:
    with pytest.raises(RowRefused) as refused:
        unify_turns([ASK, turn])
    assert refused.value.rule == "message.tool_calls"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["role", "content", "tool_calls", "function", "name", "arguments", "toolUse", "toolResult",
             "type", "reasoningContent", "function_call", "thinking", "input"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(JSON, max_size=4))
def test_unify_turns_leaves_any_input_unmodified(turns: list[object]) -> None:
    before = json.dumps(turns)
    with contextlib.suppress(RowRefused):
        unify_turns(turns)
    assert json.dumps(turns) == before


def load(tmp_path: Path, *records: object) -> list[Row]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(load_rows(path))


CALLED = openai(WRITTEN, content=None)
RESULT = {"role": "tool", "tool_call_id": "a", "content": ""}
SAID = {"role": "assistant", "content": "Sun.", "reasoning_content": "It says so.\n"}


def test_a_row_keeps_tools_calls_results_and_thoughts(tmp_path: Path) -> None:
    record = {"messages": [ASK, CALLED, RESULT, SAID], "tools": [PLAIN]}
    (row,) = load(tmp_path, record)
    assert isinstance(row, Conversation)
    _, called, result, said = row.messages
    assert called.calls == (ToolCall("a", "weather", ROME),)
    assert called.calls[0].arguments == ROME
    assert (result.role, result.content, result.call_id) == ("tool", "", "a")
    assert said.reasoning == "It says so."
    assert row.tools == (WEATHER,)
    (again,) = load(tmp_path, row.record())
    assert isinstance(again, Conversation)
    assert (again.messages, again.tools) == (row.messages, row.tools)
    ends = load(tmp_path, {"messages": [ASK, CALLED]})[0]
    assert ends.expected_reply() == '{"name": "weather", "arguments": {"city": "Rome"}}'


def test_bedrocks_and_sharegpts_rows_with_tools(tmp_path: Path) -> None:
    spec = {"name": "weather", "description": "Tells it.", "inputSchema": {"json": SCHEMA}}
    (bedrock,) = load(
        tmp_path,
        {
            "schemaVersion": "bedrock-conversation-2024",
            "toolConfig": {"tools": [{"toolSpec": spec}]},
            "messages": [user({"text": "Rome?"}), assistant(CONVERSE_CALL)],
        },
    )
    (sharegpt,) = load(
        tmp_path,
        {
            "conversations": [
                {"from": "human", "value": "Rome?"},
                {
                    "from": "function_call",
                    "value": json.dumps({"name": "weather", "arguments": ROME}),
                },
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "Sun."},
            ],
            "tools": json.dumps([PLAIN]),
        },
    )
    for row in (bedrock, sharegpt):
        assert row.tools == (WEATHER,)
        assert row.turns()[1].calls[0].arguments == ROME
    assert [turn.role for turn in sharegpt.turns()] == ["user", "assistant", "tool", "assistant"]


def test_bedrocks_points_to_cache_at_are_passed_over(tmp_path: Path) -> None:
    spec = {"name": "weather", "description": "Tells it.", "inputSchema": {"json": SCHEMA}}
    for calls in (True, False):
        rows = []
        for points in ([], [{"cachePoint": {"type": "default"}}]):
            turns = [user({"text": "Rome?"}, *points)]
            if calls:
                turns += [assistant(CONVERSE_CALL, *points), user(CONVERSE_RESULT, *points)]
            row = {
                "schemaVersion": "bedrock-conversation-2024",
                "system": [{"text": "Be kind."}, *points],
                "toolConfig": {"tools": [{"toolSpec": spec}, *points]},
                "messages": [*turns, assistant({"text": "Sun."}, *points)],
            }
            rows += load(tmp_path, row)
        assert rows[0].record() == rows[1].record()
        assert rows[1].tools == (WEATHER,)
    with pytest.raises(DataError) as refused:
        load(tmp_path, {"messages": [user({"cachePoint": {"type": "default"}}), SAID]})
    assert refused.value.rule == "field.empty"


@pytest.mark.parametrize(
    "turns",
    [
        [ASK, SAID, RESULT, SAID],
        [ASK, CALLED, SAID],
        [ASK, CALLED, RESULT, ASK, SAID],
        [ASK, CALLED, RESULT],
        [RESULT, SAID],
    ],
)
def test_turns_out_of_order_are_refused(tmp_path: Path, turns: list[object]) -> None:
    with pytest.raises(DataError):
        load(tmp_path, {"messages": turns, "tools": [PLAIN]})


def test_call_of_undeclared_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        load(tmp_path, {"messages": [ASK, CALLED], "tools": [{"name": "clock"}]})
    assert refused.value.rule == "message.tool_calls"
    with pytest.raises(DataError) as refused:
        load(tmp_path, {"messages": [ASK, {"role": "assistant", "tool_calls": ["weather"]}]})
    assert refused.value.rule == "message.tool_calls"
