"""Hostile inputs that exhaust time or memory: graders, patterns and schemas, on a real server.

Each request returns its documented error. The server's memory stays constant, its processes end with
their work, and a second client is served meanwhile.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions
import pytest
from luthier_server import KEYS, ONE, Served, home_with_tiny, until
from resident_memory import Growth, processes

pytestmark = pytest.mark.slow

MOST_GROWTH = 400 << 20
"""Maximum growth of the server and child processes during an attack, in bytes."""
BACK = 150 << 20
"""Maximum growth that remains after an attack, in bytes."""
RUN, CHAT = "/v1/fine_tuning/alpha/graders/run", "/v1/chat/completions"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    home = home_with_tiny(tmp_path_factory.mktemp("served") / "home", tiny_model_folder)
    made = Served(home, forked=False)
    made.start("--no-workers")
    assert chat(made, {"type": "json_object"})[0] == 200
    yield made
    made.end()


@pytest.fixture(autouse=True)
def bounded(server: Served) -> Iterator[None]:
    """No attack makes the server grow, or leaves work behind."""
    with Growth(server) as growth:
        yield
    print(f"grew by {growth.most >> 20} MiB")
    assert growth.most < MOST_GROWTH
    until(lambda: cpu_share(server) < 0.5, 20)
    assert growth.comes_back(BACK)


def cpu_share(server: Served) -> float:
    """Return the number of cores in use by the server and child processes."""
    several = processes(server)
    for each in several:
        each.cpu_percent()
    time.sleep(0.2)
    return sum(each.cpu_percent() for each in several if each.is_running()) / 100


def similarity(metric: str = "fuzzy_match", reference: str = "{{item.a}}") -> dict[str, Any]:
    return {"type": "text_similarity", "name": "near", "input": "{{sample.output_text}}",
            "reference": reference, "evaluation_metric": metric}  # fmt: skip


def chat(server: Served, form: Any = None, **further: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4,
            **({"response_format": form} if form else {}), **further}  # fmt: skip
    return server.ask("POST", CHAT, body)


def grade(server: Served, grader: Any, sample: str, item: Any = None, account: str = ONE) -> Any:
    body = {"grader": grader, "model_sample": sample, "item": item or {}}
    return server.ask("POST", RUN, body, account)


def refusal(answer: Any) -> str:
    """Check that the status is 400 and return the message, a single plain line."""
    status, body = answer
    assert status == 400, answer
    message: str = body["error"]["message"]
    assert "<state>" not in message and "\n" not in message and len(message) < 600
    return message


def test_grader_template_expansion_is_limited(server: Served) -> None:
    bomb = "{{sample.output_text}}"
    check = {"type": "string_check", "name": "a", "input": bomb, "operation": "eq"}
    said = refusal(grade(server, {**check, "reference": bomb * 2500}, "x" * MEGABYTE))
    assert "2,500 places, and may have 256" in said
    said = refusal(grade(server, {**check, "reference": bomb * 200}, "x" * MEGABYTE))
    assert "1,000,000 characters" in said and "at most 65,536" in said
    # White space with many possible matches of a pattern.
    assert refusal(grade(server, {**check, "reference": "{{" + " " * 50_000 + "}}"}, "x"))
    judge = {"type": "score_model", "name": "a", "model": "tiny",
             "input": [{"role": "user", "content": bomb}] * 20_000}  # fmt: skip
    assert "at most 65,536" in refusal(grade(server, judge, "x" * MEGABYTE))
    with send(server, RUN, {}, size=5_000_000) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("metric", ["fuzzy_match", "rouge_l", "bleu", "gleu", "rouge_5"])
def test_long_text_comparison_time_is_bounded(server: Served, metric: str) -> None:
    texts = "ab c " * 12_000, "b a c " * 10_000
    started = time.monotonic()
    status, answer = grade(server, similarity(metric), texts[0], {"a": texts[1]})
    assert status == 200, answer
    assert time.monotonic() - started < 10


def send(server: Served, path: str, body: Any, size: int | None = None) -> socket.socket:
    """Send a request without waiting for the response. ``size`` is the declared body length."""
    parts = urlsplit(server.url)
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEYS[ONE]['api_key']}\r\nContent-Length: {size or len(data)}\r\n\r\n"
    )
    connection = socket.create_connection((str(parts.hostname), parts.port or 0), 30)
    connection.sendall(head.encode() + data)
    return connection


REFERENCES = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(25)}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


SCHEMAS: dict[str, tuple[Any, str]] = {
    "itself": ({"$ref": "#"}, "no text can match"),
    "a circle": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "no text can match",
    ),
    "deep": (nested(150), "nested deeper than 100 levels"),
    "deeper": (nested(90), "" ),
    "long": ({"enum": [f"word-{n}" for n in range(30_000)]}, "more than 200,000 characters"),
    "slow": ({"type": "integer", "multipleOf": 999_983}, "least common multiple of all `multipleOf`"),
    "intersections": (
        {"allOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(60)]},
        "join more than 8 patterns",
    ),
    "brackets": ({"type": "string", "pattern": "(" * 100_000}, "regular expression"),
    "open": ({"type": "string", "pattern": "(" * 10_000 + ")" * 10_000}, "regular expression"),
    "doubling": ({"$defs": {**REFERENCES, "a25": {"type": "string"}}, "$ref": "#/$defs/a0"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_hostile_schemas_are_rejected_or_bounded(server: Served, name: str) -> None:
    """Every API accepts a schema as response format and as tool schema."""
    schema, result = SCHEMAS[name]
    runtime = server.client("bedrock-runtime", tries=1)
    named = {"name": "f", "schema": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    model = "tiny"

    def responses(**further: Any) -> Any:
        body = {"model": model, "input": "Hi", "max_output_tokens": 4, **further}
        return server.ask("POST", "/v1/responses", body)

    def aws(call: Callable[..., Any], **further: Any) -> Any:
        try:
            return call(modelId=model, **further)["ResponseMetadata"]["HTTPStatusCode"], {}
        except botocore.exceptions.ClientError as error:
            response: Any = error.response
            return response["ResponseMetadata"]["HTTPStatusCode"], {
                "error": {"message": str(error)}
            }

    turns = [{"role": "user", "content": [{"text": "Hi"}]}]
    asked: list[Any] = [
        chat(server, {"type": "json_schema", "json_schema": named}),
        chat(server, {"type": "json_schema", "json_schema": named}, stream=True),
        chat(server, None, tools=[tool], tool_choice="required"),
        responses(text={"format": {"type": "json_schema", **named}}),
        responses(tools=[{"type": "function", "name": "f", "parameters": schema}],
                  tool_choice="required"),
        aws(runtime.converse, messages=turns, inferenceConfig={"maxTokens": 4},
            toolConfig={"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": schema}}}],
                        "toolChoice": {"any": {}}}),
        aws(runtime.invoke_model, body=json.dumps({
            "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4,
            "response_format": {"type": "json_schema", "json_schema": named}})),
    ]  # fmt: skip
    for place, answer in enumerate(asked):
        assert answer[0] in (200, 400), (place, answer)
        if result and place not in (2, 4, 5):
            assert result in refusal(answer), place
        elif answer[0] == 400:
            refusal(answer)


PATTERNS = {
    "brackets": "(" * 100_000,
    "nested": "(?:" * 600 + "a" + ")*" * 600,
    "long": "(?i)" + "|".join(f"word-{n}" for n in range(50_000)),
}


def test_patterns_and_schemas_of_graders(server: Served) -> None:
    deep: Any = nested(150)
    graders: list[Any] = [{"method": "regex", "pattern": each} for each in PATTERNS.values()]
    graders += [
        {"method": "json_schema", "against": deep},
        {"method": "json_schema", "against": {"pattern": PATTERNS["nested"]}},
        {"method": "json_schema", "against": {"enum": ["a" * 100] * 10_000}},
        {"method": "multi", "graders": {"a": {"method": "exact"}},
         "calculate_output": "-" * 900 + "a"},
    ]  # fmt: skip
    s3 = server.client("s3")
    s3.create_bucket(Bucket="rows")
    row = {"messages": [{"role": "user", "content": "Hi"}], "reference_answer": "a"}
    s3.put_object(Bucket="rows", Key="train.jsonl", Body=f"{json.dumps(row)}\n".encode() * 8)
    started = time.monotonic()
    for number, grader in enumerate(graders):
        body = {
            "name": f"job-{number}", "model_name": f"model-{number}", "base": "tiny",
            "customization_type": "REINFORCEMENT_FINE_TUNING",
            "training": ["s3://rows/train.jsonl"], "grader": grader,
        }  # fmt: skip
        status, answer = server.ask("POST", "/api/v1/jobs", body)
        assert status == 400, (number, status, answer)
        assert "grader" in json.dumps(answer), answer
    assert time.monotonic() - started < 30


def test_deeply_nested_bodies_are_rejected(server: Served) -> None:
    deep = '{"a":' * 800 + "1" + "}" * 800
    inside: Any = json.loads(deep)
    grader = {**similarity(), "further": inside}
    validate = "/v1/fine_tuning/alpha/graders/validate"
    assert "200 levels" in refusal(server.ask("POST", validate, {"grader": grader}))
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": deep}}]},
        {"role": "tool", "tool_call_id": "1", "content": "a"},
    ]  # fmt: skip
    status, answer = server.ask("POST", CHAT, {"model": "tiny", "messages": turns})
    assert status == 400, answer
