"""Routes, rejected requests and raw HTTP of the Bedrock API."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
import pytest
from bedrock_service import ALICE, BASE, Service
from botocore.config import Config
from botocore.exceptions import ClientError
from starlette.routing import Match

from luthier.server.bedrock.routes import CONTROL, bedrock_api, routes_of
from luthier.server.bedrock.shapes import operation_models
from luthier.server.http.messages import Fault, Request, Response

ARN = f"arn:aws:bedrock:us-east-1:{ALICE}:custom-model/{BASE}/abcdefghij12"
AUTHORIZATION = f"AWS4-HMAC-SHA256 Credential={ALICE}/20260131/us-east-1/bedrock/aws4_request"


def send(service: Service, method: str, path: str, body: bytes = b"") -> tuple[int, Any, Any]:
    """Status, headers and body of a raw request."""
    address = urlsplit(service.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port or 0, timeout=20)
    connection.request(method, path, body or None, {"Authorization": AUTHORIZATION})
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(answer.read())
    connection.close()
    return found


ROUTES = routes_of(operation_models().values(), {})


def found(method: str, path: str) -> tuple[str, dict[str, str]] | None:
    """Path of the route for a request, and the segments of the request by name."""
    scope = {"type": "http", "method": method, "path": path, "path_params": {}}
    for route in ROUTES:
        match, child = route.matches(scope)
        if match is Match.FULL:
            return route.path, child["path_params"]
    return None


@pytest.mark.parametrize("name", sorted(operation_models()))
def test_operation_route_matches_request_uri(name: str) -> None:
    operation = operation_models()[name]
    uri = operation.http["requestUri"]
    parts = uri.split("/")
    filled = [quote(ARN, safe="") if part.startswith("{") else part for part in parts]
    route = found(operation.http["method"], "/".join(filled))
    assert route is not None and route[0].replace(":segment", "") == uri
    assert set(route[1].values()) <= {ARN}
    assert len(route[1]) == sum(part.startswith("{") for part in parts)


def test_path_is_split_before_decoding() -> None:
    route = found("GET", "/custom-models/a%252Fb%2Fc")
    assert route is not None and route[1] == {"modelIdentifier": "a%2Fb/c"}
    assert found("GET", "/custom-models/a/b") is None


def test_unknown_route_returns_404(service: Service) -> None:
    for method, path in (("GET", "/nothing"), ("DELETE", "/foundation-models"), ("GET", "//")):
        status, headers, body = send(service, method, path)
        assert status == 404 and headers["x-amzn-errortype"] == "UnknownOperationException"
        assert body["message"] and headers["x-amzn-requestid"]


def test_operation_without_handler_returns_validation_error(bedrock: Any) -> None:
    for call in (bedrock.list_guardrails, bedrock.list_prompt_routers):
        with pytest.raises(ClientError) as caught:
            call()
        assert caught.value.response["Error"]["Code"] == "ValidationException"
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


def test_control_operations_exist_in_bedrock_model() -> None:
    assert len(CONTROL) >= 23 and all(name in operation_models() for name in CONTROL)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"resourceARN": 5}',
        b'{"resourceARN": "\\ud800aaaaaaaaaaaaaaaaaaaaaaaaaaaa"}',
        b'{"resourceARN": {"a": 1}}',
        b'{"resourceARN": NaN}',
        b"[" * 100_000,
    ],
)
def test_invalid_body_returns_serialization_error(service: Service, body: bytes) -> None:
    status, headers, answer = send(service, "POST", "/listTagsForResource", body)
    assert status == 400 and headers["x-amzn-errortype"] == "SerializationException"
    assert headers["content-type"] == "application/json" and answer["message"]


def test_number_out_of_range_in_a_body(service: Service) -> None:
    body = b'{"a": ' + b"9" * 10_000 + b"}"
    status, headers, answer = send(service, "POST", "/listTagsForResource", body)
    assert status == 400 and headers["x-amzn-errortype"] == "ValidationException"
    assert len(answer["message"]) < 100


def test_null_and_empty_body_count_as_absent(service: Service) -> None:
    for body in (b"", b"{}", b'{"resourceARN": null, "unknown": 1}'):
        status, headers, answer = send(service, "POST", "/listTagsForResource", body)
        assert status == 400 and headers["x-amzn-errortype"] == "ValidationException"
        assert answer["message"] == (
            "1 validation error detected: Value 'null' at 'resourceARN' failed to satisfy "
            "constraint: Member must not be null"
        )


@pytest.mark.parametrize(
    "query",
    [
        "maxResults=0",
        "maxResults=1001",
        "maxResults=many",
        "maxResults=%D9%A3",
        "maxResults=" + "9" * 30,
        "sortOrder=Up",
        "sortBy=Name",
        "creationTimeAfter=yesterday",
        "nextToken=abc",
        "nextToken=" + "A" * 44,
        "nextToken=",
        "statusEquals=Done",
        "nameContains=%20",
    ],
)
def test_invalid_query_returns_validation_error(service: Service, query: str) -> None:
    status, headers, _ = send(service, "GET", f"/model-customization-jobs?{query}")
    assert status == 400 and headers["x-amzn-errortype"] == "ValidationException"


def test_extreme_timestamps_cause_no_server_error(service: Service) -> None:
    for moment in ("0001-01-01T00:00:00%2B14:00", "9999-12-31T23:59:59.999999Z"):
        for name in ("creationTimeAfter", "creationTimeBefore"):
            status, headers, _ = send(service, "GET", f"/custom-models?{name}={moment}")
            assert status == 200 or headers["x-amzn-errortype"] == "ValidationException"


def test_operations_of_the_runtime_are_plugged_in(service: Service, database: Any) -> None:
    seen: list[Request] = []

    def converse(request: Request) -> Response:
        seen.append(request)
        if len(seen) > 1:
            raise Fault("ModelNotReady", "Not yet.", retry_after=7)
        message = {"message": {"role": "assistant", "content": [{"text": "hello"}]}}
        usage = {"inputTokens": 1, "outputTokens": 1, "totalTokens": 2}
        record = {"output": message, "stopReason": "end_turn", "usage": usage}
        return Response.json({**record, "metrics": {"latencyMs": 1}})

    with service.server.serving(database, handlers={"Converse": converse}):
        client = boto3.client(
            "bedrock-runtime",
            endpoint_url=service.url,
            region_name="us-east-1",
            aws_access_key_id=ALICE,
            aws_secret_access_key="secret",
            config=Config(retries={"total_max_attempts": 1}),
        )
        asked = {"modelId": ARN, "messages": [{"role": "user", "content": [{"text": "hi"}]}]}
        answer = client.converse(**asked)
        assert answer["output"]["message"]["content"] == [{"text": "hello"}]
        assert answer["ResponseMetadata"]["RequestId"] == seen[0].request_id
        assert seen[0].params == {"modelId": ARN} and seen[0].caller.account == ALICE
        with pytest.raises(client.exceptions.ModelNotReadyException) as caught:
            client.converse(**asked)
        record = caught.value.response["ResponseMetadata"]
        assert record["HTTPStatusCode"] == 429 and record["HTTPHeaders"]["retry-after"] == "7"
        with pytest.raises(ClientError, match="ValidationException"):
            client.list_async_invokes()


def test_handler_of_unknown_operation_is_rejected(service: Service) -> None:
    with pytest.raises(ValueError):
        bedrock_api(service.control, {"Conversation": lambda call: Response()})


def test_error_statuses_and_details(service: Service) -> None:
    for code, status in (
        ("Conflict", 400),
        ("Throttling", 429),
        ("ResourceNotFound", 404),
        ("AccessDenied", 403),
        ("ModelError", 424),
        ("ModelTimeout", 408),
        ("ServiceUnavailable", 503),
        ("InternalServer", 500),
        ("ServiceQuotaExceeded", 400),
        ("UnrecognizedClient", 403),
        ("RequestEntityTooLarge", 413),
    ):
        answer = service.api.refusal(Fault(code, "text"), "id-1")
        assert answer.status == status
        assert answer.headers["x-amzn-ErrorType"] == f"{code}Exception"
    many = service.api.refusal(Fault("TooManyTags", "text", resourceName=ARN), "id-1")
    assert json.loads(many.body) == {"message": "text", "resourceName": ARN}  # type: ignore[arg-type]


def test_oversized_body_is_rejected(service: Service) -> None:
    status, _, _ = send(service, "POST", "/tagResource", b" " * 2_000_001)
    assert status == 413
