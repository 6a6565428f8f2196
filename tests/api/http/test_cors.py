"""Pages of other origins: preflights and answers as browsers send and read them."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from luthier_server import BASE, KEYS, ONE, Served, home_with_tiny

from luthier.api.bedrock.face import CONTROL
from luthier.api.bedrock.shapes import operation_models
from luthier.api.http.cors import METHODS, check_origins
from luthier.api.s3.face import OPERATIONS
from luthier.api.service import Service
from luthier.api.settings import Settings
from luthier.errors import RefusedInput

PAGE, OTHER_PAGE, STRANGER = "https://app.example", "http://localhost:3000", "https://evil.example"
FACES = {
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


def cors(headers: dict[str, str]) -> set[str]:
    return {name for name in headers if name.startswith("access-control-")}


def preflight(server: Served, face: str, origin: str) -> tuple[int, dict[str, str], bytes]:
    method, path, names = FACES[face]
    return send(
        server, "OPTIONS", path, Origin=origin, Access_Control_Request_Method=method,
        Access_Control_Request_Headers=names,
    )  # fmt: skip


@pytest.mark.parametrize("face", FACES)
def test_a_preflight_of_an_allowed_origin_needs_no_key(server: Served, face: str) -> None:
    for origin in (PAGE, OTHER_PAGE):
        status, headers, _ = preflight(server, face, origin)
        assert (status, headers["access-control-allow-origin"]) == (200, origin)
        assert FACES[face][0] in headers["access-control-allow-methods"].split(", ")
        assert headers["access-control-allow-headers"] == FACES[face][2]
        assert "Origin" in headers["vary"]
        assert "access-control-allow-credentials" not in headers


def test_the_methods_of_all_routes_are_allowed(luthier_home: Path) -> None:
    service = Service(Settings())
    faces = {face.name: face for face in service.application.faces}  # type: ignore[attr-defined]
    of_bedrock = operation_models()
    methods = [
        {of_bedrock[name].http["method"] for name in (*CONTROL, "Converse", "InvokeModel")},
        {each.method for each in faces["openai"].router.operations},
        {each.method for each in faces["native"].router.operations},
        {each.method for each in OPERATIONS},
    ]
    service.close()
    assert all(methods)
    assert set().union(*methods) == set(METHODS)


@pytest.mark.parametrize("face", FACES)
def test_other_origins_get_no_headers_and_no_preflight(server: Served, face: str) -> None:
    near = (
        f"{PAGE}.evil.example",
        "http://app.example",
        f"{PAGE}:8443",
        "https://APP.example",
        "null",
    )
    for origin in (STRANGER, *near):
        status, headers, _ = preflight(server, face, origin)
        assert status >= 400 and not cors(headers), origin
        assert headers["vary"] == "Origin"


def test_answers_can_be_read_by_allowed_pages_alone(server: Served) -> None:
    key = f"Bearer {KEYS[ONE]['api_key']}"
    for path, authorization, expected in (
        ("/v1/models", key, 200), ("/v1/models", "Bearer wrong", 401), ("/v1/nothing", key, 404),
        ("/foundation-models", "Bearer wrong", 403), ("/healthz", key, 200),
    ):  # fmt: skip
        status, headers, _ = send(server, "GET", path, Origin=PAGE, Authorization=authorization)
        assert (status, headers["access-control-allow-origin"]) == (expected, PAGE)
        # Without cookies the star means all of them: request ids, ETag, x-amz-meta-*.
        assert headers["access-control-expose-headers"] == "*"
        for origin in ({"Origin": STRANGER}, {}):
            status, headers, _ = send(server, "GET", path, Authorization=authorization, **origin)
            assert (status, cors(headers), headers["vary"]) == (expected, set(), "Origin")


def test_a_stream_and_a_refused_signature(server: Served) -> None:
    body = b'{"model":"%s","messages":[{"role":"user","content":"x"}],"max_tokens":3,"stream":true}'
    status, headers, text = send(
        server, "POST", "/v1/chat/completions", body % BASE.encode(), Origin=PAGE,
        Authorization=f"Bearer {KEYS[ONE]['api_key']}", Content_Type="application/json",
    )  # fmt: skip
    assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
    assert text.rstrip().endswith(b"data: [DONE]")
    scope = "AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/s3/aws4_request"
    status, headers, _ = send(server, "GET", "/data/rows", Origin=PAGE, Authorization=scope)
    assert (status, headers["access-control-allow-origin"]) == (400, PAGE)


@pytest.mark.slow
def test_nobody_is_allowed_by_default(tmp_path: Path, tiny_model_folder: Path) -> None:
    server = Served(home_with_tiny(tmp_path / "service", tiny_model_folder))
    server.start("--no-workers")
    status, headers, _ = preflight(server, "openai", PAGE)
    assert status >= 400 and not cors(headers)
    _, headers, _ = send(server, "GET", "/healthz", Origin=PAGE)
    assert not cors(headers) and "vary" not in headers
    server.end()


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "", "app.example", "https://app.example/", "https://app.example/x", "ftp://a.example",
     "https://*.example", "https://APP.example", "https://app.example:443", "http://a.example:80",
     "https://user@app.example", "https://app.example https://b.example", "https://"],
)  # fmt: skip
def test_origins_that_no_browser_sends_are_refused(origin: str) -> None:
    with pytest.raises(RefusedInput, match="cors-origin"):
        check_origins([PAGE, origin])


def test_origins_as_browsers_send_them() -> None:
    given = (
        PAGE,
        OTHER_PAGE,
        "http://127.0.0.1:8000",
        "https://[::1]:8443",
        "https://xn--e1a.example",
    )
    assert check_origins(given) == given
