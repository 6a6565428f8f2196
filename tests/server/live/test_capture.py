"""Capture of requests: redaction, expiry and isolation on each route, and failures."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import captured_service
import numpy as np
import pytest
from captured_service import ITEMS, TEXT, Running, records
from luthier_server import ONE, OTHER

from luthier.errors import ObjectRefused
from luthier.inference.inference import InferenceFailed, Stream, TokenChunk
from luthier.media.image_grid import encode_png
from luthier.server.bedrock.runtime import runtime_handlers
from luthier.server.http.routes import MODEL_SLOT, NOT_CAPTURED
from luthier.server.live import capture as captures
from luthier.server.live import settings
from luthier.server.live.capture import remove_records
from luthier.server.native import inference
from luthier.server.openai.routes import ROUTERS
from luthier.server.tables.live.captures import CapturedRequest
from luthier.server.tables.objects import ObjectMetadata
from luthier.server.tables.storage import stored_by

running = captured_service.running
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}]}
CONVERSE = {"messages": [{"role": "user", "content": [{"text": TEXT}]}]}
PICTURE = base64.b64encode(encode_png(np.zeros((2, 2, 3), np.uint8))).decode()
REQUESTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "openai.chat.completions.create": [
        ("/v1/chat/completions", CHAT | {"metadata": {"who": ITEMS[0]}}),
        ("/v1/chat/completions", CHAT | {"stream": True, "n": 2}),
    ],
    "openai.completions.create": [
        ("/v1/completions", {"model": "tiny", "prompt": TEXT}),
        ("/v1/completions", {"model": "tiny", "prompt": [TEXT, TEXT], "stream": True}),
    ],
    "openai.responses.create": [
        ("/v1/responses", {"model": "tiny", "input": TEXT, "store": False}),
        ("/v1/responses", {"model": "tiny", "input": TEXT, "store": False, "stream": True}),
    ],
    "openai.embeddings.create": [("/v1/embeddings", {"model": "tiny", "input": [TEXT]})],
    "openai.rerank.create": [
        ("/v1/rerank", {"model": "tiny", "query": TEXT, "documents": [TEXT, {"text": TEXT}]})
    ],
    "openai.images.generate": [("/v1/images/generations", {"model": "tiny", "prompt": TEXT})],
    "native.predict": [("/api/v1/models/tiny/predictions", {"inputs": [{"text": TEXT}]})],
    "native.sampleImages": [("/api/v1/models/tiny/images", {"prompt": TEXT})],
    "native.reconstructImages": [
        ("/api/v1/models/tiny/reconstructions", {"images": [PICTURE]})
    ],
    "Converse": [("/model/tiny/converse", CONVERSE | {"requestMetadata": {"who": "ann"}})],
    "ConverseStream": [("/model/tiny/converse-stream", CONVERSE)],
    "InvokeModel": [
        ("/model/tiny/invoke", {"prompt": TEXT}),
        ("/model/tiny/invoke", {"messages": CHAT["messages"]}),
        ("/model/tiny/invoke", {"schemaVersion": "messages-v1"} | CONVERSE),
        ("/model/tiny/invoke", {"inputText": TEXT}),
    ],
    "InvokeModelWithResponseStream": [
        ("/model/tiny/invoke-with-response-stream", {"prompt": TEXT}),
        ("/model/tiny/invoke-with-response-stream", {"messages": CHAT["messages"]}),
        ("/model/tiny/invoke-with-response-stream", {"schemaVersion": "messages-v1"} | CONVERSE),
    ],
}  # fmt: skip
"""Requests with personal data, by operation."""
_TEXTLESS = {"native.reconstructImages"}
"""Operations without text in request and response."""


def text_routes() -> Iterator[str]:
    """Yield the operations of all routes that use a model and have a body."""
    routers = [*ROUTERS, inference.router]
    for route in (each for router in routers for each in router.routes):
        if MODEL_SLOT in getattr(route, "dependencies", ()) and route.operation not in NOT_CAPTURED:
            yield route.operation
    nothing: Any = None
    yield from runtime_handlers(nothing, nothing).keys() - NOT_CAPTURED


def disk_bytes(home: Path) -> bytes:
    """Return the bytes of all files below ``home``, decompressed; without the models."""
    pieces = []
    for file in sorted(each for each in home.rglob("*") if each.is_file()):
        if "models" not in file.parts:
            data = file.read_bytes()
            pieces.append(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    return b"\n".join(pieces)


def on(running: Running, account: str = ONE, **values: Any) -> None:
    with running.service.database.write() as session:
        settings.enable(session, account, **values)
    running.service.capture.reload()


def test_each_route_has_a_request() -> None:
    assert set(REQUESTS) == set(text_routes())


@pytest.mark.parametrize("operation", REQUESTS)
def test_redaction_expiry_and_isolation(
    running: Running, luthier_home: Path, operation: str
) -> None:
    on(running)
    for path, body in REQUESTS[operation]:
        answer = running.ask(path, body)
        assert answer.status_code == 200, answer.text
        assert ITEMS[0] not in body or ITEMS[0] in answer.text
        assert running.ask(path, body, OTHER).status_code == 200  # without capture
        running.service.capture.flush()
        (record,) = records(running)[-1:]
        assert record["operation"] == operation and record["modelId"] == "tiny"
        assert record["accountId"] == ONE and record["schemaType"] == "ModelInvocationLog"
        assert record["requestId"] in answer.headers.values()
        written = json.dumps(record["input"]["inputBodyJson"])
        if operation not in _TEXTLESS:
            assert "[EMAIL_1]" in written and "[CARD_1]" in written and "[PHONE_1]" in written
        if ITEMS[0] in json.dumps(answer.text):
            assert "[EMAIL_1]" in json.dumps(record["output"]["outputBodyJson"])
    assert len(records(running)) == len(REQUESTS[operation]) and not records(running, OTHER)
    disk = disk_bytes(luthier_home)
    assert not [item for item in ITEMS if item.encode() in disk]
    remove_records(running.service.objects, ONE, days=0, most_bytes=1 << 40)
    assert not records(running)
    assert b"[EMAIL_1]" not in disk_bytes(luthier_home / "objects")


def test_streams_are_recorded_like_whole_responses(running: Running) -> None:
    on(running, redact=False)
    for operation, requests in REQUESTS.items():
        for path, body in requests:
            if "stream" in path or body.get("stream"):
                assert running.ask(path, body).status_code == 200, operation
    for record in records(running):
        text = json.dumps(record["output"]["outputBodyJson"])
        assert TEXT in text, record["operation"]
        assert "chunk" not in text and "delta" not in text


def test_lines_of_batches_are_captured(running: Running) -> None:
    on(running)
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
    files = running.service.openai.files
    file = files.add(ONE, [json.dumps(line).encode() + b"\n"], "b.jsonl", "batch")
    body = {"input_file_id": file.id, "endpoint": "/v1/chat/completions"}
    answer = running.ask("/v1/batches", {**body, "completion_window": "24h"})
    assert answer.status_code == 200
    assert running.service.openai.batches.run_once()
    (record,) = records(running)
    assert record["operation"] == "openai.chat.completions.create"
    assert "[EMAIL_1]" in json.dumps(record["output"]) and ITEMS[0] not in json.dumps(record)


def test_capture_is_off_by_default(running: Running) -> None:
    running.chat()
    assert not records(running)


def test_search_of_vector_stores_is_not_captured(running: Running) -> None:
    on(running)
    assert running.ask("/v1/vector_stores/x/search", {"query": TEXT}).status_code == 404
    assert not records(running)


def test_share_of_requests(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    on(running, share=0.25)
    values = iter([0.1, 0.9, 0.3, 0.2])
    monkeypatch.setattr("random.random", lambda: next(values))
    for _ in range(4):
        running.chat()
    assert len(records(running)) == 2


def test_failed_request_has_an_error_code(running: Running) -> None:
    on(running)
    assert running.ask("/v1/chat/completions", CHAT | {"model": "nobody"}).status_code == 404
    (record,) = records(running)
    assert record["errorCode"] == "ResourceNotFoundException" and "output" not in record


def test_large_body_is_an_object_of_its_own(running: Running) -> None:
    on(running)
    answer = running.chat(text="many words " * 20_000)
    (record,) = records(running)
    address = record["input"]["inputBodyS3Path"]
    assert "inputBodyJson" not in record["input"]
    assert address.endswith(f"/data/{answer.headers['x-request-id']}_input.json.gz")
    bucket, _, key = address.removeprefix("s3://").partition("/")
    _, pieces = running.service.objects.open_range(ONE, bucket, key, lambda each: (0, each.size))
    assert "many words" in gzip.decompress(b"".join(pieces)).decode()


def test_oldest_records_are_deleted_beyond_the_limit_of_bytes(running: Running) -> None:
    on(running)
    ids = []
    for _ in range(2):
        ids.append(running.chat().headers["x-request-id"])
        assert [each["requestId"] for each in records(running)] == ids
    with running.service.database.read() as session:
        stored = stored_by(session, ONE)
    remove_records(running.service.objects, ONE, days=30, most_bytes=stored - 1)
    assert [each["requestId"] for each in records(running)] == ids[1:]


def test_full_queue_drops_and_counts(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    on(running)
    monkeypatch.setattr(captures, "QUEUE_BYTES", 1000)
    for _ in range(3):
        running.chat()
    assert len(records(running)) == 1
    metrics = running.http.get("/metrics").text
    assert 'luthier_capture_records{kind="dropped"} 2.0' in metrics
    assert 'luthier_capture_records{kind="written"} 1.0' in metrics


def test_full_disk_keeps_records_waiting(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    on(running)
    with monkeypatch.context() as patch:
        patch.setattr("luthier.server.stores.object_files.free_bytes", lambda folder: 0)
        running.chat()
        assert not records(running)
        running.chat()
    assert len(records(running)) == 2


def test_metadata_of_invoke_model_is_a_header(running: Running) -> None:
    on(running)
    headers = {"X-Amzn-Bedrock-Request-Metadata": '{"team": "sales"}'}
    assert running.ask("/model/tiny/invoke", {"prompt": TEXT}, **headers).status_code == 200
    assert records(running)[0]["requestMetadata"] == {"team": "sales"}


def test_phone_recognized_once_is_replaced_everywhere(running: Running) -> None:
    on(running)
    running.chat(text="Call (0)20 7946 0958? My number is 020 7946 0958. Repeat: 020 7946 0958")
    assert "7946 0958. Repeat" not in json.dumps(records(running))


def test_expiry_keeps_objects_of_clients(running: Running) -> None:
    on(running)
    running.chat(text="many words " * 20_000)
    (record,) = records(running)
    bucket, _, body = record["input"]["inputBodyS3Path"].removeprefix("s3://").partition("/")
    folder = body.rpartition("/data/")[0]
    objects = running.service.objects
    copied = [f"{folder}/20260101_abc.json.gz", f"{folder}/data/aws_input.json.gz"]
    for key in copied:
        with objects.begin(ONE) as file:
            file.write(b"copied from AWS")
            objects.put(ONE, bucket, key, file.finish(), ObjectMetadata())
    assert remove_records(objects, ONE, days=0, most_bytes=0) == 2
    assert not records(running)
    for key in copied:
        objects.head(ONE, bucket, key)
    with pytest.raises(ObjectRefused):
        objects.head(ONE, bucket, body)


def test_records_in_a_deleted_bucket_expire(running: Running) -> None:
    on(running)
    running.chat()
    records(running)
    with running.service.database.read() as session:
        (row,) = session.query(CapturedRequest)
    running.service.objects.delete(ONE, row.bucket, [row.key])
    running.service.objects.delete_bucket(ONE, row.bucket)
    remove_records(running.service.objects, ONE, days=0, most_bytes=0)
    assert not records(running)


def test_body_that_no_database_stores_drops_only_its_record(running: Running) -> None:
    on(running)
    key = {"Authorization": f"Bearer {running.key()}"}
    running.http.post("/model/tiny/invoke", content=rb'{"prompt": "\ud800"}', headers=key)
    running.chat()
    assert len(records(running)) == 1


def test_model_name_is_not_redacted(running: Running) -> None:
    on(running)
    arn = "arn:aws:bedrock:us-east-1:000000000000:custom-model-deployment/4111111111111111"
    running.ask("/v1/chat/completions", CHAT | {"model": arn})
    assert records(running)[0]["modelId"] == arn


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/responses", {"model": "tiny", "input": TEXT, "store": False, "stream": True}),
        ("/model/tiny/converse-stream", CONVERSE),
    ],
)
def test_broken_stream_is_a_failed_request(
    running: Running, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    def broken(stored_id: str, request: Any) -> Stream:
        events: SimpleQueue[Any] = SimpleQueue()
        events.put(TokenChunk(0, TEXT))
        events.put(InferenceFailed("ModelError", "The model failed."))
        return Stream(events, 5, 1)

    on(running)
    monkeypatch.setattr(running.service.pool, "submit", broken)
    assert running.ask(path, body).status_code == 200
    (record,) = records(running)
    assert record["errorCode"] == "ModelErrorException"
    assert "[EMAIL_1]" in json.dumps(record["output"])
