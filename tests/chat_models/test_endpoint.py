"""A teacher over the network: retries, rejected prompts, and errors that end the run."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import pytest
from openai_endpoint import Endpoint

from luthier.chat_models.base import Failure, Reply, SamplingSpec
from luthier.chat_models.endpoint import EndpointModel
from luthier.data.inputs import Media
from luthier.errors import LuthierError, RecipeError
from luthier.limits import MIB
from luthier.types import Message, ToolCall
from luthier.workflows.distil.recipe import TeacherSpec


def ask(
    url: str,
    *prompts: str,
    sampling: SamplingSpec | None = None,
    notes: list[str] | None = None,
    **fields: Any,
) -> dict[str, Reply | Failure]:
    outcomes: dict[str, Reply | Failure] = {}

    def done(index: int, outcome: Reply | Failure) -> None:
        assert prompts[index] not in outcomes
        outcomes[prompts[index]] = outcome

    spec = TeacherSpec(url=url, **{"model": "big", "retries": 2, **fields})
    questions = [[Message("system", "Be brief."), Message("user", prompt)] for prompt in prompts]
    note = (notes if notes is not None else []).append
    EndpointModel(spec).ask(questions, sampling or SamplingSpec(), done, note)
    return outcomes


def failed(outcome: Reply | Failure) -> bool:
    return isinstance(outcome, Failure) and outcome.rule == "teacher.failed"


def test_prompts_are_sent_once_with_key_and_settings(endpoint: Any, key: str) -> None:
    prompts = [f"question {n}" for n in range(8)]
    endpoint.delay = 0.1
    outcomes = ask(
        endpoint.url,
        *prompts,
        sampling=SamplingSpec(max_tokens=9, temperature=0.5, top_p=0.9, seed=3),
    )
    assert outcomes == {p: Reply(f"the answer to {p}", "stop", 7) for p in prompts}
    assert set(endpoint.asked.values()) == {1}
    assert endpoint.keys == {f"Bearer {key}"}
    assert 1 < endpoint.most_at_once <= 4
    body = next(b for b in endpoint.bodies if b["messages"][-1]["content"] == "question 0")
    assert body == {
        "model": "big", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3,
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "question 0"},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    "turn",
    [
        Message("user", "\ufffcWhat is it?", images=(Media("image", "a.png", "/a.png"),)),
        Message("assistant", calls=(ToolCall("1", "clock", {}),)),
        Message("tool", "noon", call_id="1"),
    ],
)
def test_turns_with_more_than_text_are_refused_before_the_first_request(
    endpoint: Any, turn: Message
) -> None:
    model = EndpointModel(TeacherSpec(url=endpoint.url, model="big"))
    questions = [[Message("user", "a")], [turn]]
    with pytest.raises(RecipeError):
        model.ask(questions, SamplingSpec(), lambda index, outcome: None, print)
    assert not endpoint.bodies


def test_settings_rejected_by_endpoints_are_omitted(endpoint: Any) -> None:
    ask(endpoint.url, "a")
    ask(endpoint.url, "a", limit="max_completion_tokens")
    first, second = ({k for k in body if k != "messages"} for body in endpoint.bodies)
    assert first == {"model", "max_tokens", "temperature"}
    assert second == {"model", "max_completion_tokens"}


@pytest.mark.parametrize(
    ("actions", "requests"),
    [
        (["drop"], 2),
        (["half"], 2),
        (["nothing", "half"], 3),
        ([(429, {"retry-after": "1"})], 2),
        ([(503, {}), (500, {})], 3),
    ],
    ids=["connection-breaks", "half-a-json", "no-choices", "rate-limit", "server-errors"],
)
def test_transient_failures_are_retried(endpoint: Any, actions: list[Any], requests: int) -> None:
    endpoint.actions["a"] = actions
    assert ask(endpoint.url, "a") == {"a": Reply("the answer to a", "stop", 7)}
    assert endpoint.asked["a"] == requests


def test_long_retry_after_is_respected(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("luthier.chat_models.endpoint.asyncio.sleep", sleep)
    endpoint.actions["a"] = [(429, {"retry-after": "300"})]
    notes: list[str] = []
    assert ask(endpoint.url, "a", notes=notes)["a"] == Reply("the answer to a", "stop", 7)
    assert 300.0 in slept


def test_long_rate_limit_aborts_run(endpoint: Any, key: str) -> None:
    endpoint.actions["a"] = [(429, {"retry-after": "7200"})]
    with pytest.raises(LuthierError) as caught:
        ask(endpoint.url, "a")
    assert endpoint.asked["a"] == 1
    assert caught.value.rule == "endpoint.rate_limit" and key not in str(caught.value)


@pytest.mark.parametrize("finish", ["length", "content_filter", None])
def test_reply_includes_finish_reason(endpoint: Any, finish: str | None) -> None:
    endpoint.actions["a"] = [finish]
    found = ask(endpoint.url, "a")["a"]
    assert isinstance(found, Reply)
    assert found.finish == (finish or "unknown")


def test_repeatedly_failing_prompt_fails_alone(endpoint: Any) -> None:
    endpoint.actions["a"] = ["drop"] * 99
    endpoint.actions["b"] = [(400, {})] * 99
    notes: list[str] = []
    found = ask(endpoint.url, "a", "b", "c", retries=1, notes=notes)
    assert found["c"] == Reply("the answer to c", "stop", 7)
    assert isinstance(found["a"], Failure) and found["a"].rule == "teacher.failed"
    assert found["b"] == Failure("teacher.refused", "HTTP 400: no …")
    assert endpoint.asked == {"a": 4, "b": 1, "c": 1}  # two attempts, and two more at the end


def test_transient_outage_loses_no_prompt(endpoint: Any) -> None:
    for prompt in "ab":
        endpoint.actions[prompt] = [(500, {})]
    found = ask(endpoint.url, "a", "b", "c", retries=0)
    assert {type(outcome) for outcome in found.values()} == {Reply}


def test_silent_endpoint_fails_after_timeout(endpoint: Any) -> None:
    endpoint.actions["a"] = [1.0, 1.0]
    found = ask(endpoint.url, "a", "b", retries=0, timeout=0.3)
    assert failed(found["a"])


def test_consecutive_failures_abort_run_and_preserve_replies(endpoint: Any) -> None:
    bad = [f"bad {n}" for n in range(20)]
    for prompt in bad:
        endpoint.actions[prompt] = [(500, {})] * 9
    heard: list[int] = []
    answered = threading.Event()

    def hear(index: int, _: Any) -> None:
        heard.append(index)
        answered.set()

    # Failures before the reply must not count as consecutive with later failures.
    endpoint.answer = lambda prompt: "fine" if prompt == "good" or answered.wait(30) else "late"
    spec = TeacherSpec(url=endpoint.url, model="big", retries=0, concurrency=2)
    questions = [[Message("user", prompt)] for prompt in ["good", *bad]]
    with pytest.raises(LuthierError) as caught:
        EndpointModel(spec).ask(questions, SamplingSpec(), hear, lambda _: None)
    assert caught.value.rule == "endpoint.failures"
    assert heard == [0]
    assert endpoint.asked.total() <= 8


def test_rejected_key_error_hides_key(endpoint: Any, key: str) -> None:
    endpoint.actions["a"] = [(401, {})]
    with pytest.raises(RecipeError) as caught:
        ask(endpoint.url, "a")
    assert caught.value.rule == "endpoint.key" and key not in str(caught.value)
    assert endpoint.asked["a"] == 1


def test_unknown_endpoint_model_is_rejected(endpoint: Any) -> None:
    endpoint.actions["a"] = [(404, {})]
    with pytest.raises(RecipeError) as caught:
        ask(endpoint.url, "a")
    assert caught.value.rule == "endpoint.model"


def test_unreachable_server_aborts_run() -> None:
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(LuthierError) as caught:
        ask(f"http://127.0.0.1:{port}/v1", "a", retries=1)
    assert caught.value.rule == "endpoint.unreachable"


def test_endpoint_works_inside_running_event_loop(endpoint: Any) -> None:
    async def notebook() -> dict[str, Reply | Failure]:
        return ask(endpoint.url, "a")

    assert asyncio.run(notebook())["a"] == Reply("the answer to a", "stop", 7)


def test_callbacks_run_in_context_of_caller(endpoint: Any) -> None:
    # The journal reads the account and run from the context.
    account, heard = ContextVar("account", default=""), list[str]()
    teacher = EndpointModel(TeacherSpec(model="m", url=endpoint.url))

    def ask_once() -> None:
        question = [Message("user", "a")]
        teacher.ask(
            [question], SamplingSpec(), lambda *_: heard.append(account.get()), lambda _: None
        )

    async def notebook() -> None:
        ask_once()

    account.set("ann")
    ask_once()
    asyncio.run(notebook())
    assert heard == ["ann", "ann"]


@pytest.mark.parametrize(
    "choices",
    [
        "abc",
        {"0": 1},
        [1],
        [{"message": "hi"}],
        [{"message": {"content": ["a"]}}],
        [{"message": {"content": "a", "refusal": {"b": 1}}}],
    ],
)
def test_invalid_chat_completion_fails_prompt_alone(endpoint: Any, choices: Any) -> None:
    endpoint.actions["a"] = [json.dumps({"choices": choices}).encode()] * 9
    found = ask(endpoint.url, "a", "b", retries=0)
    assert failed(found["a"])
    assert isinstance(found["b"], Reply)


def test_token_counts_are_numbers_or_absent(endpoint: Any) -> None:
    message = {"message": {"content": "a"}}
    endpoint.actions["a"] = [json.dumps({"choices": [message]}).encode()]
    assert ask(endpoint.url, "a")["a"] == Reply("a", "unknown")
    counted = {"choices": [message], "usage": {"prompt_tokens": {}, "completion_tokens": "9"}}
    endpoint.actions["a"] = [json.dumps(counted).encode()] * 9
    assert isinstance(ask(endpoint.url, "a", retries=0)["a"], Failure)


def test_oversized_response_is_rejected(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.chat_models.endpoint.MOST_BYTES", 1000)
    endpoint.answers["a"] = "a" * 2000
    found = ask(endpoint.url, "a", "b", retries=0)
    assert isinstance(found["a"], Failure)
    assert isinstance(found["b"], Reply)


def test_trickling_response_times_out(endpoint: Any) -> None:
    def trickle(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.end_headers()
        with suppress(OSError):
            for _ in range(200):
                handler.wfile.write(b" ")
                time.sleep(0.05)

    endpoint.actions["a"] = [trickle] * 9
    began = time.monotonic()
    found = ask(endpoint.url, "a", "b", timeout=5.0, deadline=0.5)
    assert time.monotonic() - began < 5
    assert failed(found["a"])
    assert isinstance(found["b"], Reply)


def test_retries_count_towards_deadline(endpoint: Any) -> None:
    endpoint.actions["a"] = [(500, {})] * 99
    began = time.monotonic()
    found = ask(endpoint.url, "a", retries=1000, deadline=0.7)
    assert time.monotonic() - began < 5
    assert failed(found["a"])


@pytest.mark.parametrize(
    ("status", "encoding", "pack"),
    [
        (200, "gzip", gzip.compress),
        (200, "gzip, gzip", lambda data: gzip.compress(gzip.compress(data))),
        (400, "deflate", zlib.compress),
    ],
)
def test_decompression_bomb_is_rejected_within_memory_limit(
    endpoint: Any,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    encoding: str,
    pack: Callable[[bytes], bytes],
) -> None:
    monkeypatch.setattr("luthier.chat_models.endpoint.MOST_BYTES", 4 * MIB)
    sent = pack(bytes(64 * MIB))

    def bomb(handler: Any) -> None:
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-encoding", encoding)
        handler.send_header("content-length", str(len(sent)))
        handler.end_headers()
        with suppress(OSError):
            handler.wfile.write(sent)

    endpoint.actions["a"] = [bomb] * 9
    tracemalloc.start()
    try:
        found = ask(endpoint.url, "a", "b", retries=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(found["a"], Failure)
    assert isinstance(found["b"], Reply)
    assert peak < 16 * MIB  # the limit and the received chunks


def test_compressed_response_is_decoded(endpoint: Any) -> None:
    choice = {"message": {"content": "fine"}, "finish_reason": "stop"}
    sent = gzip.compress(json.dumps({"choices": [choice]}).encode())

    def packed(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-encoding", "gzip")
        handler.send_header("content-length", str(len(sent)))
        handler.end_headers()
        handler.wfile.write(sent)

    endpoint.actions["a"] = [packed]
    assert ask(endpoint.url, "a")["a"] == Reply("fine", "stop")


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["{other}/chat/completions", "file:///etc/passwd", "/v1", ""])
def test_redirects_are_not_followed(endpoint: Any, key: str, code: int, target: str) -> None:
    other = Endpoint()
    thread = threading.Thread(target=other.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    location = target.format(other=other.url)
    endpoint.actions["a"] = [(code, {"location": location} if location else {})] * 9
    try:
        with pytest.raises(RecipeError) as caught:
            ask(endpoint.url, "a")
    finally:
        other.server.shutdown()
        other.server.server_close()
        thread.join()
    assert not other.asked and not other.keys
    assert endpoint.asked["a"] == 1
    assert caught.value.rule == "endpoint.redirect" and key not in str(caught.value)


def test_deeply_nested_json_fails_prompt_alone(endpoint: Any) -> None:
    endpoint.actions["a"] = [b"[" * 1_000_000] * 9
    found = ask(endpoint.url, "a", "b", retries=0)
    assert isinstance(found["a"], Failure)
    assert isinstance(found["b"], Reply)


def test_lone_surrogate_is_replaced(endpoint: Any) -> None:
    endpoint.answers["a"] = "smile \ud83d"
    assert ask(endpoint.url, "a")["a"] == Reply("smile \ufffd", "stop", 7)
