"""The runtime of the Bedrock face behind a real server, with a tiny model, and boto3 in front."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
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

from luthier.engine import machine as machines
from luthier.engine.machine import Machine
from luthier.inference.pool import ModelPool
from luthier.server.bedrock.runtime import runtime_handlers
from luthier.server.http.messages import Caller, Fault, Request, Response, head_of
from luthier.server.http.streams import send_response
from luthier.server.tables.database import now

CALLER = Caller("000000000000", "root", ("administrator",))
MODEL = "test.tiny"
STATUS = {"AccessDenied": 403, "ResourceNotFound": 404, "Throttling": 429, "ModelError": 424}
OPERATIONS = {
    "converse": "Converse",
    "converse-stream": "ConverseStream",
    "invoke": "InvokeModel",
    "invoke-with-response-stream": "InvokeModelWithResponseStream",
    "count-tokens": "CountTokens",
}

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "age": {"type": "integer", "maximum": 120}},
    "required": ["mood", "age"],
    "additionalProperties": False,
}
TOOL = {"toolSpec": {"name": "mood", "description": "Tells it.", "inputSchema": {"json": SCHEMA}}}


class Service:
    """The smallest application around the handlers: one caller, faults as botocore reads them."""

    def __init__(self, pool: ModelPool, models: dict[str, str]) -> None:
        def resolve(account: str, model_id: str) -> str:
            assert account == CALLER.account
            if model_id not in models:
                raise Fault("ResourceNotFound", f"Could not find the model {model_id}.")
            return models[model_id]

        self.handlers = runtime_handlers(pool, resolve, lambda account, name: f"arn:x/{name}")

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
        call = Request(
            "id", CALLER, head.method, head.path, {}, dict(head.headers), body, now(),
            {"modelId": unquote(model)},
        )  # fmt: skip
        answer = await anyio.to_thread.run_sync(self.answer, OPERATIONS[operation], call)
        await send_response(send, receive, answer, run)

    def answer(self, operation: str, request: Request) -> Response:
        try:
            return self.handlers[operation](request)
        except Fault as fault:
            headers = {"x-amzn-ErrorType": f"{fault.code}Exception"}
            return Response.json({"message": fault.message}, STATUS.get(fault.code, 400), **headers)


LIMITER = anyio.CapacityLimiter(128)


async def run(function: Callable[..., Any], *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *arguments, limiter=LIMITER)


@pytest.fixture(scope="module")
def runtime_pool() -> Iterator[ModelPool]:
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(torch.device("cpu"), torch.float32, 1, "a test")
        patch.setattr(machines, "choose_machine", lambda *arguments: machine)
        made = ModelPool(1 << 30)
        yield made
        made.close()


@pytest.fixture(scope="module")
def runtime_service(
    runtime_pool: ModelPool, tiny_model_folder: Path
) -> Iterator[tuple[Service, str]]:
    yield from serve(runtime_pool, str(tiny_model_folder))


def serve(pool: ModelPool, folder: str) -> Iterator[tuple[Service, str]]:
    """A service of the model in ``folder`` behind a server, and its address."""
    made = Service(pool, {MODEL: folder, "arn:aws:a/b": folder})
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(made, "127.0.0.1", port, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield made, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def runtime_client(runtime_service: tuple[Service, str]) -> Iterator[Any]:
    with closing(client_of(runtime_service[1])) as made:
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
