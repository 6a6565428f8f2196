"""The runtime of the Bedrock API behind a real server, with a tiny model, and boto3 in front."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import torch
from botocore.config import Config
from served import served
from trails import Remembered

from luthier.engine import machine as machines
from luthier.engine.machine import Machine
from luthier.inference.pool import ModelPool
from luthier.server.bedrock.routes import bedrock_api
from luthier.server.bedrock.runtime import runtime_handlers
from luthier.server.http.application import Application
from luthier.server.http.messages import Caller, Fault, Signed
from luthier.server.http.metrics import Metrics

CALLER = Caller("000000000000", "root", ("administrator",))
MODEL = "test.tiny"
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "age": {"type": "integer", "maximum": 120}},
    "required": ["mood", "age"],
    "additionalProperties": False,
}
TOOL = {"toolSpec": {"name": "mood", "description": "Tells it.", "inputSchema": {"json": SCHEMA}}}


class Service:
    """The runtime API's application for one caller."""

    def __init__(self, pool: ModelPool, models: dict[str, str]) -> None:
        def resolve(account: str, model_id: str) -> str:
            assert account == CALLER.account
            if model_id not in models:
                raise Fault("ResourceNotFound", f"Could not find the model {model_id}.")
            return models[model_id]

        self.handlers = runtime_handlers(pool, resolve, lambda account, name: f"arn:x/{name}")
        nothing: Any = None
        signed = Signed(CALLER)
        anybody: Any = SimpleNamespace(
            authenticate=lambda head, body: signed, recognize=lambda head: signed
        )
        trail: Any = Remembered()
        self.application = Application(
            [bedrock_api(nothing, self.handlers)], anybody, lambda caller: None, Metrics(dict), trail,
            lambda: None,
        )  # fmt: skip


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
    """Yield a service of the model in ``folder`` with its address."""
    made = Service(pool, {MODEL: folder, "arn:aws:a/b": folder})
    with served(made.application) as url:
        yield made, url


@pytest.fixture(scope="module")
def runtime_client(runtime_service: tuple[Service, str]) -> Iterator[Any]:
    with closing(client_of(runtime_service[1])) as made:
        yield made


def client_of(url: str) -> Any:
    # boto3 validates requests; other clients do not.
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
