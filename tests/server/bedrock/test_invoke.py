"""boto3 against a real server: bodies in the model's own form, and CountTokens."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runtime_service as serving
from botocore.exceptions import ClientError
from runtime_service import CALLER, MODEL, TOOL, said, text_of

from luthier.inference.pool import ModelPool
from luthier.inference.sequential import Embedding
from luthier.server.bedrock.bodies import parse_native
from luthier.server.bedrock.invoke import EmbeddingBody, PromptBody, parse_form
from luthier.server.bedrock.runtime import _Runtime, runtime_handlers
from luthier.server.http.messages import Fault, Request
from luthier.server.openai.chat import InvokedChat
from luthier.server.tables.database import now

# Fixtures for these modules only: their imports take time.
runtime_client = serving.runtime_client
runtime_pool = serving.runtime_pool
runtime_service = serving.runtime_service


def invoked(runtime_client: Any, **body: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Invoke without a content type, as boto3 does by default."""
    answer = runtime_client.invoke_model(modelId=MODEL, body=json.dumps(body))
    assert answer["contentType"] == "application/json"
    return json.loads(answer["body"].read()), answer["ResponseMetadata"]["HTTPHeaders"]


@pytest.mark.slow
def test_invoke_with_raw_prompt(runtime_client: Any) -> None:
    body = {"prompt": "The quick", "max_gen_len": 12, "temperature": 0}
    found, headers = invoked(runtime_client, **body)
    assert set(found) == {
        "generation", "prompt_token_count", "generation_token_count", "stop_reason"
    }  # fmt: skip
    assert (found["generation_token_count"], found["stop_reason"]) == (12, "length")
    assert headers["x-amzn-bedrock-input-token-count"] == str(found["prompt_token_count"])
    assert headers["x-amzn-bedrock-output-token-count"] == "12"
    assert int(headers["x-amzn-bedrock-invocation-latency"]) >= 0
    stream = runtime_client.invoke_model_with_response_stream(modelId=MODEL, body=json.dumps(body))
    assert stream["contentType"] == "application/json"
    chunks = [json.loads(event["chunk"]["bytes"]) for event in stream["body"]]
    assert "".join(chunk["generation"] for chunk in chunks) == found["generation"]
    assert len(chunks) > 3
    assert [chunk["stop_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    metrics = chunks[-1]["amazon-bedrock-invocationMetrics"]
    assert metrics["inputTokenCount"] == found["prompt_token_count"]
    assert metrics["outputTokenCount"] == 12
    assert 0 <= metrics["firstByteLatency"] <= metrics["invocationLatency"]


def test_messages_of_amazon_s_form(runtime_client: Any) -> None:
    expected = runtime_client.converse(**said(system=[{"text": "Be kind."}]))
    body = {
        "schemaVersion": "messages-v1",
        "system": [{"text": "Be kind."}],
        "messages": said()["messages"],
        "inferenceConfig": {"maxTokens": 24, "temperature": 0},
    }
    found, _ = invoked(runtime_client, **body)
    assert found["output"] == expected["output"]
    assert found["usage"] == expected["usage"]
    assert found["stopReason"] == "max_tokens"
    stream = runtime_client.invoke_model_with_response_stream(modelId=MODEL, body=json.dumps(body))
    chunks = [json.loads(event["chunk"]["bytes"]) for event in stream["body"]]
    deltas = [c["contentBlockDelta"]["delta"]["text"] for c in chunks if "contentBlockDelta" in c]
    assert "".join(deltas) == text_of(expected)
    metrics = chunks[-1]["amazon-bedrock-invocationMetrics"]
    assert metrics["outputTokenCount"] == 24


def test_invoke_rejects_invalid_json_body(runtime_client: Any) -> None:
    for body in (b"{", b"[]", b'{"prompt": NaN}', b"\xff"):
        for operation in (
            runtime_client.invoke_model,
            runtime_client.invoke_model_with_response_stream,
        ):
            with pytest.raises(ClientError) as refused:
                operation(modelId=MODEL, body=body)
            assert refused.value.response["Error"]["Code"] == "ValidationException"


def test_count_tokens_matches_usage(runtime_client: Any) -> None:
    request = said(system=[{"text": "Be kind."}], toolConfig={"tools": [TOOL]})
    used = runtime_client.converse(**request)["usage"]["inputTokens"]
    asked = {name: request[name] for name in ("messages", "system", "toolConfig")}
    assert (
        runtime_client.count_tokens(modelId=MODEL, input={"converse": asked})["inputTokens"] == used
    )
    body = {"prompt": "The quick", "max_gen_len": 1}
    found, _ = invoked(runtime_client, **body)
    counted = runtime_client.count_tokens(
        modelId=MODEL, input={"invokeModel": {"body": json.dumps(body).encode()}}
    )
    assert counted["inputTokens"] == found["prompt_token_count"]
    with pytest.raises(ClientError, match="ValidationException"):
        runtime_client.count_tokens(modelId=MODEL, input={"invokeModel": {"body": b"["}})


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, "#/prompt "),
        ({"prompt": 1}, "#/prompt "),
        ({"prompt": "a", "stop": "b"}, "#/stop "),
        ({"prompt": "a", "stop": ["b", ""]}, "#/stop/1 "),
        ({"prompt": "a", "top_k": 1.5}, "#/top_k "),
        ({"prompt": "a", "seed": 2**63}, "#/seed "),
    ],
)
def test_malformed_body_error_names_member(body: dict[str, Any], place: str) -> None:
    with pytest.raises(Fault) as caught:
        parse_native(PromptBody, body)
    assert caught.value.code == "Validation" and place in caught.value.message


def test_chat_completion_returns_invoked_model_name(
    runtime_pool: ModelPool, tiny_model_folder: Path
) -> None:
    handlers = runtime_handlers(
        runtime_pool,
        lambda account, name: str(tiny_model_folder),
        chat=InvokedChat,
    )
    body = {"model": "another", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    raw = json.dumps(body).encode()
    asked = Request("id", CALLER, "POST", "/", {}, {}, raw, now(), {"modelId": MODEL})
    answer = json.loads(handlers["InvokeModel"](asked).body)  # type: ignore[arg-type]
    assert answer["model"] == MODEL
    stream: Any = handlers["InvokeModelWithResponseStream"](asked).body
    messages = re.findall(rb'"bytes": ?"([A-Za-z0-9+/=]+)"', b"".join(stream))
    assert len(messages) > 1
    assert {json.loads(base64.b64decode(each))["model"] for each in messages} == {MODEL}
    # Anthropic bodies have messages, too, but Anthropic clients expect a different response.
    raw = json.dumps({**body, "anthropic_version": "bedrock-2023-05-31"}).encode()
    with pytest.raises(Fault, match="anthropic_version"):
        handlers["InvokeModel"](replace(asked, body=raw))


def test_image_embedding_request_is_rejected() -> None:
    with pytest.raises(Fault, match="inputImage"):
        parse_form(MODEL, {"inputImage": "aGk="}, None)


def test_shortened_embedding_follows_normalize() -> None:
    pool: Any = SimpleNamespace(embed=lambda stored_id, texts: [Embedding((0.6, 0.0, 0.8), 2)])
    runtime = _Runtime(pool, lambda *_: "", lambda *_: "", None)

    def vector(**members: Any) -> list[float]:
        form = parse_form(MODEL, {"inputText": "fox", **members}, None)
        assert isinstance(form, EmbeddingBody)
        found: list[float] = runtime._embed("", form)[0]["embedding"]
        return [round(each, 6) for each in found]

    assert vector() == vector(dimensions=3) == [0.6, 0.0, 0.8]
    assert vector(dimensions=1, normalize=False) == [0.6]
    assert vector(dimensions=1) == vector(dimensions=1, normalize=True) == [1.0]
    with pytest.raises(Fault):
        vector(dimensions=4)
