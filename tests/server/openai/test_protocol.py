"""Protocol errors as raised by the client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from luthier.server.openai.routes import ROUTERS


def asked(service: Any, method: str, path: str, body: bytes | None = None) -> tuple[int, Any, Any]:
    headers = {"Authorization": "Bearer sk-one", "Content-Type": "application/json"}
    answer = service.http.request(method, f"/v1{path}", content=body, headers=headers)
    return answer.status_code, answer.headers, answer.json()


def test_unknown_key_is_rejected(service: Any) -> None:
    with (
        service.client("sk-nobody") as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.models.list()
    assert refused.value.code == "invalid_api_key"
    assert refused.value.type == "invalid_request_error"


def test_rate_limit_error_has_retry_after(service: Any) -> None:
    with service.client("sk-fast") as client, pytest.raises(openai.RateLimitError) as refused:
        client.models.list()
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.response.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nothing"), ("POST", "/moderations"), ("PATCH", "/files"), ("GET", "/files/a/b/c")],
)
def test_unknown_route_returns_openai_error(service: Any, method: str, path: str) -> None:
    status, headers, body = asked(service, method, path, b"{}" if method != "GET" else None)
    assert status == 404
    assert body["error"]["type"] == "invalid_request_error"
    assert headers["x-request-id"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b'"a"', b'{"model": NaN}', b"\xff", b""])
def test_non_object_body_returns_openai_error(service: Any, body: bytes) -> None:
    for path in ("/chat/completions", "/fine_tuning/jobs", "/embeddings", "/batches"):
        status, headers, answer = asked(service, "POST", path, body)
        assert status == 400
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert headers["x-request-id"]


def test_both_path_prefixes_and_request_ids(service: Any, client: openai.OpenAI) -> None:
    assert client.models.with_raw_response.list().headers["x-request-id"]
    with openai.OpenAI(
        api_key="sk-one", base_url="http://luthier/openai/v1", http_client=service.http
    ) as second:
        assert [each.id for each in second.models.list()] == [
            each.id for each in client.models.list()
        ]


@pytest.mark.filterwarnings("error::UserWarning")
def test_openapi_document_includes_every_route(service: Any) -> None:
    _, _, document = asked(service, "GET", "/openapi.json")
    operations = {
        each["operationId"] for path in document["paths"].values() for each in path.values()
    }
    assert {route.name for router in ROUTERS for route in router.routes} <= operations
