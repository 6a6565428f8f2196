"""Chat completions, by the unmodified client."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import openai
import pytest

ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]
pytestmark = pytest.mark.usefixtures("tiny_base")


def chat(client: openai.OpenAI, **changes: Any) -> Any:
    fields = {"model": "tiny", "messages": ASKED, "max_tokens": 8, "temperature": 0, **changes}
    return client.chat.completions.create(**fields)


def test_chat_completion_has_message_and_usage(client: openai.OpenAI) -> None:
    made = chat(client)
    assert made.id.startswith("chatcmpl-")
    assert (made.object, made.model) == ("chat.completion", "tiny")
    (choice,) = made.choices
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert made.usage.completion_tokens == 8
    assert made.usage.total_tokens == made.usage.prompt_tokens + 8
    assert chat(client).choices == made.choices
    assert chat(client, model="luthier.tiny").choices == made.choices


def test_templates_of_clients_are_not_run(client: openai.OpenAI) -> None:
    """Names that the chat template does not read have no effect, as in vLLM."""
    for kwargs in ({"enable_thinking": False}, {"chat_template": "{{ 'x' * 99 }}"}):
        made = chat(client, extra_body={"chat_template_kwargs": kwargs})
        assert made.usage == chat(client).usage
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
        chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": [1]}})


@pytest.mark.slow
def test_stream_matches_completion_text(client: openai.OpenAI) -> None:
    whole = chat(client, n=2, max_completion_tokens=12, max_tokens=None)
    chunks = list(
        chat(
            client,
            n=2,
            max_completion_tokens=12,
            max_tokens=None,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts, ends = ["", ""], [[], []]  # type: ignore[var-annotated]
    for chunk in chunks[:-1]:
        assert chunk.object == "chat.completion.chunk"
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index].append(choice.finish_reason)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [["length"], ["length"]]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 8


@pytest.mark.slow
def test_abandoned_chat_stream_releases_model(client: openai.OpenAI, service: Any) -> None:
    stream = chat(client, stream=True, max_tokens=100)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 30
    while any(entry.uses for entry in service.pool._entries.values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_seed_reproduces_samples(client: openai.OpenAI) -> None:
    def drawn(**changes: Any) -> list[str]:
        made = chat(client, temperature=1.5, n=3, max_tokens=12, **changes)
        return [choice.message.content for choice in made.choices]

    first = drawn(seed=7)
    assert drawn(seed=7) == first
    assert len(set(first)) == 3
    assert drawn(seed=-8) != first


@pytest.mark.slow
def test_stop_strings_end_reply(client: openai.OpenAI) -> None:
    text = chat(client, max_tokens=16).choices[0].message.content
    mark = text[5:8]
    cut = chat(client, max_tokens=16, stop=mark).choices[0]
    assert cut.message.content == text[: text.index(mark)]
    assert cut.finish_reason == "stop"
    assert chat(client, max_tokens=16, stop=["never there", mark]).choices[0] == cut


def test_chat_logprobs_match_stream(client: openai.OpenAI) -> None:
    made = chat(client, logprobs=True, top_logprobs=3)
    content = made.choices[0].logprobs.content
    assert len(content) == made.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(each.logprob for each in token.top_logprobs)
        assert token.logprob <= 0
    written = b"".join(bytes(token.bytes) for token in content)
    assert written.decode("utf-8", "replace").startswith(made.choices[0].message.content[:3])
    assert chat(client).choices[0].logprobs is None
    streamed = [
        token
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == content


def test_logit_bias_forbids_a_token(client: openai.OpenAI) -> None:
    first = chat(client, max_tokens=1).choices[0].message.content
    biases = {str(token): -100 for token in range(160)}
    assert chat(client, max_tokens=1, logit_bias=biases).choices[0].message.content != first


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(("structured", "texts"), [
    ({"regex": "[0-9]{3}ü"}, "[0-9]{3}ü"),
    ({"choice": ["a.b", "c|d"]}, r"a\.b|c\|d"),
    ({"grammar": 'start: "x" /[yz]{2}/'}, "x[yz]{2}"),
    ({"json": {"enum": ["yes"]}}, '"yes"'),
    ({"json": '{"enum": ["yes"]}'}, '"yes"'),
])  # fmt: skip
def test_structured_outputs_of_vllm(
    client: openai.OpenAI, structured: dict[str, Any], texts: str
) -> None:
    extra = {"structured_outputs": structured}
    made = chat(client, max_tokens=40, temperature=1.5, n=2, extra_body=extra)
    assert [choice.finish_reason for choice in made.choices] == ["stop", "stop"]
    assert all(re.fullmatch(texts, choice.message.content) for choice in made.choices)
    chunks = chat(client, max_tokens=40, stream=True, extra_body=extra)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert re.fullmatch(texts, streamed)
    completed = client.completions.create(
        model="tiny", prompt="Hi", max_tokens=40, extra_body=extra
    )
    assert re.fullmatch(texts, completed.choices[0].text)
    responded = client.responses.create(model="tiny", input="Hi", extra_body=extra)
    assert re.fullmatch(texts, responded.output_text)


@pytest.mark.parametrize("structured", [
    {"regex": "a("},
    {"grammar": "start: b"},
    {"json": {"type": "objekt"}},
    {"regex": "a", "grammar": "b"},
    {},
    {"json": "{"},
    {"structural_tag": "a"},
    {"choice": []},
])  # fmt: skip
def test_invalid_structured_outputs_are_rejected(
    client: openai.OpenAI, structured: dict[str, Any]
) -> None:
    extra = {"structured_outputs": structured}
    for ask in (
        lambda: chat(client, extra_body=extra),
        lambda: client.completions.create(model="tiny", prompt="Hi", extra_body=extra),
        lambda: client.responses.create(model="tiny", input="Hi", extra_body=extra),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            ask()
        assert str(refused.value.param).startswith("structured_outputs")


def test_response_format_conflicts_with_structured_outputs(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"regex": "a"}}
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, response_format={"type": "json_object"}, extra_body=extra)
    assert refused.value.param == "structured_outputs"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(
            model="tiny", input="Hi", text={"format": {"type": "json_object"}}, extra_body=extra
        )
    assert refused.value.param == "structured_outputs"


@pytest.mark.slow
def test_response_format_constrains_reply(client: openai.OpenAI) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True},
    }
    enum = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}
    enum["additionalProperties"] = False
    made = chat(client, max_tokens=60, response_format=form)
    assert made.choices[0].message.content.startswith('{"colour": "')
    form["json_schema"]["schema"] = enum  # type: ignore[index]
    made = chat(client, max_tokens=60, response_format=form)
    assert json.loads(made.choices[0].message.content) == {"a": "x"}
    assert made.choices[0].finish_reason == "stop"
    any_object = chat(client, max_tokens=5, response_format={"type": "json_object"})
    assert any_object.choices[0].message.content.startswith("{")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "pick",
            "description": "Pick one.",
            "parameters": {
                "type": "object",
                "properties": {"which": {"enum": ["a", "b"]}},
                "required": ["which"],
                "additionalProperties": False,
            },
        },
    },
]


@pytest.mark.slow
def test_required_tool_is_called(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "pick"}}
    made = chat(client, tools=TOOLS, tool_choice=named, max_tokens=80)
    (choice,) = made.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "pick")
    assert call.id.startswith("call_")
    assert json.loads(call.function.arguments)["which"] in ("a", "b")
    assert choice.message.content is None
    chunks = list(chat(client, tools=TOOLS, tool_choice="required", max_tokens=80, stream=True))
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert parts[0].function.name == "pick" and parts[0].id.startswith("call_")
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    values = [
        *ASKED,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    assert chat(client, tools=TOOLS, messages=values).choices[0].finish_reason in ("length", "stop")


def test_truncated_tool_call_is_omitted(client: openai.OpenAI) -> None:
    for most in (1, 4, 9):
        asked = {"tools": TOOLS, "tool_choice": "required", "max_tokens": most}
        made = chat(client, **asked)
        (choice,) = made.choices
        assert choice.finish_reason == "length" and made.usage.completion_tokens == most
        assert choice.message.tool_calls is None and choice.message.content == ""
        deltas = [chunk.choices[0] for chunk in chat(client, **asked, stream=True)]
        assert deltas[-1].finish_reason == "length"
        assert not any(each.delta.content or each.delta.tool_calls for each in deltas)


CALLS = [
    {"id": name, "type": "function", "function": {"name": "pick", "arguments": "{}"}}
    for name in ("a", "b")
]
ASSISTANT = {"role": "assistant", "tool_calls": CALLS}


def result(name: str) -> dict[str, str]:
    return {"role": "tool", "tool_call_id": name, "content": "done"}


def test_tool_calls_require_matching_results(client: openai.OpenAI) -> None:
    both = [*ASKED, ASSISTANT, result("b"), result("a")]
    chat(client, tools=TOOLS, messages=both)
    chat(client, tools=TOOLS, messages=[*both, ASSISTANT, result("a"), result("b"), *ASKED])
    for messages, param in (
        ([*ASKED, ASSISTANT], "messages[1].tool_calls"),
        ([*ASKED, ASSISTANT, result("b")], "messages[1].tool_calls"),
        ([*ASKED, ASSISTANT, result("b"), *ASKED, result("a")], "messages[1].tool_calls"),
        ([*both, result("a")], "messages[4].tool_call_id"),
        ([*ASKED, result("a")], "messages[1].tool_call_id"),
        ([*both, *ASKED, result("a")], "messages[5].tool_call_id"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, tools=TOOLS, messages=messages)
        assert refused.value.param == param


def test_messages_in_parts_and_all_roles(client: openai.OpenAI) -> None:
    parts = [
        {"type": "text", "text": "What is the "},
        {"type": "text", "text": "capital of France?"},
    ]
    assert (
        chat(client, messages=[{"role": "user", "content": parts}]).choices == chat(client).choices
    )
    system, developer = (
        chat(client, messages=[{"role": role, "content": "Be short."}, *ASKED])
        for role in ("system", "developer")
    )
    assert system.choices == developer.choices


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [*ASKED, {"role": "tool", "content": "a"}]}, "messages[1].tool_call_id"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].image_url.url",
    ),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "8"}, "max_tokens"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
]


@pytest.mark.slow
def test_invalid_chat_request_names_parameter(client: openai.OpenAI) -> None:
    for changes, param in REFUSED:
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, **changes)
        assert refused.value.param == param, changes
        assert refused.value.type == "invalid_request_error"


def test_missing_messages_parameter_is_rejected(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/chat/completions", body={"model": "tiny"}, cast_to=object)
    assert (refused.value.param, refused.value.code) == ("messages", "missing_required_parameter")


def test_prompt_beyond_context_is_rejected(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "The quick brown fox. " * 400}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, messages=long, stream=stream)
        assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(("member", "value", "code"), [
    ("temprature", 0, "unknown_parameter"),
    ("guided_choice", ["yes"], "unknown_parameter"),
    ("functions", [{"name": "f"}], "unsupported_parameter"),
    ("function_call", {"name": "f"}, "unsupported_parameter"),
    ("audio", {"voice": "alloy"}, "unsupported_parameter"),
    ("web_search_options", {}, "unsupported_parameter"),
])  # fmt: skip
def test_unsupported_members_are_rejected(
    client: openai.OpenAI, member: str, value: Any, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_body={member: value})
    assert (refused.value.param, refused.value.code) == (member, code)
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, modalities=["audio", "text"])
    assert (refused.value.param, refused.value.code) == ("modalities[0]", "invalid_value")


def test_members_without_effect_are_accepted(client: openai.OpenAI) -> None:
    plain = chat(client).choices[0].message.content
    extra: dict[str, Any] = {
        "user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
        "parallel_tool_calls": True, "modalities": ["text"], "audio": None, "function_call": "auto",
        "prediction": {"type": "content", "content": "x"}, "prompt_cache_key": "k",
    }  # fmt: skip
    assert chat(client, **extra).choices[0].message.content == plain
    # vLLM's top_k: with a single candidate, sampling is greedy.
    drawn = chat(client, temperature=2, extra_body={"top_k": 1, "min_p": 0.1})
    assert drawn.choices[0].message.content == plain
    assert chat(client, extra_body={"top_k": -1}).choices[0].message.content == plain
    again = chat(client, extra_body={"repetition_penalty": 0.1}).choices[0].message.content
    assert again != plain


def test_no_stop_before_min_tokens(client: openai.OpenAI, tokenizer: Any) -> None:
    stops = {str(tokenizer.eos_token_id): 100}
    assert chat(client, logit_bias=stops).usage.completion_tokens == 0
    made = chat(client, logit_bias=stops, extra_body={"min_tokens": 5})
    assert (made.usage.completion_tokens, made.choices[0].finish_reason) == (5, "stop")
    whole = chat(client).choices[0].message.content
    kept = chat(client, stop=[whole[:1]], extra_body={"min_tokens": 8})
    assert kept.choices[0].message.content == whole
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_body={"min_tokens": 9})
    assert refused.value.param == "min_tokens"


@pytest.mark.parametrize(
    "model", ["gpt-4o", "ft:tiny:org-1:a:b:ckpt-step-24", "arn:aws:bedrock:a", "../tiny"]
)
def test_unknown_chat_model_is_rejected(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        chat(client, model=model)
    assert refused.value.code == "model_not_found"


def test_encoder_is_rejected_for_chat(client: openai.OpenAI, tiny_encoder: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, model=tiny_encoder)
    assert refused.value.param == "model"
