"""Malformed requests never cause a server error.

Each request is a valid request with a replaced, removed or added value.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from broken_requests import (
    ACCOUNT,
    CUSTOMIZATION,
    JOB,
    NATIVE,
    OPENAI,
    ROWS,
    RUNTIME,
    broken,
    control,
)
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from luthier_server import add_base
from served import served

from luthier.server.service import Service
from luthier.server.settings import Settings

EXAMPLES = int(os.environ.get("LUTHIER_TEST_EXAMPLES", "150"))


class Running:
    def __init__(self, url: str, key: str) -> None:
        self.place, self.key = url.removeprefix("http://"), key
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
        self.file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id

    def ask(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.place, timeout=60)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def survives(self, method: str, path: str, body: Any) -> None:
        """Check that the status is below 500 and an error body is JSON."""
        text = None if body is None else json.dumps(body).replace("file-none", self.file).encode()
        status, answer = self.ask(method, path, text)
        assert status < 500, (method, path, text, answer)
        if status >= 400:
            assert json.loads(answer), answer


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    family_folder: Callable[[str], Path],
) -> Iterator[tuple[Running, Path]]:
    home = tmp_path_factory.mktemp("malformed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        add_base(home, "tiny", "causal_lm", tiny_model_folder)
        add_base(home, "encoder", "encoder", family_folder("bert"))
        # The server slows down an address with many rejected requests, as in these tests.
        service = Service(Settings(run_jobs=False))
        assert service.issued is not None
        with served(service.application) as url:
            service.start()
            service.objects.create_bucket(ACCOUNT, "rows")
            service.locations.write(ACCOUNT, "s3://rows/", "train.jsonl", ROWS)
            yield Running(url, service.issued.api_key), home
        service.close()


@pytest.fixture
def running(
    started: tuple[Running, Path], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Running:
    """The server with a fresh copy of the initial store for each test."""
    running, home = started
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    return running


many = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 1000, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def test_native_responses_match_openapi_document(running: Running) -> None:
    document = json.loads(running.ask("GET", "/api/v1/openapi.json", None)[1])
    asked = [("POST", "/api/v1/jobs", {**JOB, "name": f"told-{n}", "model_name": f"told-{n}"})
             for n in range(2)]  # fmt: skip
    one = "/api/v1/jobs/{job}"
    asked += [("GET", one, None), ("POST", f"{one}/pause", None), ("POST", f"{one}/resume", None)]
    asked += [("POST", f"{one}/stop", None), ("POST", f"{one}/resume", None)]
    asked += [("GET", "/api/v1/jobs?limit=1", None), ("GET", "/api/v1/jobs?state=Gone", None)]
    asked += [("GET", f"/api/v1/{each}", None) for each in ("models", "whoami", "jobs")]
    for method, path, body in asked:
        text = None if body is None else json.dumps(body).encode()
        status, answer = running.ask(method, path.replace("{job}", "told-1"), text)
        result = document["paths"][path.partition("?")[0]][method.lower()]["responses"]
        schema = result[str(status)]["content"]["application/json"]["schema"]
        whole = {**schema, "components": document["components"]}
        Draft202012Validator(whole).validate(json.loads(answer))


def test_oversized_epoch_count_error_names_parameter(running: Running) -> None:
    for value in (1e308, 10**400):
        job = {**JOB, "settings": {"training": {"epochs": value}}}
        status, text = running.ask("POST", "/api/v1/jobs", json.dumps(job).encode())
        error = json.loads(text)["error"]
        assert (status, error["parameter"]) == (400, "settings.training.epochs"), error
        assert "settings.training.epochs" in error["message"]
        settings = {"n_epochs": value}
        body = {"model": "tiny", "training_file": running.file, "hyperparameters": settings}
        status, text = running.ask("POST", "/v1/fine_tuning/jobs", json.dumps(body).encode())
        assert (status, json.loads(text)["error"]["param"]) == (400, "hyperparameters.n_epochs")
        job = {**CUSTOMIZATION, "hyperParameters": {"epochCount": str(value)}}
        status, text = running.ask("POST", "/model-customization-jobs", json.dumps(job).encode())
        assert status == 400 and "epochCount" in json.loads(text)["message"]


TOO_LARGE = (b"1e400", b"-1e400", b"9" * 400 + b"e1", b"1" + b"0" * 400 + b".5")


def test_number_out_of_float_range_is_rejected(running: Running) -> None:
    said = {"role": "user", "content": [{"text": "x"}]}
    tool = {"toolSpec": {"name": "a", "inputSchema": {"json": {"maximum": "LARGE"}}}}
    converse = {"messages": [said], "toolConfig": {"tools": [tool]}}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "large": "LARGE"}
    for path, body, word in (
        ("/model/luthier.tiny/converse", converse, "out of range"),
        ("/model/luthier.tiny/invoke", {"prompt": "x", "temperature": "LARGE"}, "Malformed input"),
        ("/v1/chat/completions", chat, "out of range"),
        ("/api/v1/jobs", {**JOB, "settings": {"training": {"epochs": "LARGE"}}}, "out of range"),
    ):
        for number in TOO_LARGE:
            text = json.dumps(body).encode().replace(b'"LARGE"', number)
            status, answer = running.ask("POST", path, text)
            assert status == 400 and word in answer.decode(), answer
            assert b"infinity" not in answer.lower()
    config = {"messages": [said], "inferenceConfig": {"temperature": 10**400}}
    status, answer = running.ask(
        "POST", "/model/luthier.tiny/converse", json.dumps(config).encode()
    )
    assert status == 400 and b"inferenceConfig.temperature" in answer


@many
@given(case=broken(OPENAI))
def test_openai_api_survives_malformed_requests(
    running: Running, case: tuple[str, str, Any]
) -> None:
    running.survives(*case)


@pytest.mark.slow
@many
@given(case=broken(RUNTIME))
def test_bedrock_runtime_survives_malformed_requests(
    running: Running, case: tuple[str, str, Any]
) -> None:
    running.survives(*case)


@many
@given(case=broken(NATIVE))
def test_native_api_survives_malformed_requests(
    running: Running, case: tuple[str, str, Any]
) -> None:
    running.survives(*case)


@many
@given(case=broken(control()))
def test_bedrock_control_plane_survives_malformed_requests(
    running: Running, case: tuple[str, str, Any]
) -> None:
    running.survives(*case)
