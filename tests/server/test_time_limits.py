"""Busy models and slow answers: errors in unmodified clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
from botocore.exceptions import ClientError, EventStreamError
from luthier_server import BASE, KEYS, ONE, Served, home_with_tiny

PROMPT = "Tell me of the sea."
TURNS = [{"role": "user", "content": PROMPT}]
CONVERSE: dict[str, Any] = {
    "modelId": BASE,
    "messages": [{"role": "user", "content": [{"text": PROMPT}]}],
}
ENDLESS = {"temperature": 0}


@pytest.fixture
def server(tmp_path: Path, tiny_model_folder: Path) -> Iterator[Served]:
    """A server with a model that generates for minutes: greedy decoding never ends."""
    made = Served(home_with_tiny(tmp_path, tiny_model_folder))
    path = tmp_path / "models" / "base" / "tiny" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "max_position_embeddings": 200_000}))
    yield made
    assert made.process is not None
    made.kill()


@pytest.fixture
def client(server: Served) -> Callable[[], openai.OpenAI]:
    """A factory of OpenAI clients without retries."""

    def make() -> openai.OpenAI:
        key = str(KEYS[ONE]["api_key"])
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    return make


def start(server: Served, *limits: str) -> Any:
    """Start the server with ``limits`` and return a Bedrock runtime client without retries."""
    server.start(*(part for limit in limits for part in ("--limit", limit)))
    return server.client("bedrock-runtime", tries=1)


def refusal_of(call: Callable[..., Any], **members: Any) -> tuple[str, int, Any]:
    """Return code, status and headers of a request that fails before the first chunk."""
    with pytest.raises(ClientError) as refused:
        call(**members)
    assert not isinstance(refused.value, EventStreamError)
    answer: Any = refused.value.response
    about = answer["ResponseMetadata"]
    return answer["Error"]["Code"], about["HTTPStatusCode"], about["HTTPHeaders"]


def test_queue_timeout_returns_throttling(
    server: Served, client: Callable[[], openai.OpenAI]
) -> None:
    runtime = start(server, "answers=1", "queue_seconds=0.5")
    bodies = {"modelId": BASE, "body": json.dumps({"prompt": PROMPT})}
    with closing(runtime), client() as ask:
        chat = ask.chat.completions
        busy = chat.create(model="tiny", messages=TURNS, stream=True, **ENDLESS)  # type: ignore[call-overload]
        assert len(list(islice(busy, 3))) == 3
        calls = (
            (runtime.converse, CONVERSE),
            (runtime.converse_stream, CONVERSE),
            (runtime.invoke_model, bodies),
            (runtime.invoke_model_with_response_stream, bodies),
        )
        for call, members in calls:
            code, status, headers = refusal_of(call, **members)
            assert (code, status) == ("ThrottlingException", 429)
            assert int(headers["retry-after"]) > 0
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as refused:
                chat.create(model="tiny", messages=TURNS, stream=stream)  # type: ignore[call-overload]
            assert int(refused.value.response.headers["retry-after"]) > 0
        assert len(list(islice(busy, 3))) == 3
        busy.close()
        answer = runtime.converse(**CONVERSE, inferenceConfig={"maxTokens": 3, **ENDLESS})
        assert answer["usage"]["outputTokens"] == 3


def read(begin: Callable[[], Any], kind: type[Exception], words: str) -> None:
    """Read a stream that ends with this error after some chunks."""
    pieces = []

    def to_the_end() -> None:
        with closing(begin()) as stream:
            for piece in stream:
                pieces.append(piece)

    with pytest.raises(kind, match=words):
        to_the_end()
    assert len(pieces) > 3


@pytest.mark.slow
def test_answer_timeout_ends_with_error(
    server: Served, client: Callable[[], openai.OpenAI]
) -> None:
    runtime = start(server, "answer_seconds=1")
    endless: Any = {**CONVERSE, "inferenceConfig": ENDLESS}
    with closing(runtime), client() as ask:
        chat = ask.chat.completions
        code, status, _ = refusal_of(runtime.converse, **endless)
        assert (code, status) == ("ModelTimeoutException", 408)
        read(
            lambda: runtime.converse_stream(**endless)["stream"],
            EventStreamError,
            "modelStreamErrorException.*1 seconds",
        )
        body = json.dumps({"prompt": PROMPT, "max_gen_len": 190_000, "temperature": 0})
        read(
            lambda: runtime.invoke_model_with_response_stream(modelId=BASE, body=body)["body"],
            EventStreamError,
            "modelTimeoutException.*1 seconds",
        )
        with pytest.raises(openai.InternalServerError) as late:
            chat.create(model="tiny", messages=TURNS, **ENDLESS)  # type: ignore[call-overload]
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        read(
            lambda: chat.create(model="tiny", messages=TURNS, stream=True, **ENDLESS),  # type: ignore[call-overload]
            openai.APIError,
            "more than 1 seconds",
        )
        short = chat.create(model="tiny", messages=TURNS, max_tokens=3, **ENDLESS)  # type: ignore[call-overload]
        assert short.usage.completion_tokens == 3


@pytest.mark.slow
def test_stream_timeout_before_first_token_returns_status(
    server: Served, client: Callable[[], openai.OpenAI]
) -> None:
    runtime = start(server, "answer_seconds=0.00001")
    with closing(runtime), client() as ask:
        code, status, _ = refusal_of(runtime.converse_stream, **CONVERSE)
        assert (code, status) == ("ModelTimeoutException", 408)
        with pytest.raises(openai.APIStatusError) as late:
            ask.responses.create(model="tiny", input=PROMPT, stream=True)
        assert (late.value.status_code, late.value.code) == (504, "timeout")
