"""Chat and responses of a reasoning model, by the unmodified client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from thinking_models import CALLS, PAINT, THOUGHT

pytestmark = pytest.mark.usefixtures("thinking_base")
TOOL: Any = {"type": "function", "function": PAINT}
SETTINGS: Any = {"model": "thinker", "temperature": 0}


def chat(client: openai.OpenAI, *messages: Any, **changes: Any) -> Any:
    asked = messages or ({"role": "user", "content": "sky?"},)
    return client.chat.completions.create(
        messages=[*asked], **{"max_tokens": 120, **SETTINGS, **changes}
    )


def respond(client: openai.OpenAI, given: Any = "sky?", **changes: Any) -> Any:
    return client.responses.create(input=given, **{"max_output_tokens": 120, **SETTINGS, **changes})


@pytest.mark.slow
def test_chat_returns_reasoning_content(client: openai.OpenAI) -> None:
    made = chat(client, n=2)
    for choice in made.choices:
        assert choice.message.reasoning_content == THOUGHT
        assert (choice.message.content, choice.finish_reason) == ("blue", "stop")
    details = made.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens == made.usage.completion_tokens - 2 * len("blue")
    cut = chat(client, max_tokens=20)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("", "length")
    assert THOUGHT.startswith(cut.choices[0].message.reasoning_content)
    assert cut.usage.completion_tokens_details.reasoning_tokens == 20
    stopped = chat(client, stop=["\n", "u"]).choices[0]
    assert (stopped.message.reasoning_content, stopped.message.content) == (THOUGHT, "bl")


def test_stream_returns_reasoning_before_content(client: openai.OpenAI) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    whole, chunks = chat(client, logprobs=True), [*chat(client, **options)]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thoughts = [getattr(delta, "reasoning_content", None) for delta in deltas]
    assert "".join(filter(None, thoughts)) == THOUGHT
    said = [delta.content for delta in deltas]
    assert "".join(filter(None, said)) == "blue"
    first = next(place for place, text in enumerate(said) if text)
    assert not any(thoughts[first:]) and sum(map(bool, thoughts)) > 5
    assert chunks[-1].usage == whole.usage
    scores = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    told = [token for each in scores if each for token in each.content]
    assert told == whole.choices[0].logprobs.content
    assert "".join(token.token for token in told) == "blue"
    before = whole.choices[0].logprobs.reasoning_content
    assert len(before) == whole.usage.completion_tokens_details.reasoning_tokens


def test_disabled_reasoning_is_absent_from_reply(client: openai.OpenAI) -> None:
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    made = chat(client, extra_body=quiet)
    assert not hasattr(made.choices[0].message, "reasoning_content")
    assert made.choices[0].message.content
    assert made.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.slow
def test_tool_call_follows_reasoning(client: openai.OpenAI) -> None:
    asked = {"role": "user", "content": CALLS}
    message = chat(client, asked, tools=[TOOL]).choices[0].message
    (call,) = message.tool_calls
    assert (message.reasoning_content, message.content) == (THOUGHT, None)
    assert json.loads(call.function.arguments) == {"colour": "red"}
    chunks = [*chat(client, asked, tools=[TOOL], stream=True)]
    thoughts = [getattr(chunk.choices[0].delta, "reasoning_content", None) for chunk in chunks]
    assert "".join(filter(None, thoughts)) == THOUGHT
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.slow
def test_reply_after_reasoning_matches_json_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    message = chat(client, response_format=form).choices[0].message
    assert (message.reasoning_content, json.loads(message.content)["n"]) == (THOUGHT, 7)
    form = {"structured_outputs": {"choice": ["red", "grey"]}}
    message = chat(client, extra_body=form).choices[0].message
    assert message.reasoning_content == THOUGHT and message.content in ("red", "grey")


@pytest.mark.slow
def test_conversation_includes_reasoning_of_earlier_turn(client: openai.OpenAI) -> None:
    """Reasoning is accepted as ``reasoning_content`` and under vLLM's newer name ``reasoning``."""
    asked, more = {"role": "user", "content": "sky?"}, {"role": "user", "content": "how many?"}
    came = chat(client).choices[0].message
    plain = {"role": "assistant", "content": "blue"}

    def read(turn: Any) -> int:
        return int(chat(client, asked, turn, more, max_tokens=1).usage.prompt_tokens)

    assert read(came) == read({**plain, "reasoning": THOUGHT}) > read(plain)
    alone = {"role": "assistant", "reasoning_content": THOUGHT}
    assert read(alone) == read({**plain, "reasoning_content": THOUGHT}) - len("blue")
    long = {**plain, "reasoning_content": "long " * 200_000}
    with pytest.raises(openai.BadRequestError) as refused:
        read(long)
    assert refused.value.code == "context_length_exceeded"


def test_response_returns_reasoning_item(client: openai.OpenAI) -> None:
    made = respond(client)
    reasoning, message = made.output
    assert (reasoning.type, reasoning.status, reasoning.summary) == ("reasoning", "completed", [])
    assert [(part.type, part.text) for part in reasoning.content] == [("reasoning_text", THOUGHT)]
    assert (message.type, made.output_text, made.status) == ("message", "blue", "completed")
    details = made.usage.output_tokens_details
    assert details.reasoning_tokens == made.usage.output_tokens - len("blue")
    cut = respond(client, max_output_tokens=20)
    assert (cut.status, cut.output_text) == ("incomplete", "")
    (item,) = cut.output
    assert (item.type, item.status) == ("reasoning", "incomplete")
    reasoning, call = respond(client, CALLS, tools=[{"type": "function", **PAINT}]).output
    assert (reasoning.content[0].text, call.type, call.name) == (THOUGHT, "function_call", "paint")


@pytest.mark.slow
def test_response_events_include_reasoning(client: openai.OpenAI) -> None:
    events = [*respond(client, stream=True)]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    kinds = [event.type.removeprefix("response.") for event in events]
    short = [kind for place, kind in enumerate(kinds) if kind != kinds[place - 1]]
    assert short == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    deltas = [event for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(event.delta for event in deltas) == THOUGHT
    done = next(event for event in events if event.type == "response.reasoning_text.done")
    assert (done.text, done.output_index, done.content_index) == (THOUGHT, 0, 0)
    assert {event.item_id for event in deltas} == {done.item_id}
    reasoning, _ = events[-1].response.output
    assert (reasoning.id, reasoning.content[0].text) == (done.item_id, THOUGHT)
    with client.responses.stream(input="sky?", max_output_tokens=120, **SETTINGS) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output_text == "blue"


@pytest.mark.slow
def test_response_items_are_accepted_as_input(client: openai.OpenAI) -> None:
    """Output items in the next request equal the turns of a chat."""
    asked, more = {"role": "user", "content": "sky?"}, {"role": "user", "content": "how many?"}
    came = [item.to_dict() for item in respond(client).output]
    read = respond(client, [asked, *came, more], max_output_tokens=1).usage.input_tokens
    turn = {"role": "assistant", "content": "blue", "reasoning_content": THOUGHT}
    assert read == chat(client, asked, turn, more, max_tokens=1).usage.prompt_tokens
    elsewhere = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    without = [asked, elsewhere, came[1], more]
    read = respond(client, without, max_output_tokens=1).usage.input_tokens
    plain = {"role": "assistant", "content": "blue"}
    assert read == chat(client, asked, plain, more, max_tokens=1).usage.prompt_tokens
    tools = [{"type": "function", **PAINT}]
    called = [item.to_dict() for item in respond(client, CALLS, tools=tools).output]
    output = {"type": "function_call_output", "call_id": called[1]["call_id"], "output": "done"}
    items = [{"role": "user", "content": CALLS}, *called, output]
    assert respond(client, items, tools=tools, max_output_tokens=1).usage.input_tokens > read
