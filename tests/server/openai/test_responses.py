"""Responses, by the unmodified client."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
from openai.types.responses import Response

QUESTION = "What is the capital of France?"
pytestmark = pytest.mark.usefixtures("tiny_base")
TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "day": {"type": "boolean"}},
            "required": ["city", "day"],
            "additionalProperties": False,
        },
    }
]


def respond(client: openai.OpenAI, **changes: Any) -> Any:
    fields = {"model": "tiny", "input": QUESTION, "max_output_tokens": 8, "temperature": 0}
    return client.responses.create(**{**fields, **changes})


def told(client: openai.OpenAI, messages: Any, **changes: Any) -> str:
    """Return the text of the same request through chat completions."""
    made = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0, **changes
    )
    return made.choices[0].message.content or ""


def test_response_has_output_and_usage(client: openai.OpenAI) -> None:
    made = respond(client, metadata={"team": "one"}, user="me")
    assert made.id.startswith("resp_") and made.object == "response" and made.model == "tiny"
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert made.output_text == told(client, [{"role": "user", "content": QUESTION}])
    (item,) = made.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "incomplete")
    assert made.usage.output_tokens == 8
    assert made.usage.total_tokens == made.usage.input_tokens + 8
    assert made.metadata == {"team": "one"} and made.user == "me"
    assert made.error is None and made.temperature == 0 and made.top_p == 1
    # Strict validation by the client's type.
    Response.model_validate(made.model_dump(), strict=True)


def test_finished_response_has_completed_status(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"enum": ["yes"]}}
    made = respond(client, text={"format": form}, max_output_tokens=40)
    assert made.status == "completed" and made.output_text == '"yes"'
    assert made.incomplete_details is None and made.completed_at >= made.created_at
    assert made.text.format.type == "json_schema" and made.text.format.schema_ == {"enum": ["yes"]}
    made = respond(client, text={"format": {"type": "json_object"}}, max_output_tokens=1)
    assert made.output_text == "{"


@pytest.mark.slow
def test_instructions_and_items_are_the_turns_of_a_chat(client: openai.OpenAI) -> None:
    made = respond(
        client,
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Speak French."},
            {"role": "user", "content": [{"type": "input_text", "text": "Hi "},
                                         {"type": "input_text", "text": "there"}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "Salut", "annotations": []}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"role": "user", "content": QUESTION},
        ],
    )  # fmt: skip
    assert made.output_text == told(
        client,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "Speak French."},
            {"role": "user", "content": "Hi there"},
            {"role": "assistant", "content": "Salut"},
            {"role": "user", "content": QUESTION},
        ],
    )
    assert made.instructions == "Be brief."


def test_events_tell_the_same(client: openai.OpenAI) -> None:
    whole = respond(client, max_output_tokens=12)
    events = list(respond(client, max_output_tokens=12, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 3 and "".join(deltas) == whole.output_text
    assert events[4].item_id == events[-2].item.id and events[0].response.output == []
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage == whole.usage
    assert {event.response.id for event in (events[0], events[1], events[-1])} == {last.id}


def test_openai_client_accumulates_response_events(client: openai.OpenAI) -> None:
    whole = respond(client, max_output_tokens=12)
    with client.responses.stream(
        model="tiny", input=QUESTION, max_output_tokens=12, temperature=0
    ) as stream:
        done = [event for event in stream if event.type == "response.output_text.done"]
    assert [event.text for event in done] == [whole.output_text]
    with client.responses.stream(
        model="tiny", input=QUESTION, temperature=0, tools=TOOLS, tool_choice="required"
    ) as stream:
        final = stream.get_final_response()
    (call,) = final.output
    assert call.type == "function_call" and call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")


def test_tool_call_and_output_round_trip(client: openai.OpenAI) -> None:
    named = {"type": "function", "name": "weather"}
    made = respond(client, tools=TOOLS, tool_choice=named, max_output_tokens=80)
    (call,) = made.output
    assert made.status == "completed" and made.tool_choice.name == "weather"
    assert (call.type, call.status) == ("function_call", "completed")
    assert call.call_id.startswith("call_") and call.id.startswith("fc_")
    assert set(json.loads(call.arguments)) == {"city", "day"}
    assert made.tools[0].name == "weather"
    after = [
        {"role": "user", "content": QUESTION},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    function = {name: value for name, value in TOOLS[0].items() if name != "type"}
    asked_for = {"name": "weather", "arguments": call.arguments}
    expected = told(
        client,
        [
            {"role": "user", "content": QUESTION},
            {"role": "assistant",
             "tool_calls": [{"id": call.call_id, "type": "function", "function": asked_for}]},
            {"role": "tool", "tool_call_id": call.call_id, "content": "rain"},
        ],
        tools=[{"type": "function", "function": function}],
    )  # fmt: skip
    assert respond(client, input=after, tools=TOOLS).output_text == expected


@pytest.mark.slow
def test_truncated_tool_call_is_omitted(client: openai.OpenAI) -> None:
    made = respond(client, tools=TOOLS, tool_choice="required", max_output_tokens=5)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert made.output_text == "" and [each.type for each in made.output] == ["message"]
    assert made.usage.output_tokens == 5


def test_response_logprobs_match_stream(client: openai.OpenAI) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 3}
    made = respond(client, **asked)
    (part,) = made.output[0].content
    assert len(part.logprobs) == 8
    assert all(len(each.top_logprobs) == 3 and each.logprob <= 0 for each in part.logprobs)
    events = respond(client, stream=True, **asked)
    streamed = [each for event in events if event.type.endswith("delta") for each in event.logprobs]
    assert [each.logprob for each in streamed] == [each.logprob for each in part.logprobs]


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "[]"}]},
         "input[0].arguments"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b",
                     "arguments": '{"c": "\\ud800"}'}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b",
                     "arguments": '{"c": NaN}'}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b",
                     "arguments": '{"c": 1e400}'}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "{}"}]},
         "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search", "name": "a"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "b"}}, "tool_choice.name"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "odd"}}}},
         "text.format.schema"),
    ],
)  # fmt: skip
def test_invalid_response_request_names_parameter(
    client: openai.OpenAI, changes: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        respond(client, **changes)
    assert refused.value.param == parameter, refused.value.message


def test_overlong_input_and_unknown_model_are_rejected(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        respond(client, input="long " * 5000)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.NotFoundError) as missing:
        respond(client, model="none")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


@pytest.mark.slow
def test_abandoned_response_stream_releases_model(client: openai.OpenAI, service: Any) -> None:
    stream = respond(client, stream=True, max_output_tokens=100)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 5
    while any(entry.uses for entry in service.pool._entries.values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_failure_during_stream_is_last_event(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.inference.inference import InferenceFailed, Stream

    honest, count = Stream.__next__, [0]

    def failing(self: Stream) -> Any:
        count[0] += 1
        if count[0] > 3:
            raise InferenceFailed("ModelError", "The model failed: of its own.")
        return honest(self)

    monkeypatch.setattr(Stream, "__next__", failing)
    events = list(respond(client, stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert "of its own" in events[-1].response.error.message


@pytest.mark.slow
def test_batch_accepts_responses_requests(client: openai.OpenAI, service: Any) -> None:
    service.openai.start()
    bodies = [
        {"model": "tiny", "input": QUESTION, "max_output_tokens": 8, "temperature": 0},
        {"model": "tiny", "input": []},
    ]
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/responses", "body": body}
        for number, body in enumerate(bodies)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/responses", completion_window="24h"
    )
    deadline = time.monotonic() + 30
    while batch.status != "completed":
        assert time.monotonic() < deadline and batch.status != "failed"
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id and batch.error_file_id
    (made,) = map(json.loads, client.files.content(batch.output_file_id).text.splitlines())
    read = Response.model_validate(made["response"]["body"])
    assert read.output_text == respond(client).output_text
    (bad,) = map(json.loads, client.files.content(batch.error_file_id).text.splitlines())
    assert bad["custom_id"] == "1" and bad["response"]["status_code"] == 400
