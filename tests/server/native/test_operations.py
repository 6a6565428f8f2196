"""Routing, validation and OpenAPI description of native requests."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from native_client import native_client
from starlette.testclient import TestClient

from luthier.inference.pool import ModelPool
from luthier.limits import AccountQuotas
from luthier.server.http.messages import Fault
from luthier.server.native.operations import Context, refusal
from luthier.server.tables.arns import Arns

JOB = {
    "name": "a",
    "model_name": "a",
    "base": "tiny",
    "training": ["s3://rows/a"],
    "output": "s3://rows/a",
}
"""A body that is checked without errors."""


@pytest.fixture(scope="module")
def client() -> TestClient:
    """The API without a database, for requests that are rejected before database access."""

    def check(account: str, address: str) -> None:
        raise Fault("Conflict", address)

    nowhere: Any = SimpleNamespace(check_writable=check)
    context = Context(
        database=nowhere,
        arns=Arns(),
        locations=nowhere,
        pool=ModelPool(0),
        quotas=lambda account: AccountQuotas(),
        delete_model=lambda model: None,
        capture=nowhere,
    )
    return native_client(context)


def refused(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] in ("Validation", "Serialization")
    return error


def test_wrong_method_returns_allow_header(client: TestClient) -> None:
    answer = client.delete("/api/v1/jobs")
    assert answer.status_code == 405 and answer.json()["error"]["code"] == "MethodNotAllowed"
    assert set(answer.headers["allow"].split(", ")) == {"GET", "POST"}


@pytest.mark.parametrize(
    "path", ["/api/v1/nothing", "/api/v1/jobs/a/b/c", "/api/v1/jobs/", "/api/"]
)
def test_unknown_path_is_unknown_operation(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404 and answer.headers["x-request-id"]
    assert answer.json()["error"]["code"] == "UnknownOperation"


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({**JOB, "name": ""}, "name"),
        ({**JOB, "name": 1}, "name"),
        ({}, "name"),
        (b"", "name"),
        ({**JOB, "nmae": 1}, "nmae"),
        ({**JOB, "priority": "many"}, "priority"),
        ({**JOB, "training": []}, "training"),
        ({**JOB, "training": [1] * 100_000}, "training.0"),
        (dict.fromkeys(map(str, range(100_000)), 1), "name"),
        ([], None),
        (b"{", None),
        (b'{"name": NaN}', None),
        (b"[" * 200_000, None),
        (b"\xff", None),
        (b'{"name": "\\ud800"}', None),
        (b'{"name": "a\\u0000"}', None),
    ],
)
def test_invalid_job_request_names_parameter(
    client: TestClient, body: Any, parameter: str | None
) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    error = refused(client.post("/api/v1/jobs", content=sent))
    assert error.get("parameter") == parameter
    assert len(error["message"]) < 1000


def test_log_names_operation_of_invalid_json_request(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="luthier.server"):
        refused(client.post("/api/v1/jobs", content=b"{"))
    (line,) = [each.fields for each in caplog.records if each.message == "request"]  # type: ignore[attr-defined]
    assert (line["operation"], line["error"]) == ("native.createJob", "Serialization")


@pytest.mark.parametrize("kind", ["application/json", "text/plain", None])
def test_body_is_parsed_as_json_regardless_of_content_type(
    client: TestClient, kind: str | None
) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = client.post("/api/v1/jobs", content=json.dumps(JOB), headers=headers)
    assert answer.json()["error"] == {"code": "Conflict", "message": "s3://rows/a"}
    assert answer.status_code == 409


def test_error_messages_contain_no_pydantic_wording(client: TestClient) -> None:
    wrong = {"count": "x", "seed": -1, "steps": 0, "guidance_scale": 500, "label": "x" * 2000}
    for path, body in (
        ("images", wrong),
        ("predictions", {"inputs": [{"window": []}], "top": 0}),
        ("predictions", {"inputs": [{"window": [1] * 1000}, {"text": None}]}),
        ("predictions", {"inputs": [{"window": ["x"]}]}),
    ):
        error = refused(client.post(f"/api/v1/models/m/{path}", json=body))
        assert not re.search("should|Input|Tuple|Value error|valid", error["message"])


def test_invalid_item_is_not_reported_as_missing(client: TestClient) -> None:
    answer = client.post("/api/v1/models/m/predictions", json={"inputs": ["My chain slips"]})
    assert refused(answer)["message"] == "inputs.0 must be an object"


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "other=1"])
def test_invalid_query_names_parameter(client: TestClient, query: str) -> None:
    name = query.partition("=")[0]
    assert refused(client.get(f"/api/v1/jobs?{query}"))["parameter"] == name


def test_faults_have_their_status() -> None:
    statuses = {code: refusal(Fault(code, "no"), "r").status for code in (
        "AccessDenied", "ResourceNotFound", "Conflict", "UnrecognizedClient", "InternalServer", "New"
    )}  # fmt: skip
    assert list(statuses.values()) == [403, 404, 409, 401, 500, 400]


def test_native_openapi_document_describes_jobs(client: TestClient) -> None:
    api = client.get("/api/v1/openapi.json").json()
    assert api["openapi"].startswith("3.1")
    methods = api["paths"]["/api/v1/jobs"]
    assert set(methods) == {"post", "get"}
    assert (methods["post"]["operationId"], methods["get"]["operationId"]) == (
        "createJob", "listJobs"
    )  # fmt: skip
    body = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = {"$ref": body["$ref"], "components": api["components"]}
    check = Draft202012Validator(schema)
    assert check.is_valid(JOB) and not check.is_valid({**JOB, "name": ""})
    assert {each["name"] for each in methods["get"]["parameters"]} == {"state", "limit", "position"}
    assert methods["post"]["responses"]["201"]["content"]["application/json"]["schema"]
    assert {"400", "403", "404", "429"} <= methods["get"]["responses"].keys()
    assert "422" not in methods["post"]["responses"]
    (path,) = api["paths"]["/api/v1/jobs/{job}"]["get"]["parameters"]
    assert (path["name"], path["in"]) == ("job", "path")
    events = api["paths"]["/api/v1/jobs/{job}/events"]["get"]["responses"]["200"]["content"]
    assert "text/event-stream" in events
    media = api["paths"]["/api/v1/models/{model}/predictions"]["post"]["requestBody"]["content"]
    assert set(media) == {"application/json", "image/*", "audio/*"}
