"""``luthier serve`` on a full or read-only disk: error messages, and recovery."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from botocore.exceptions import ClientError
from luthier_server import BASE, KEYS, ONE, Served, home_with_tiny
from small_disk import Disk

PIECE = b"x" * 4_000_000
ROWS = b'{"prompt": "Hello?", "completion": "Hello."}\n' * 8


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    made.folder.mkdir()
    if not made.mount("size=64m"):
        pytest.skip("this user may not mount a file system")
    yield made
    made.unmount()


@pytest.fixture
def server(disk: Disk, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(home_with_tiny(disk.folder, tiny_model_folder))
    made.start("--no-workers")
    yield made
    made.end()


def everything(server: Served, number: int) -> dict[str, tuple[int, str]]:
    """Make a change on each API. Return the status and message of each response."""
    record = {}
    s3 = server.client("s3", tries=1)
    calls = {
        "put": lambda: s3.put_object(Bucket="rows", Key=f"new-{number}", Body=ROWS),
        "delete": lambda: s3.delete_object(Bucket="rows", Key="rows.jsonl.copy"),
        "tag": lambda: server.client("bedrock", tries=1).create_model_customization_job(
            jobName=f"j-{number}", customModelName=f"m-{number}", baseModelIdentifier=BASE,
            roleArn=f"arn:aws:iam::{ONE}:role/x", outputDataConfig={"s3Uri": "s3://rows/out/"},
            trainingDataConfig={"s3Uri": "s3://rows/rows.jsonl"},
        ),
    }  # fmt: skip
    for name, call in calls.items():
        try:
            record[name] = (call()["ResponseMetadata"]["HTTPStatusCode"], "")
        except ClientError as error:
            record[name] = (error.response["ResponseMetadata"]["HTTPStatusCode"], str(error))
    body = {"name": f"n-{number}", "model_name": f"n-{number}", "base": BASE,
            "training": ["s3://rows/rows.jsonl"]}  # fmt: skip
    status, answer = server.ask("POST", "/api/v1/jobs", body)
    record["native"] = (status, json.dumps(answer))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"], max_retries=0)
    try:
        client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        record["file"] = (200, "")
    except openai.APIStatusError as error:
        record["file"] = (error.status_code, str(error))
    return record


def test_full_disk_is_reported_without_data_loss(server: Served, disk: Disk) -> None:
    s3 = server.client("s3", tries=1)
    s3.create_bucket(Bucket="rows")
    s3.put_object(Bucket="rows", Key="rows.jsonl", Body=ROWS)
    taken: list[str] = []
    refused = ""
    while not refused and len(taken) < 40:
        try:
            s3.put_object(Bucket="rows", Key=f"piece-{len(taken)}", Body=PIECE)
            taken.append(f"piece-{len(taken)}")
        except ClientError as error:
            refused = str(error)
    assert taken and "ServiceUnavailable" in refused and "disk is full" in refused
    # Objects leave room for the database: other requests succeed, and objects can be deleted.
    assert server.ask("POST", "/api/v1/jobs", {
        "name": "first", "model_name": "first", "base": BASE, "training": ["s3://rows/rows.jsonl"],
    })[0] == 201  # fmt: skip
    s3.delete_object(Bucket="rows", Key=taken.pop())
    disk.fill()
    answer = everything(server, 1)
    assert {status for status, _ in answer.values()} <= {200, 201, 204, 503}
    assert answer["put"][0] == answer["file"][0] == 503
    assert server.ask("GET", "/api/v1/jobs")[0] == 200
    disk.free()
    answer = everything(server, 2)
    assert {status for status, _ in answer.values()} <= {200, 201, 204}, answer
    for key in taken:
        assert s3.get_object(Bucket="rows", Key=key)["Body"].read() == PIECE
    found = sorted(each.name for each in disk.folder.rglob(".tmp-*"))
    assert found == []
