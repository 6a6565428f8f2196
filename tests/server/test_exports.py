"""Exports through ``luthier serve``: files in a bucket, ``kill -9``, other accounts."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from luthier_server import OTHER, Served, home_with_tiny, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    """With the custom model ``mine``, a LoRA adapter, and a bucket."""
    made = Served(home_with_tiny(tmp_path_factory.mktemp("exports"), tiny_model_folder))
    made.start()
    made.client("s3").create_bucket(Bucket="bucket")
    lines = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in range(8)]
    made.put_rows("rows.jsonl", lines)
    made.train_mine()
    yield made
    made.end()


def create(server: Served, **fields: Any) -> str:
    asked = {"output": "s3://bucket/out", **fields}
    status, body = server.ask("POST", "/api/v1/models/mine/exports", asked)
    assert status == 201, body
    return str(body["id"])


def ended(server: Served, export: str) -> dict[str, Any]:
    found: dict[str, Any] = server.ended(f"/api/v1/exports/{export}")
    return found


def keys(server: Served, export: str) -> dict[str, bytes]:
    """Return the objects of an export by name."""
    s3, prefix = server.client("s3"), f"out/model-export-{export}/"
    listed = s3.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return {
        each["Key"].removeprefix(prefix): s3.get_object(Bucket="bucket", Key=each["Key"])[
            "Body"
        ].read()
        for each in listed
    }


@pytest.mark.slow
def test_merged_model_is_exported_to_bucket(server: Served) -> None:
    made = create(server, merged=True)
    done = ended(server, made)
    assert done["state"] == "Completed", done
    found = keys(server, made)
    result = done["result"]
    assert {each["name"] for each in result["files"]} | {"export.json"} == {*found}
    assert "model.safetensors" in found
    for each in result["files"]:
        assert hashlib.sha256(found[each["name"]]).hexdigest() == each["sha256"]
    assert result["address"] == f"s3://bucket/out/model-export-{made}"
    listed = server.ask("GET", "/api/v1/exports?state=Completed&limit=1")[1]
    assert [each["id"] for each in listed["exports"]] == [made]
    own = server.ask("GET", f"/api/v1/exports?model={quote(done['model'])}")[1]["exports"]
    assert [each["id"] for each in own] == [made]
    assert server.ask("GET", "/api/v1/exports?model=arn:of:another")[1] == {"exports": []}
    assert server.ask("POST", f"/api/v1/exports/{made}/stop")[0] == 409
    stopped = create(server)
    assert server.ask("POST", f"/api/v1/exports/{stopped}/stop")[0] == 200
    assert ended(server, stopped)["state"] == "Stopped"


@pytest.mark.slow
def test_export_completes_after_killed_worker(server: Served) -> None:
    made = create(server)
    os.kill(int(until(lambda: server.worker_of(made))), signal.SIGKILL)
    done = ended(server, made)
    assert done["state"] == "Completed", done
    assert {*keys(server, made)} == {each["name"] for each in done["result"]["files"]} | {
        "export.json"
    }


def test_invalid_export_request_is_rejected(server: Served) -> None:
    for fields, code in (
        ({"output": "s3://nobodys/x"}, "location.refused"),
        ({"output": "file:///etc"}, "location.refused"),
        ({"output": "s3://bucket/" + "k" * 1000}, "location.refused"),
        ({"format": "pickle"}, None),
        ({"quantization": "q8_0"}, "recipe.invalid"),
        ({"format": "onnx", "merged": False}, "recipe.invalid"),
        ({"format": "gguf", "quantization": "zzz"}, "gguf.type"),
        ({"format": "gguf", "quantization": ""}, "gguf.type"),
        ({"format": "gguf", "merged": False, "quantization": "q8_0"}, "recipe.invalid"),
    ):
        asked = {"output": "s3://bucket/out", **fields}
        status, body = server.ask("POST", "/api/v1/models/mine/exports", asked)
        assert (status, body["error"].get("rule")) == (400, code), fields
        assert (body["error"].get("parameter") == "format") == (code is None)
    asked = {"output": "s3://bucket/out"}
    assert server.ask("POST", "/api/v1/models/none/exports", asked)[0] == 404
    assert server.ask("POST", "/api/v1/models/mine/exports", asked, OTHER)[0] == 404


@pytest.mark.slow
def test_exports_are_hidden_from_foreign_account(server: Served) -> None:
    made = create(server)
    assert server.ask("GET", f"/api/v1/exports/{made}", account=OTHER)[0] == 404
    assert server.ask("POST", f"/api/v1/exports/{made}/stop", account=OTHER)[0] == 404
    assert server.ask("GET", "/api/v1/exports", account=OTHER)[1] == {"exports": []}
    ended(server, made)
