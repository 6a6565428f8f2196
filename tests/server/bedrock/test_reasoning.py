"""Converse, ConverseStream and InvokeModel with a reasoning model, called with boto3."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import runtime_service as serving
from botocore.config import Config
from botocore.exceptions import ClientError
from runtime_service import Service, said, streamed
from thinking_models import CALLS, PAINT, THOUGHT

from luthier.inference.pool import ModelPool

runtime_pool = serving.runtime_pool
TOOL = {"toolSpec": {"name": PAINT["name"], "inputSchema": {"json": PAINT["parameters"]}}}
LONG: Any = {"maxTokens": 120}


@pytest.fixture(scope="module")
def thinker(
    runtime_pool: ModelPool, thinking_folder: Callable[[str], Path]
) -> Iterator[tuple[Service, str]]:
    yield from serving.serve(runtime_pool, str(thinking_folder("asks itself")))


@pytest.fixture(scope="module")
def client(thinker: tuple[Service, str]) -> Any:
    """Return a boto3 client, which validates requests by the service model."""
    return boto3.client(
        "bedrock-runtime", endpoint_url=thinker[1], region_name="us-east-1",
        aws_access_key_id="a", aws_secret_access_key="b",
        config=Config(retries={"total_max_attempts": 1}),
    )  # fmt: skip


def reasoning(text: str) -> dict[str, Any]:
    return {"reasoningContent": {"reasoningText": {"text": text}}}


@pytest.mark.slow
def test_reasoning_is_a_block_before_the_text(client: Any) -> None:
    answer = client.converse(**said("sky?", inferenceConfig=LONG))
    assert answer["output"]["message"]["content"] == [reasoning(THOUGHT), {"text": "blue"}]
    assert answer["stopReason"] == "end_turn"
    cut = client.converse(**said("sky?", inferenceConfig={"maxTokens": 20}))
    (block,) = cut["output"]["message"]["content"]
    assert THOUGHT.startswith(block["reasoningContent"]["reasoningText"]["text"])
    assert (cut["stopReason"], cut["usage"]["outputTokens"]) == ("max_tokens", 20)
    stops = {"maxTokens": 120, "stopSequences": ["\n", "u"]}
    stopped = client.converse(**said("sky?", inferenceConfig=stops))
    assert stopped["output"]["message"]["content"] == [reasoning(THOUGHT), {"text": "bl"}]
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = client.converse(**said("sky?", additionalModelRequestFields=quiet))
    assert [[*block] for block in answer["output"]["message"]["content"]] == [["text"]]


def test_converse_stream_has_same_blocks_as_converse(client: Any) -> None:
    events = streamed(client, **said("sky?", inferenceConfig=LONG))
    whole = client.converse(**said("sky?", inferenceConfig=LONG))
    deltas = [event["contentBlockDelta"] for event in events if "contentBlockDelta" in event]
    thoughts = [each["delta"]["reasoningContent"]["text"] for each in deltas
                if each["contentBlockIndex"] == 0]  # fmt: skip
    texts = [each["delta"]["text"] for each in deltas if each["contentBlockIndex"] == 1]
    assert ("".join(thoughts), "".join(texts)) == (THOUGHT, "blue")
    assert len(thoughts) > 5 and len(thoughts) + len(texts) == len(deltas)
    stops = [each["contentBlockStop"]["contentBlockIndex"] for each in events
             if "contentBlockStop" in each]  # fmt: skip
    assert stops == [0, 1]
    assert events[-1]["metadata"]["usage"] == whole["usage"]
    cut = streamed(client, **said("sky?", inferenceConfig={"maxTokens": 20}))
    assert [next(iter(event)) for event in cut][-3:] == [
        "contentBlockStop",
        "messageStop",
        "metadata",
    ]
    assert not any("text" in e.get("contentBlockDelta", {}).get("delta", {}) for e in cut)


def test_tool_call_follows_reasoning(client: Any) -> None:
    request = said(CALLS, inferenceConfig=LONG, toolConfig={"tools": [TOOL]})
    thought, call = client.converse(**request)["output"]["message"]["content"]
    assert thought == reasoning(THOUGHT)
    assert call["toolUse"]["input"] == {"colour": "red"}
    events = streamed(client, **request)
    (start,) = [event["contentBlockStart"] for event in events if "contentBlockStart" in event]
    assert (start["contentBlockIndex"], start["start"]["toolUse"]["name"]) == (1, "paint")
    stops = [each["contentBlockStop"]["contentBlockIndex"] for each in events
             if "contentBlockStop" in each]  # fmt: skip
    assert stops == [0, 1]


def test_text_after_reasoning_matches_json_schema(client: Any) -> None:
    schema = json.dumps({"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]})
    form = {"textFormat": {"type": "json_schema", "structure": {"jsonSchema": {"schema": schema}}}}
    request = said("sky?", inferenceConfig=LONG, outputConfig=form)
    thought, text = client.converse(**request)["output"]["message"]["content"]
    assert (thought, json.loads(text["text"])["n"]) == (reasoning(THOUGHT), 7)


def test_reasoning_blocks_round_trip(client: Any) -> None:
    came = client.converse(**said("sky?", inferenceConfig=LONG))["output"]["message"]
    asked, more = ({"role": "user", "content": [{"text": t}]} for t in ("sky?", "how many?"))

    def read(*content: Any) -> int:
        turns = [asked, {"role": "assistant", "content": [*content]}, more]
        answer = client.converse(**{**said(inferenceConfig={"maxTokens": 1}), "messages": turns})
        given = {"converse": {"messages": turns}}
        counted = client.count_tokens(modelId=said()["modelId"], input=given)["inputTokens"]
        assert counted == answer["usage"]["inputTokens"]
        return int(counted)

    plain = read({"text": "blue"})
    assert read(*came["content"]) > plain
    signed = {"reasoningText": {"text": THOUGHT, "signature": "elsewhere"}}
    assert read({"reasoningContent": signed}, {"text": "blue"}) == read(*came["content"])
    assert read(reasoning(THOUGHT)) == read(*came["content"]) - len("blue")
    with pytest.raises(ClientError, match="redactedContent"):
        read({"reasoningContent": {"redactedContent": b"x"}}, {"text": "blue"})
    turns = [{"role": "user", "content": [reasoning("x"), {"text": "sky?"}]}]
    with pytest.raises(ClientError, match="reasoningContent"):
        client.converse(**{**said(), "messages": turns})


def test_invoke_with_converse_body_returns_reasoning(client: Any) -> None:
    """InvokeModel accepts a Converse body."""
    body = {
        "schemaVersion": "messages-v1",
        "messages": [{"role": "user", "content": [{"text": "sky?"}]}],
        "inferenceConfig": {"maxTokens": 120, "temperature": 0},
    }
    made = client.invoke_model(modelId=said()["modelId"], body=json.dumps(body))
    answer = json.loads(made["body"].read())
    assert answer["output"]["message"]["content"] == [reasoning(THOUGHT), {"text": "blue"}]
    stream = client.invoke_model_with_response_stream(
        modelId=said()["modelId"], body=json.dumps(body)
    )
    chunks = [json.loads(event["chunk"]["bytes"]) for event in stream["body"]]
    deltas = [each["contentBlockDelta"]["delta"] for each in chunks if "contentBlockDelta" in each]
    thoughts = [each["reasoningContent"]["text"] for each in deltas if "reasoningContent" in each]
    assert "".join(thoughts) == THOUGHT
