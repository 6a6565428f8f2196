"""boto3 against a real server: the five operations of the runtime."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import anyio
import boto3
import pytest
import torch
import uvicorn
from botocore.config import Config
from botocore.exceptions import ClientError, EventStreamError
from jsonschema import validate

from luthier.api.app import _send, head_of
from luthier.api.bedrock.runtime import runtime_handlers
from luthier.api.wire import Answer, Call, Caller, Fault
from luthier.engine import devices
from luthier.engine.devices import Machine
from luthier.serving.inference import InferenceFailed, Request
from luthier.serving.pool import ModelPool
from luthier.store.database import now

CALLER = Caller("000000000000", "root", ())
MODEL, READER = "test.tiny", "test.reader"
STATUS = {"AccessDenied": 403, "ResourceNotFound": 404, "Throttling": 429, "ModelError": 424}
OPERATIONS = {
    "converse": "Converse",
    "converse-stream": "ConverseStream",
    "invoke": "InvokeModel",
    "invoke-with-response-stream": "InvokeModelWithResponseStream",
    "count-tokens": "CountTokens",
}


class Service:
    """The smallest application around the handlers: one caller, faults as botocore reads them."""

    def __init__(self, pool: ModelPool, models: dict[str, str]) -> None:
        self.asked: list[tuple[str, str]] = []

        def resolve(account: str, model_id: str) -> str:
            assert account == CALLER.account
            if model_id not in models:
                raise Fault("ResourceNotFound", f"Could not find the model {model_id}.")
            return models[model_id]

        def authorize(caller: Caller, action: str, resource: str) -> None:
            self.asked.append((action, resource))
            if model_id_of(resource) == "test.forbidden":
                raise Fault("AccessDenied", "You may not.")

        self.handlers = runtime_handlers(pool, resolve, authorize, lambda name: f"arn:x/{name}")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        head, body = head_of(scope), b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        _, _, model, operation = head.path.split("/")
        call = Call(
            "id", CALLER, head.method, head.path, {}, dict(head.headers), body, now(),
            {"modelId": unquote(model)},
        )  # fmt: skip
        answer = await anyio.to_thread.run_sync(self.answer, OPERATIONS[operation], call)
        await _send(send, receive, answer, run)

    def answer(self, operation: str, call: Call) -> Answer:
        try:
            return self.handlers[operation](call)
        except Fault as fault:
            headers = {"x-amzn-ErrorType": f"{fault.code}Exception"}
            return Answer.of({"message": fault.message}, STATUS.get(fault.code, 400), **headers)


LIMITER = anyio.CapacityLimiter(128)


async def run(function: Callable[..., Any], *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *arguments, limiter=LIMITER)


def model_id_of(resource: str) -> str:
    return resource.removeprefix("arn:x/")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelPool]:
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(torch.device("cpu"), torch.float32, 1, "a test")
        patch.setattr(devices, "choose_machine", lambda *arguments: machine)
        made = ModelPool(1 << 30)
        yield made
        made.close()


@pytest.fixture(scope="module")
def service(
    pool: ModelPool, tiny_model_folder: Path, family_folder: Callable[[str], Path]
) -> Iterator[tuple[Service, str]]:
    models = {MODEL: str(tiny_model_folder), "arn:aws:a/b": str(tiny_model_folder)}
    made = Service(pool, models)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(made, "127.0.0.1", port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield made, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(service: tuple[Service, str]) -> Iterator[Any]:
    with closing(client_of(service[1])) as made:
        yield made


def client_of(url: str) -> Any:
    # What boto3 checks itself, other clients do not.
    config = Config(
        retries={"total_max_attempts": 1}, max_pool_connections=64, parameter_validation=False
    )
    return boto3.client(
        "bedrock-runtime", endpoint_url=url, region_name="us-east-1", config=config,
        aws_access_key_id="a", aws_secret_access_key="b",
    )  # fmt: skip


def said(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    config = {"maxTokens": 24, "temperature": 0, **fields.pop("inferenceConfig", {})}
    messages = [{"role": "user", "content": [{"text": text}]}]
    return {"modelId": MODEL, "messages": messages, "inferenceConfig": config, **fields}


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["output"]["message"]["content"][0]["text"])


def streamed(client: Any, **request: Any) -> list[dict[str, Any]]:
    with closing(client.converse_stream(**request)["stream"]) as stream:
        return list(stream)


def test_converse_and_its_stream_say_the_same(client: Any) -> None:
    answer = client.converse(**said())
    assert answer["output"]["message"]["role"] == "assistant"
    assert answer["stopReason"] == "max_tokens"
    assert answer["usage"]["outputTokens"] == 24
    usage = answer["usage"]
    assert usage["inputTokens"] + usage["outputTokens"] == usage["totalTokens"]
    assert answer["metrics"]["latencyMs"] > 0
    events = streamed(client, **said())
    kinds = [next(iter(event)) for event in events]
    assert kinds[0] == "messageStart" and events[0]["messageStart"]["role"] == "assistant"
    assert set(kinds[1:-3]) == {"contentBlockDelta"} and len(kinds) > 6
    assert kinds[-3:] == ["contentBlockStop", "messageStop", "metadata"]
    deltas = [event["contentBlockDelta"]["delta"]["text"] for event in events[1:-3]]
    assert "".join(deltas) == text_of(answer)
    assert events[-2]["messageStop"]["stopReason"] == "max_tokens"
    assert events[-1]["metadata"]["usage"] == usage
    assert events[-1]["metadata"]["metrics"]["latencyMs"] > 0


def test_stop_sequences_end_both_alike(client: Any) -> None:
    whole = text_of(client.converse(**said()))
    stop = whole[7:10]
    request = said(
        inferenceConfig={"stopSequences": [stop]},
        additionalModelResponseFieldPaths=["/stop_sequence", "/nothing"],
    )
    answer = client.converse(**request)
    assert (text_of(answer), answer["stopReason"]) == (whole[: whole.index(stop)], "stop_sequence")
    assert answer["additionalModelResponseFields"] == {"stop_sequence": stop}
    events = streamed(client, **request)
    assert events[-2]["messageStop"]["stopReason"] == "stop_sequence"
    assert events[-1]["metadata"]["usage"] == answer["usage"]


def test_seeds_and_further_fields(client: Any) -> None:
    def text(**further: Any) -> str:
        request = said(
            inferenceConfig={"temperature": 1.0, "topP": 1.0}, additionalModelRequestFields=further
        )
        return text_of(client.converse(**request))

    assert text(seed=7) == text(seed=7) != text(seed=8)
    assert text(top_k=1) == text_of(client.converse(**said()))
    assert text(seed=7, repetition_penalty=1.9) != text(seed=7)
    with pytest.raises(ClientError, match=r"extraneous key \[tok\] is not permitted"):
        text(tok=1)


SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "age": {"type": "integer", "maximum": 120}},
    "required": ["mood", "age"],
    "additionalProperties": False,
}


def formatted(schema: str) -> dict[str, Any]:
    structure = {"jsonSchema": {"schema": schema, "name": "x"}}
    return {"outputConfig": {"textFormat": {"type": "json_schema", "structure": structure}}}


def test_answers_match_a_schema(client: Any) -> None:
    config = {"maxTokens": 300, "temperature": 1.0}
    for _ in range(5):
        answer = client.converse(**said(inferenceConfig=config, **formatted(json.dumps(SCHEMA))))
        assert answer["stopReason"] == "end_turn"
        validate(json.loads(text_of(answer)), SCHEMA)
    for wrong in ("{", "[]", '{"type": "objekt"}'):
        with pytest.raises(ClientError) as refused:
            client.converse_stream(**said(**formatted(wrong)))
        assert refused.value.response["Error"]["Code"] == "ValidationException"


TOOL = {"toolSpec": {"name": "mood", "description": "Tells it.", "inputSchema": {"json": SCHEMA}}}


@pytest.mark.parametrize("choice", [{"any": {}}, {"tool": {"name": "mood"}}])
def test_tools(client: Any, choice: dict[str, Any]) -> None:
    config = {"tools": [TOOL], "toolChoice": choice}
    request = said(toolConfig=config, inferenceConfig={"maxTokens": 200})
    answer = client.converse(**request)
    assert answer["stopReason"] == "tool_use"
    (block,) = answer["output"]["message"]["content"]
    use = block["toolUse"]
    assert use["name"] == "mood"
    validate(use["input"], SCHEMA)
    events = streamed(client, **request)
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
    again = client.converse(**request)
    assert again["usage"]["inputTokens"] > answer["usage"]["inputTokens"]


def blocks(*content: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [{"text": "x"}]} for role in roles]}


PIXEL = {"image": {"format": "png", "source": {"bytes": b"x"}}}
RESULT = {"toolResult": {"toolUseId": "a", "content": [{"text": "x"}]}}
WRONG: list[tuple[dict[str, Any], str]] = [
    (turns("assistant"), "must start with a user message"),
    (turns("user", "user"), "must alternate between user and assistant roles"),
    (turns("user", "assistant"), "must end with a user message"),
    ({"messages": []}, "'messages' failed to satisfy constraint"),
    (blocks(), "content field in the Message object at messages.0 is empty"),
    (blocks({"text": " "}), "at messages.0.content.0 is blank"),
    (blocks(PIXEL), "doesn't support the image field"),
    (blocks(RESULT), "toolConfig field must be defined"),
    ({**blocks(RESULT), "toolConfig": {"tools": [TOOL]}}, "answers no toolUse"),
    ({"inferenceConfig": {"maxTokens": 0}}, "'inferenceConfig.maxTokens' failed"),
    ({"inferenceConfig": {"temperature": 1.01}}, "less than or equal to 1"),
    ({"inferenceConfig": {"topP": -0.1}}, "'inferenceConfig.topP' failed"),
    ({"inferenceConfig": {"stopSequences": [""]}}, "stopSequences.0"),
    ({"toolConfig": {"tools": [TOOL, TOOL]}}, "defined more than once"),
    ({"toolConfig": {"tools": [TOOL], "toolChoice": {"tool": {"name": "b"}}}}, "is not among"),
    ({"guardrailConfig": {"guardrailIdentifier": "a", "guardrailVersion": "1"}}, "not supported"),
    ({"requestMetadata": {str(i): "x" for i in range(17)}}, "requestMetadata"),
    (blocks({"text": "fox " * 2000}), "Input is too long for requested model."),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_is_wrong_from_the_start_is_an_ordinary_error(
    client: Any, fields: dict[str, Any], message: str
) -> None:
    request = said()
    for name, value in fields.items():
        request[name] = value
    for operation in (client.converse, client.converse_stream):
        with pytest.raises(ClientError) as refused:
            operation(**request)
        assert refused.value.response["Error"]["Code"] == "ValidationException"
        assert message in refused.value.response["Error"]["Message"]


def test_who_may_not_is_told_before_anything_is_looked_up(
    client: Any, service: tuple[Service, str]
) -> None:
    with pytest.raises(ClientError) as refused:
        client.converse(**{**said(), "modelId": "test.forbidden"})
    assert refused.value.response["Error"]["Code"] == "AccessDeniedException"
    with pytest.raises(ClientError) as unknown:
        client.converse(**{**said(), "modelId": "test.unknown"})
    assert unknown.value.response["Error"]["Code"] == "ResourceNotFoundException"
    client.converse(**{**said(), "modelId": "arn:aws:a/b"})
    streamed(client, **said())
    client.invoke_model(modelId=MODEL, body=json.dumps({"prompt": "x", "max_gen_len": 1}))
    assert service[0].asked[-3:] == [
        ("bedrock:InvokeModel", "arn:x/arn:aws:a/b"),
        ("bedrock:InvokeModelWithResponseStream", f"arn:x/{MODEL}"),
        ("bedrock:InvokeModel", f"arn:x/{MODEL}"),
    ]


def invoked(client: Any, **body: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Without a content type, as boto3 sends it when none is given."""
    answer = client.invoke_model(modelId=MODEL, body=json.dumps(body))
    assert answer["contentType"] == "application/json"
    return json.loads(answer["body"].read()), answer["ResponseMetadata"]["HTTPHeaders"]


def test_a_raw_prompt(client: Any) -> None:
    body = {"prompt": "The quick", "max_gen_len": 12, "temperature": 0}
    found, headers = invoked(client, **body)
    assert set(found) == {
        "generation", "prompt_token_count", "generation_token_count", "stop_reason"
    }  # fmt: skip
    assert (found["generation_token_count"], found["stop_reason"]) == (12, "length")
    assert headers["x-amzn-bedrock-input-token-count"] == str(found["prompt_token_count"])
    assert headers["x-amzn-bedrock-output-token-count"] == "12"
    assert int(headers["x-amzn-bedrock-invocation-latency"]) >= 0
    stream = client.invoke_model_with_response_stream(modelId=MODEL, body=json.dumps(body))
    assert stream["contentType"] == "application/json"
    chunks = [json.loads(event["chunk"]["bytes"]) for event in stream["body"]]
    assert "".join(chunk["generation"] for chunk in chunks) == found["generation"]
    assert len(chunks) > 3
    assert [chunk["stop_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    metrics = chunks[-1]["amazon-bedrock-invocationMetrics"]
    assert metrics["inputTokenCount"] == found["prompt_token_count"]
    assert metrics["outputTokenCount"] == 12
    assert 0 <= metrics["firstByteLatency"] <= metrics["invocationLatency"]


def test_messages_of_amazon_s_form(client: Any) -> None:
    expected = client.converse(**said(system=[{"text": "Be kind."}]))
    body = {
        "schemaVersion": "messages-v1",
        "system": [{"text": "Be kind."}],
        "messages": said()["messages"],
        "inferenceConfig": {"maxTokens": 24, "temperature": 0},
    }
    found, _ = invoked(client, **body)
    assert found["output"] == expected["output"]
    assert found["usage"] == expected["usage"]
    assert found["stopReason"] == "max_tokens"
    stream = client.invoke_model_with_response_stream(modelId=MODEL, body=json.dumps(body))
    chunks = [json.loads(event["chunk"]["bytes"]) for event in stream["body"]]
    deltas = [c["contentBlockDelta"]["delta"]["text"] for c in chunks if "contentBlockDelta" in c]
    assert "".join(deltas) == text_of(expected)
    metrics = chunks[-1]["amazon-bedrock-invocationMetrics"]
    assert metrics["outputTokenCount"] == 24


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": 3},
        {"prompt": ""},
        {"prompt": "x", "max_gen_len": 0},
        {"prompt": "x", "max_gen_len": "5"},
        {"prompt": "x", "max_gen_len": True},
        {"prompt": "x", "top_p": 1.5},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "unknown": 1},
        {"inputText": "x"},
        {"schemaVersion": "messages-v2", "messages": []},
    ],
)
def test_bodies_that_are_wrong(client: Any, body: dict[str, Any]) -> None:
    for operation in (client.invoke_model, client.invoke_model_with_response_stream):
        with pytest.raises(ClientError) as refused:
            operation(modelId=MODEL, body=json.dumps(body))
        assert refused.value.response["Error"]["Code"] == "ValidationException"


def test_bodies_that_are_no_json(client: Any) -> None:
    for body in (b"{", b"[]", b'{"prompt": NaN}', b"\xff"):
        with pytest.raises(ClientError) as refused:
            client.invoke_model(modelId=MODEL, body=body)
        assert refused.value.response["Error"]["Code"] == "SerializationException"


def test_tokens_are_counted_as_they_are_read(client: Any) -> None:
    request = said(system=[{"text": "Be kind."}], toolConfig={"tools": [TOOL]})
    used = client.converse(**request)["usage"]["inputTokens"]
    asked = {name: request[name] for name in ("messages", "system", "toolConfig")}
    assert client.count_tokens(modelId=MODEL, input={"converse": asked})["inputTokens"] == used
    body = {"prompt": "The quick", "max_gen_len": 1}
    found, _ = invoked(client, **body)
    counted = client.count_tokens(
        modelId=MODEL, input={"invokeModel": {"body": json.dumps(body).encode()}}
    )
    assert counted["inputTokens"] == found["prompt_token_count"]
    with pytest.raises(ClientError, match="no JSON object"):
        client.count_tokens(modelId=MODEL, input={"invokeModel": {"body": b"["}})


def test_64_streams_at_once(client: Any) -> None:
    def text(number: int) -> str:
        events = streamed(client, **said(f"Hi {number}", inferenceConfig={"maxTokens": 30}))
        deltas = [
            e["contentBlockDelta"]["delta"]["text"] for e in events if "contentBlockDelta" in e
        ]
        return "".join(deltas)

    with ThreadPoolExecutor(64) as threads:
        together = list(threads.map(text, range(64)))
    for number in range(0, 64, 9):
        assert together[number] == text_of(
            client.converse(**said(f"Hi {number}", inferenceConfig={"maxTokens": 30}))
        )


def test_who_hangs_up_frees_the_place(
    service: tuple[Service, str], client: Any, pool: ModelPool, tiny_model_folder: Path
) -> None:
    decoder = pool._entries[str(tiny_model_folder)].model
    body = json.dumps(
        {"messages": said()["messages"], "inferenceConfig": {"maxTokens": 900, "temperature": 1}}
    ).encode()
    request = urllib.request.Request(f"{service[1]}/model/{MODEL}/converse-stream", body)
    answers = [urllib.request.urlopen(request) for _ in range(8)]
    for answer in answers:
        answer.read(10)
        answer.close()
    until = time.monotonic() + 1.5
    while not decoder.idle and time.monotonic() < until:
        time.sleep(0.02)
    assert decoder.idle


def test_a_failure_in_mid_stream_is_an_event(
    client: Any, pool: ModelPool, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper = pool._entries[str(tiny_model_folder)].model._stepper
    step, count = stepper.step, 0

    def fail(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise InferenceFailed("ModelError", "no")
        return step(*arguments)

    monkeypatch.setattr(stepper, "step", fail)
    with pytest.raises(EventStreamError, match="modelStreamErrorException"):
        streamed(client, **said())
    count = 0
    with pytest.raises(ClientError) as failed:
        client.converse(**said())
    assert failed.value.response["Error"]["Code"] == "ModelErrorException"


def test_streams_closed_unread_end_too(service: tuple[Service, str]) -> None:
    body = json.dumps(said()).encode()
    call = Call("id", CALLER, "POST", "/", {}, {}, body, now(), {"modelId": MODEL})
    events: Any = service[0].handlers["ConverseStream"](call).body
    events.close()
    assert list(events) == []


class Upper:
    """A form of bodies that another face knows."""

    def __init__(self, body: Any) -> None:
        if body["messages"] != "hello":
            raise Fault("Validation", "no")

    def request(self) -> Request:
        return Request("The quick", max_tokens=4, temperature=0)

    def answer(self, stream: Any) -> tuple[dict[str, Any], int]:
        (whole,) = stream.whole()
        return {"said": whole.text}, whole.tokens

    def chunks(self, stream: Any) -> Iterator[tuple[dict[str, Any], int]]:
        for event in stream:
            yield {"kind": type(event).__name__}, getattr(event, "tokens", 0)


def test_bodies_of_another_face_s_form(pool: ModelPool, tiny_model_folder: Path) -> None:
    handlers = runtime_handlers(
        pool, lambda account, name: str(tiny_model_folder), lambda *given: None, chat=Upper
    )

    def call(body: Any) -> Call:
        raw = json.dumps(body).encode()
        return Call("id", CALLER, "POST", "/", {}, {}, raw, now(), {"modelId": MODEL})

    answer = handlers["InvokeModel"](call({"messages": "hello"}))
    assert set(json.loads(answer.body)) == {"said"}  # type: ignore[arg-type]
    assert answer.headers["X-Amzn-Bedrock-Output-Token-Count"] == "4"
    stream: Any = handlers["InvokeModelWithResponseStream"](call({"messages": "hello"})).body
    assert b"".join(stream).count(b"chunk") > 1
    with pytest.raises(Fault, match="no"):
        handlers["InvokeModelWithResponseStream"](call({"messages": "bye"}))
