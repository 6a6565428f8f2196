"""Converse and ConverseStream of a real server, called with boto3."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import runtime_service as serving
from botocore.exceptions import ClientError, EventStreamError
from jsonschema import validate
from runtime_service import MODEL, SCHEMA, TOOL, Service, said, streamed, text_of

from luthier.inference.inference import InferenceFailed
from luthier.inference.pool import ModelPool

# Fixtures for these modules only: their imports take time.
runtime_client = serving.runtime_client
runtime_pool = serving.runtime_pool
runtime_service = serving.runtime_service


def test_converse_stream_matches_converse(runtime_client: Any) -> None:
    answer = runtime_client.converse(**said())
    assert answer["output"]["message"]["role"] == "assistant"
    assert answer["stopReason"] == "max_tokens"
    assert answer["usage"]["outputTokens"] == 24
    usage = answer["usage"]
    assert usage["inputTokens"] + usage["outputTokens"] == usage["totalTokens"]
    assert answer["metrics"]["latencyMs"] > 0
    events = streamed(runtime_client, **said())
    kinds = [next(iter(event)) for event in events]
    assert kinds[0] == "messageStart" and events[0]["messageStart"]["role"] == "assistant"
    assert set(kinds[1:-3]) == {"contentBlockDelta"} and len(kinds) > 6
    assert kinds[-3:] == ["contentBlockStop", "messageStop", "metadata"]
    deltas = [event["contentBlockDelta"]["delta"]["text"] for event in events[1:-3]]
    assert "".join(deltas) == text_of(answer)
    assert events[-2]["messageStop"]["stopReason"] == "max_tokens"
    assert events[-1]["metadata"]["usage"] == usage
    assert events[-1]["metadata"]["metrics"]["latencyMs"] > 0


def test_stop_sequence_in_converse_and_stream(runtime_client: Any) -> None:
    whole = text_of(runtime_client.converse(**said()))
    stop = whole[7:10]
    request = said(
        inferenceConfig={"stopSequences": [stop]},
        additionalModelResponseFieldPaths=["/stop_sequence", "/unknown"],
    )
    answer = runtime_client.converse(**request)
    assert (text_of(answer), answer["stopReason"]) == (whole[: whole.index(stop)], "stop_sequence")
    assert answer["additionalModelResponseFields"] == {"stop_sequence": stop}
    events = streamed(runtime_client, **request)
    assert events[-2]["messageStop"] == {
        "stopReason": "stop_sequence",
        "additionalModelResponseFields": {"stop_sequence": stop},
    }
    assert events[-1]["metadata"]["usage"] == answer["usage"]


def test_additional_request_fields_are_applied(runtime_client: Any) -> None:
    def text(**further: Any) -> str:
        request = said(
            inferenceConfig={"temperature": 1.0, "topP": 1.0}, additionalModelRequestFields=further
        )
        return text_of(runtime_client.converse(**request))

    assert text(seed=7) == text(seed=7) != text(seed=8)
    assert text(top_k=1) == text_of(runtime_client.converse(**said()))
    assert text(seed=7, repetition_penalty=1.9) != text(seed=7)
    with pytest.raises(ClientError, match="#/tok "):
        text(tok=1)


def test_no_stop_before_min_tokens(runtime_client: Any) -> None:
    def ended(least: int, most: int = 24) -> tuple[str, str]:
        config = {"stopSequences": [whole[:1]], "maxTokens": most, "temperature": 0.0}
        request = said(inferenceConfig=config, additionalModelRequestFields={"min_tokens": least})
        answer = runtime_client.converse(**request)
        return text_of(answer), answer["stopReason"]

    whole = text_of(runtime_client.converse(**said()))
    assert ended(24) == (whole, "max_tokens")
    cut, reason = ended(4)
    assert whole.startswith(cut) and cut and (reason == "stop_sequence") == (cut != whole)
    for least, most in ((25, 24), (-1, 24)):
        with pytest.raises(ClientError) as refused:
            ended(least, most)
        assert refused.value.response["Error"]["Code"] == "ValidationException"
        assert "min_tokens" in refused.value.response["Error"]["Message"]


def formatted(schema: str) -> dict[str, Any]:
    structure = {"jsonSchema": {"schema": schema, "name": "x"}}
    return {"outputConfig": {"textFormat": {"type": "json_schema", "structure": structure}}}


def test_replies_match_json_schema(runtime_client: Any) -> None:
    config = {"maxTokens": 300, "temperature": 1.0}
    for _ in range(5):
        answer = runtime_client.converse(
            **said(inferenceConfig=config, **formatted(json.dumps(SCHEMA)))
        )
        assert answer["stopReason"] == "end_turn"
        validate(json.loads(text_of(answer)), SCHEMA)
    for wrong in ("{", "[]", '{"type": "objekt"}'):
        with pytest.raises(ClientError) as refused:
            runtime_client.converse_stream(**said(**formatted(wrong)))
        assert refused.value.response["Error"]["Code"] == "ValidationException"


def test_replies_match_regular_expression(runtime_client: Any) -> None:
    def fields(**structured: str) -> dict[str, Any]:
        return {"additionalModelRequestFields": {"structured_outputs": structured}}

    answer = runtime_client.converse(**said(**fields(regex="[xy]{5}")))
    assert set(text_of(answer)) <= {"x", "y"} and len(text_of(answer)) == 5
    assert answer["stopReason"] == "end_turn"
    for wrong in (fields(regex="a("), fields(), fields(regex="a") | formatted("{}")):
        with pytest.raises(ClientError) as refused:
            runtime_client.converse(**said(**wrong))
        assert refused.value.response["Error"]["Code"] == "ValidationException"


@pytest.mark.parametrize("choice", [{"any": {}}, {"tool": {"name": "mood"}}])
def test_tool_call_round_trip(runtime_client: Any, choice: dict[str, Any]) -> None:
    config = {"tools": [TOOL], "toolChoice": choice}
    request = said(toolConfig=config, inferenceConfig={"maxTokens": 200})
    answer = runtime_client.converse(**request)
    assert answer["stopReason"] == "tool_use"
    (block,) = answer["output"]["message"]["content"]
    use = block["toolUse"]
    assert use["name"] == "mood"
    validate(use["input"], SCHEMA)
    events = streamed(runtime_client, **request)
    start = next(event["contentBlockStart"] for event in events if "contentBlockStart" in event)
    assert start["start"]["toolUse"]["name"] == "mood"
    parts = [
        e["contentBlockDelta"]["delta"]["toolUse"]["input"]
        for e in events
        if "contentBlockDelta" in e
    ]
    assert json.loads("".join(parts)) == use["input"]
    assert events[-2]["messageStop"]["stopReason"] == "tool_use"
    result = {"toolUseId": use["toolUseId"], "content": [{"json": {"is": 1}}, {"text": "ok"}]}
    request["messages"] += [
        {"role": "assistant", "content": [{"toolUse": use}]},
        {"role": "user", "content": [{"toolResult": result}, {"text": "And?"}]},
    ]
    request["toolConfig"] = {"tools": [TOOL]}
    again = runtime_client.converse(**request)
    assert again["usage"]["inputTokens"] > answer["usage"]["inputTokens"]


@pytest.mark.parametrize("choice", [{"any": {}}, {"tool": {"name": "mood"}}])
def test_truncated_tool_call_is_omitted(runtime_client: Any, choice: dict[str, Any]) -> None:
    config = {"tools": [TOOL], "toolChoice": choice}
    for most in (1, 3, 9):
        request = said(toolConfig=config, inferenceConfig={"maxTokens": most})
        answer = runtime_client.converse(**request)
        assert (answer["stopReason"], text_of(answer)) == ("max_tokens", "")
        assert answer["usage"]["outputTokens"] == most
        events = streamed(runtime_client, **request)
        assert not any("contentBlockStart" in event for event in events)
        assert events[1]["contentBlockDelta"]["delta"] == {"text": ""}
        assert events[-2]["messageStop"]["stopReason"] == "max_tokens"
        assert events[-1]["metadata"]["usage"] == answer["usage"]


def blocks(*content: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [{"text": "x"}]} for role in roles]}


PIXEL = {"image": {"format": "png", "source": {"bytes": b"x"}}}
RESULT = {"toolResult": {"toolUseId": "a", "content": [{"text": "x"}]}}
ASKS_TWICE = {
    "toolConfig": {"tools": [TOOL]},
    "messages": [
        {"role": "user", "content": [{"text": "x"}]},
        {
            "role": "assistant",
            "content": [{"toolUse": {"toolUseId": i, "name": "mood", "input": {}}} for i in "ab"],
        },
    ],
}


def answered(*results: dict[str, Any]) -> dict[str, Any]:
    """Return a turn with two tool calls, followed by ``results``."""
    turn = {"role": "user", "content": list(results)}
    return {**ASKS_TWICE, "messages": [*ASKS_TWICE["messages"], turn]}


WRONG: list[tuple[dict[str, Any], str]] = [
    (turns("assistant"), "must start with a user message"),
    (turns("user", "user"), "must alternate between user and assistant roles"),
    (turns("user", "assistant"), "must end with a user message"),
    ({"messages": []}, "'messages' failed to satisfy constraint"),
    (blocks(), "content field in the Message object at messages.0 is empty"),
    (blocks({"text": " "}), "at messages.0.content.0 is blank"),
    (blocks(PIXEL), "doesn't support the image field"),
    (blocks(RESULT), "toolConfig field must be defined"),
    ({**blocks(RESULT), "toolConfig": {"tools": [TOOL]}}, "no toolUse block"),
    (answered(RESULT), "Expected toolResult blocks for the following Ids: b"),
    (answered(RESULT, {"text": "x"}), "Expected toolResult blocks for the following Ids: b"),
    (answered({"text": "x"}), "Expected toolResult blocks for the following Ids: a, b"),
    (answered(RESULT, RESULT), "no toolUse block"),
    ({"inferenceConfig": {"maxTokens": 0}}, "'inferenceConfig.maxTokens' failed"),
    ({"inferenceConfig": {"temperature": 1.01}}, "less than or equal to 1"),
    ({"inferenceConfig": {"topP": -0.1}}, "'inferenceConfig.topP' failed"),
    ({"inferenceConfig": {"stopSequences": [""]}}, "stopSequences.1.member"),
    ({"toolConfig": {"tools": [TOOL, TOOL]}}, "defined more than once"),
    (
        {"toolConfig": {"tools": [TOOL], "toolChoice": {"tool": {"name": "b"}}}},
        "missing in toolConfig.tools",
    ),
    ({"guardrailConfig": {"guardrailIdentifier": "a", "guardrailVersion": "1"}}, "not supported"),
    ({"requestMetadata": {str(i): "x" for i in range(17)}}, "requestMetadata"),
    (blocks({"text": "fox " * 2000}), "Input is too long for requested model."),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_invalid_stream_request_returns_plain_error(
    runtime_client: Any, fields: dict[str, Any], message: str
) -> None:
    request = said()
    for name, value in fields.items():
        request[name] = value
    for operation in (runtime_client.converse, runtime_client.converse_stream):
        with pytest.raises(ClientError) as refused:
            operation(**request)
        assert refused.value.response["Error"]["Code"] == "ValidationException"
        assert message in refused.value.response["Error"]["Message"]


def test_unknown_model_is_not_found(runtime_client: Any) -> None:
    with pytest.raises(ClientError) as unknown:
        runtime_client.converse(**{**said(), "modelId": "test.unknown"})
    assert unknown.value.response["Error"]["Code"] == "ResourceNotFoundException"


def test_client_disconnect_stops_decoding(
    runtime_service: tuple[Service, str],
    runtime_client: Any,
    runtime_pool: ModelPool,
    tiny_model_folder: Path,
) -> None:
    decoder = runtime_pool._entries[str(tiny_model_folder)].model
    body = json.dumps(
        {"messages": said()["messages"], "inferenceConfig": {"maxTokens": 900, "temperature": 1}}
    ).encode()
    request = urllib.request.Request(f"{runtime_service[1]}/model/{MODEL}/converse-stream", body)
    answers = [urllib.request.urlopen(request) for _ in range(8)]
    for answer in answers:
        answer.read(10)
        answer.close()
    until = time.monotonic() + 1.5
    while not decoder.idle and time.monotonic() < until:
        time.sleep(0.02)
    assert decoder.idle


def test_failure_during_stream_is_an_event(
    runtime_client: Any,
    runtime_pool: ModelPool,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = runtime_pool._entries[str(tiny_model_folder)].model._backend
    step, count = backend.step, 0

    def fail(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise InferenceFailed("ModelError", "no")
        return step(*arguments)

    monkeypatch.setattr(backend, "step", fail)
    with pytest.raises(EventStreamError, match="modelStreamErrorException"):
        streamed(runtime_client, **said())
    count = 0
    with pytest.raises(ClientError) as failed:
        runtime_client.converse(**said())
    assert failed.value.response["Error"]["Code"] == "ModelErrorException"
