"""CORS: preflights and responses as browsers send and read them."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from luthier_server import BASE, KEYS, ONE, Served, home_with_tiny

PAGE, OTHER_PAGE, STRANGER = "https://app.example", "http://localhost:3000", "https://evil.example"
APIS = {
    "openai": ("POST", "/v1/chat/completions", "authorization,content-type,x-stainless-os"),
    "bedrock": ("POST", f"/model/{BASE}/converse", "authorization,x-amz-date,amz-sdk-request"),
    "objects": ("PUT", "/data/rows", "authorization,x-amz-content-sha256,x-amz-meta-any-name"),
    "native": ("GET", "/api/v1/whoami", "authorization"),
    "sts": ("POST", "/", "authorization,x-amz-date"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(home_with_tiny(tmp_path_factory.mktemp("service"), tiny_model_folder))
    made.start("--no-workers", "--cors-origin", PAGE, "--cors-origin", OTHER_PAGE)
    yield made
    made.end()


def send(
    server: Served, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)) as to:
        to.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = to.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read()


def preflight(server: Served, api: str, origin: str) -> tuple[int, dict[str, str], bytes]:
    method, path, names = APIS[api]
    return send(
        server, "OPTIONS", path, Origin=origin, Access_Control_Request_Method=method,
        Access_Control_Request_Headers=names,
    )  # fmt: skip


@pytest.mark.parametrize("api", APIS)
def test_preflight_of_allowed_origin_needs_no_key(server: Served, api: str) -> None:
    for origin in (PAGE, OTHER_PAGE):
        status, headers, _ = preflight(server, api, origin)
        assert (status, headers["access-control-allow-origin"]) == (200, origin)
        assert APIS[api][0] in headers["access-control-allow-methods"].split(", ")
        assert headers["access-control-allow-headers"] == APIS[api][2]
        assert "Origin" in headers["vary"]
        assert "access-control-allow-credentials" not in headers


def test_unlisted_origins_get_no_cors_headers(server: Served) -> None:
    for origin in (STRANGER, f"{PAGE}.evil.example", "http://app.example", f"{PAGE}:8443", "null"):
        status, headers, _ = preflight(server, "openai", origin)
        assert status >= 400 and "access-control-allow-origin" not in headers, origin


def test_only_allowed_origins_can_read_responses(server: Served) -> None:
    key = f"Bearer {KEYS[ONE]['api_key']}"
    for path, authorization, expected in (
        ("/v1/models", key, 200), ("/v1/models", "Bearer wrong", 401), ("/v1/nothing", key, 404),
        ("/foundation-models", "Bearer wrong", 403), ("/healthz", key, 200),
    ):  # fmt: skip
        status, headers, _ = send(server, "GET", path, Origin=PAGE, Authorization=authorization)
        assert (status, headers["access-control-allow-origin"]) == (expected, PAGE)
        # Without cookies the star means all of them: request ids, ETag, x-amz-meta-*.
        assert headers["access-control-expose-headers"] == "*"
        status, headers, _ = send(server, "GET", path, Authorization=authorization, Origin=STRANGER)
        assert (status, "access-control-allow-origin" in headers) == (expected, False)
