"""How operations are found, checked and described, apart from what they do."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import Field

from luthier.server.http.messages import Caller, Fault, Request, RequestHead, Response
from luthier.server.http.routing import Route
from luthier.server.native.inference import PredictionRequest, SampleRequest
from luthier.server.native.operations import (
    Input,
    NativeFace,
    NativeOperation,
    View,
    _parse,
    document,
)


class Page(Input):
    limit: int = Field(default=10, ge=1, le=100)


class Thing(Input):
    name: str = Field(min_length=1)
    size: int | None = None
    parts: tuple[int, ...] = Field(default=(0,), min_length=1)


class ThingView(View):
    name: str
    size: int | None = None


def made(request: Request, body: Thing) -> ThingView:
    return ThingView(name=f"{request.params['kind']}:{body.name}")


def listed(request: Request, page: Page) -> Response:
    return Response.json({"limit": page.limit})


OPERATIONS = [
    NativeOperation("make", "POST", "/api/v1/{kind}/things", made, "Make one.", ThingView, body=Thing,
              status=201),
    NativeOperation("list", "GET", "/api/v1/{kind}/things", listed, "List them.", query=Page),
]  # fmt: skip


def _route(method: str, path: str) -> Route:
    return NativeFace(OPERATIONS).route(RequestHead(method, path, "", [], tls=False))


def call(method: str, path: str, body: Any = None, **query: str) -> Request:
    text = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    caller = Caller("111111111111", "anna", ("administrator",))
    found = _route(method, path)
    given = {key: [value] for key, value in query.items()}
    return Request("r1", caller, method, path, given, {}, text, datetime.now(UTC), found.params)


def answered(method: str, path: str, body: Any = None, **query: str) -> Response:
    return _route(method, path).operation.handler(call(method, path, body, **query))


def test_segments_are_decoded_once_and_take_no_slash() -> None:
    answer = answered("POST", "/api/v1/a%2Fb%2520/things", {"name": "x"})
    assert (answer.status, json.loads(answer.body)) == (201, {"name": "a/b%20:x"})  # type: ignore[arg-type]
    with pytest.raises(Fault) as missing:
        _route("POST", "/api/v1/a/b/things")
    assert missing.value.code == "UnknownOperation"


def test_another_method_names_those_there_are() -> None:
    face = NativeFace(OPERATIONS)
    with pytest.raises(Fault) as refused:
        _route("DELETE", "/api/v1/a/things")
    answer = face.refusal(refused.value, "r1")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, POST")


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"name": ""}, "name"),
        ({"name": 1}, "name"),
        ({}, "name"),
        ({"name": "a", "sise": 1}, "sise"),
        ({"name": "a", "size": "many"}, "size"),
        ([], None),
        (b"{", None),
        (b'{"name": NaN}', None),
        (b"[" * 100_000, None),
        (b"\xff", None),
    ],
)
def test_what_is_wrong_is_named(body: Any, parameter: str | None) -> None:
    with pytest.raises(Fault) as refused:
        answered("POST", "/api/v1/a/things", body)
    assert refused.value.code in ("Validation", "Serialization")
    assert refused.value.parameter == parameter
    answer = NativeFace(OPERATIONS).refusal(refused.value, "r1")
    assert answer.status == 400
    assert json.loads(answer.body)["error"].get("parameter") == parameter  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "name is required"),
        ({"name": 1}, "name must be a text"),
        ({"name": ""}, "name must have 1 or more characters"),
        ({"name": "a", "sise": 1}, "sise is not known here"),
        ({"name": "a", "size": 1.5}, "size must be a whole number"),
        ({"name": "a", "parts": 1}, "parts must be an array"),
        ([], "the body must be an object"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(body: Any, text: str) -> None:
    with pytest.raises(Fault) as refused:
        answered("POST", "/api/v1/a/things", body)
    assert refused.value.message == text


def test_no_word_of_pydantics_is_left_in_what_requests_are_told() -> None:
    fields = [
        (
            "images",
            {"count": "x", "seed": -1, "steps": 0, "guidance_scale": 500, "label": "x" * 2000},
        ),
        ("predictions", {"inputs": [{"window": []}], "top": 0}),
        ("predictions", {"inputs": [{"window": [1] * 1000}, {"text": None}]}),
        ("predictions", {"inputs": [{"window": ["x"]}]}),
    ]
    kinds = {"images": SampleRequest, "predictions": PredictionRequest}
    for kind, body in fields:
        with pytest.raises(Fault) as refused:
            _parse(kinds[kind], body)
        assert not re.search("should|Input|Tuple|Value error|valid", refused.value.message)


def test_the_query_is_checked_too() -> None:
    assert json.loads(answered("GET", "/api/v1/a/things", limit="7").body) == {"limit": 7}  # type: ignore[arg-type]
    for query in ({"limit": "0"}, {"limit": "x"}, {"other": "1"}):
        with pytest.raises(Fault):
            answered("GET", "/api/v1/a/things", **query)


def test_faults_have_their_status() -> None:
    face = NativeFace(OPERATIONS)
    assert face.refusal(Fault("Throttling", "slow down", retry_after=3), "r1").status == 429
    statuses = {code: face.refusal(Fault(code, "no"), "r").status for code in (
        "AccessDenied", "ResourceNotFound", "Conflict", "UnrecognizedClient", "InternalServer", "New"
    )}  # fmt: skip
    assert list(statuses.values()) == [403, 404, 409, 401, 500, 400]


def test_the_document_describes_every_operation() -> None:
    api = document(OPERATIONS, "1.0")
    assert api["openapi"] == "3.1.0"
    methods = api["paths"]["/api/v1/{kind}/things"]
    assert set(methods) == {"post", "get"}
    body = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = {"$ref": body["$ref"], "components": api["components"]}
    check = Draft202012Validator(schema)
    assert check.is_valid({"name": "x"}) and not check.is_valid({"name": ""})
    assert [each["name"] for each in methods["get"]["parameters"]] == ["kind", "limit"]
    assert methods["post"]["responses"]["201"]["content"]["application/json"]["schema"]
    assert {"400", "403", "404", "429"} <= methods["get"]["responses"].keys()


@pytest.mark.parametrize("text", ['{"name": "\\ud800"}', '{"name": "a\\u0000"}', "[" * 200_000])
def test_what_no_database_keeps_is_refused(text: str) -> None:
    with pytest.raises(Fault) as refused:
        answered("POST", "/api/v1/a/things", text.encode())
    assert refused.value.code == "Serialization"


def test_a_backslash_before_u0000_is_text() -> None:
    answer = answered("POST", "/api/v1/a/things", b'{"name": "\\\\u0000"}')
    assert json.loads(answer.body)["name"] == "a:\\u0000"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"name": "x", "parts": ["x"] * 100_000}, "parts.0 must be a whole number"),
        (dict.fromkeys(map(str, range(100_000)), 1), "name is required"),
        ({"name": "x", "parts": []}, "parts must have 1 or more items, and has 0"),
    ],
)
def test_an_error_of_many_values_is_short(body: object, text: str) -> None:
    with pytest.raises(Fault) as refused:
        answered("POST", "/api/v1/a/things", body)
    said = refused.value.message
    assert said.startswith(text) and len(said) < 500
