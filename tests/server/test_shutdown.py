"""Shutdown of a server: every open stream ends with an error."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from botocore.exceptions import EventStreamError
from luthier_server import BASE, KEYS, ONE, Served, home_with_tiny

PROMPT = "Tell me of the sea."


@pytest.fixture
def server(tmp_path: Path, tiny_model_folder: Path) -> Served:
    """A server with a model that generates for minutes: greedy decoding never ends."""
    made = Served(home_with_tiny(tmp_path, tiny_model_folder))
    path = tmp_path / "models" / "base" / "tiny" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "max_position_embeddings": 200_000}))
    return made


class Reader(threading.Thread):
    """A thread that reads a stream to the end. The first chunk sets ``begun``."""

    def __init__(self, pieces: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.begun = threading.Event()
        self.error: Any = None
        self._pieces = pieces
        self.last: Any = None
        self.start()

    def run(self) -> None:
        try:
            for piece in self._pieces():
                self.last = piece
                self.begun.set()
        except Exception as error:
            self.error = error
        self.begun.set()


def converse(server: Served) -> Any:
    messages = [{"role": "user", "content": [{"text": PROMPT}]}]
    with closing(server.client("bedrock-runtime", tries=1)) as runtime:
        answer = runtime.converse_stream(
            modelId=BASE, messages=messages, inferenceConfig={"temperature": 0}
        )
        with closing(answer["stream"]) as stream:
            yield from stream


def invoke(server: Served) -> Any:
    body = json.dumps({"prompt": PROMPT, "max_gen_len": 190_000, "temperature": 0})
    with closing(server.client("bedrock-runtime", tries=1)) as runtime:
        answer = runtime.invoke_model_with_response_stream(modelId=BASE, body=body)
        with closing(answer["body"]) as stream:
            yield from stream


def chat(server: Served) -> Any:
    key = KEYS[ONE]["api_key"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=str(key), max_retries=0) as client:
        yield from client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": PROMPT}],
            stream=True,
            temperature=0,
        )


def responses(server: Served) -> Any:
    key = KEYS[ONE]["api_key"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=str(key), max_retries=0) as client:
        yield from client.responses.create(model="tiny", input=PROMPT, stream=True, temperature=0)


def raw(server: Served) -> Any:
    """Return events as bytes. Raise ``IncompleteRead`` for a response without a last chunk."""
    asked = {"model": "tiny", "prompt": [PROMPT, "And"], "max_tokens": 190_000, "stream": True}
    asked["temperature"] = 0
    headers = {"Authorization": f"Bearer {KEYS[ONE]['api_key']}"}
    lines = []
    with closing(http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(asked), headers)
        with connection.getresponse() as answer:
            while piece := answer.readline():
                lines.append(piece)
                yield piece
    error = json.loads(lines[-2].removeprefix(b"data: "))["error"]
    assert error["code"] == "service_unavailable"


@pytest.mark.parametrize(
    ("limit", "signals"),
    [
        pytest.param("shutdown_seconds=0.3", 1, id="after its time"),
        pytest.param("shutdown_seconds=600", 2, id="by a second signal", marks=pytest.mark.slow),
    ],
)
def test_streams_end_with_error_on_shutdown(server: Served, limit: str, signals: int) -> None:
    server.start("--limit", limit)
    assert server.process is not None
    try:
        kinds = (converse, invoke, chat, responses, raw)
        read = {each: Reader(lambda each=each: each(server)) for each in kinds}
        assert all(reader.begun.wait(60) for reader in read.values())
        assert not [reader.error for reader in read.values() if reader.error]
        for _ in range(signals):
            # uvicorn stops immediately at the second SIGINT.
            server.process.send_signal(signal.SIGTERM if signals == 1 else signal.SIGINT)
            # Two simultaneous signals would merge into one.
            read[converse].join(1)
        for reader in read.values():
            reader.join(20)
            assert not reader.is_alive()
        assert server.process.wait(20) == 0
    finally:
        server.process.kill()
    for kind in (converse, invoke):
        error = read[kind].error
        assert isinstance(error, EventStreamError), error
        assert "serviceUnavailableException" in str(error)
    assert isinstance(read[chat].error, openai.APIError), read[chat].error
    assert read[chat].error.code == "service_unavailable"
    last = read[responses].last
    assert read[responses].error is None and last.type == "response.failed"
    assert last.response.error.code == "service_unavailable"
    assert read[raw].error is None
    log = (server.home / "server.log").read_text()
    assert "Traceback" not in log, log
