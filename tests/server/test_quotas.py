"""Quotas and usage with real clients on a real server."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import openai
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from forked_commands import run
from served import served

from luthier.files import write_json
from luthier.limits import ServerLimits
from luthier.models.manifest import MANIFEST
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.tables import usage
from luthier.server.tables.accounts import set_quota
from luthier.server.tables.database import now
from luthier.server.tables.storage import stored_by

ACCOUNT = "000000000000"
MIB = 1 << 20
ROLE = "arn:aws:iam::000000000000:role/x"


class Server:
    def __init__(self, service: Service, url: str) -> None:
        assert service.issued is not None
        self.service, self.url, self.keys = service, url, service.issued
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=self.keys.api_key)

    def aws(self, service: str) -> Any:
        return boto3.client(
            service, endpoint_url=self.url, region_name="us-east-1",
            aws_access_key_id=self.keys.access_key, aws_secret_access_key=self.keys.secret,
            config=Config(retries={"total_max_attempts": 3}),
        )  # fmt: skip

    def quota(self, **values: int | None) -> None:
        with self.service.database.write() as session:
            set_quota(session, ACCOUNT, **values)

    def stored(self) -> int:
        with self.service.database.read() as session:
            return stored_by(session, ACCOUNT)

    def ask(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        headers = {"Authorization": f"Bearer {self.keys.api_key}"}
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            return str(answer.read().decode())

    def luthier(self, *arguments: str) -> str:
        database = ("--database", self.service.database.url)
        done = run("admin", *arguments, *database, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def server(database_url: str, luthier_home: Path, tiny_model_folder: Path) -> Iterator[Server]:
    base = luthier_home / "models" / "base" / "tiny"
    shutil.copytree(tiny_model_folder, base)
    about = {"id": "tiny", "kind": "causal_lm", "created": "2026-01-01T00:00:00+00:00"}
    write_json(base / MANIFEST, about)
    limits = ServerLimits(stored_bytes=20 * MIB)
    service = Service(Settings(database=database_url, run_jobs=False, limits=limits))
    with served(service.application) as url:
        service.start()
        service.objects.create_bucket(ACCOUNT, "rows")
        yield Server(service, url)
    service.close()


def refusal(call: Any, *arguments: Any, **members: Any) -> tuple[str, int, int]:
    """Return code, status and number of retries of a request that fails."""
    with pytest.raises(ClientError) as refused:
        call(*arguments, **members)
    about = refused.value.response
    answer = about["ResponseMetadata"]
    return about["Error"]["Code"], answer["HTTPStatusCode"], answer["RetryAttempts"]


QUOTA = ("QuotaExceeded", 403, 0)


def test_object_storage_quota_error_matches_ceph(server: Server) -> None:
    s3 = server.aws("s3")
    s3.put_object(Bucket="rows", Key="a", Body=b"x" * (15 * MIB))
    # Larger than the connection buffers: rejected by its length before the upload.
    assert refusal(s3.put_object, Bucket="rows", Key="b", Body=b"x" * (40 * MIB)) == QUOTA
    assert refusal(s3.put_object, Bucket="rows", Key="b", Body=b"x" * (5 * MIB + 1)) == QUOTA
    s3.put_object(Bucket="rows", Key="a", Body=b"x" * (20 * MIB))
    copy = {"Bucket": "rows", "Key": "a"}
    assert refusal(s3.copy_object, Bucket="rows", Key="b", CopySource=copy) == QUOTA
    assert refusal(s3.create_multipart_upload, Bucket="rows", Key="b") == QUOTA
    s3.delete_object(Bucket="rows", Key="a")
    upload = {"Bucket": "rows", "Key": "b"}
    upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
    s3.upload_part(**upload, PartNumber=1, Body=b"x" * (12 * MIB))
    assert refusal(s3.upload_part, **upload, PartNumber=2, Body=b"x" * (12 * MIB)) == QUOTA
    s3.upload_part(**upload, PartNumber=1, Body=b"x" * (16 * MIB))
    s3.abort_multipart_upload(**upload)
    assert server.stored() == 0
    objects = server.service.objects.files.folder
    assert not [path for path in objects.rglob("*") if path.is_file()]


def batch_of(server: Server, models: list[str]) -> Any:
    """Run a batch with a line for each model and return the ended batch."""
    lines = [
        {
            "custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": model, "messages": [{"role": "user", "content": "Hello?"}],
                     "max_tokens": 2, "temperature": 0},
        }
        for number, model in enumerate(models)
    ]  # fmt: skip
    text = "".join(json.dumps(each) + "\n" for each in lines).encode()
    file = server.openai.files.create(file=("lines.jsonl", text), purpose="batch")
    batch = server.openai.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    deadline = time.monotonic() + 60
    while batch.status in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        batch = server.openai.batches.retrieve(batch.id)
    return batch


def test_batch_over_storage_quota_leaves_no_output_files(server: Server) -> None:
    server.quota(stored_bytes=700)  # room for the rows, and none for the answers
    batch = batch_of(server, ["luthier.tiny", "none"])
    assert batch.status == "failed"
    assert batch.errors.data[0].code == "insufficient_quota"
    assert batch.output_file_id is batch.error_file_id is None
    assert [file.purpose for file in server.openai.files.list().data] == ["batch"]
    server.quota(stored_bytes=1)
    # A batch without room for output is rejected at creation.
    with pytest.raises(openai.RateLimitError, match="stored_bytes"):
        server.openai.batches.create(
            input_file_id=batch.input_file_id, endpoint="/v1/chat/completions",
            completion_window="24h",
        )  # fmt: skip


def test_bedrock_rejects_jobs_and_imports_over_quota(server: Server) -> None:
    s3, bedrock = server.aws("s3"), server.aws("bedrock")
    s3.put_object(Bucket="rows", Key="a.jsonl", Body=b'{"prompt": "a", "completion": "b"}\n' * 9)
    s3.put_object(Bucket="rows", Key="model/config.json", Body=b"{}")
    job = {
        "jobName": "j", "customModelName": "m", "roleArn": ROLE, "hyperParameters": {},
        "baseModelIdentifier": "luthier.tiny", "trainingDataConfig": {"s3Uri": "s3://rows/a.jsonl"},
        "outputDataConfig": {"s3Uri": "s3://rows/out/"},
    }  # fmt: skip
    source = {"s3DataSource": {"s3Uri": "s3://rows/model/"}}
    create = bedrock.create_model_customization_job
    server.quota(stored_bytes=10)
    assert refusal(create, **job) == ("ServiceQuotaExceededException", 400, 0)
    server.quota(stored_bytes=None, custom_models=1)
    model = {"roleArn": ROLE, "modelSourceConfig": source}
    bedrock.create_custom_model(modelName="first", **model)
    code = refusal(bedrock.create_custom_model, modelName="second", **model)[0]
    assert code == "ServiceQuotaExceededException"
    server.quota(custom_models=None)
    assert create(**job)["jobArn"]


@pytest.mark.slow
def test_usage_is_recorded_by_day_and_model(server: Server) -> None:
    body = b"x" * 1000
    server.aws("s3").put_object(Bucket="rows", Key="a", Body=body)
    assert server.aws("s3").get_object(Bucket="rows", Key="a")["Body"].read() == body
    before = used(server, "", requests=2)
    assert before["bytes_in"] == before["bytes_out"] == before["stored_bytes"] == 1000
    talk: Any = [{"role": "user", "content": "Hello?"}]
    chat = server.openai.chat.completions.create
    plain = chat(model="luthier.tiny", messages=talk, max_tokens=4, n=2).usage
    assert plain is not None
    stream = chat(
        model="luthier.tiny", messages=talk, max_tokens=4, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    streamed = [chunk.usage for chunk in stream if chunk.usage is not None][-1]
    batch = batch_of(server, ["luthier.tiny", "none"])
    answer = json.loads(server.openai.files.content(str(batch.output_file_id)).read())
    answered = answer["response"]["body"]["usage"]
    # A rejected line has no model.
    found = used(server, "tiny", requests=2)
    totals = (plain.model_dump(), streamed.model_dump(), answered)
    assert found["prompt_tokens"] == sum(each["prompt_tokens"] for each in totals)
    assert found["generated_tokens"] == sum(each["completion_tokens"] for each in totals)
    status, reply = server.ask("/api/v1/usage/days?from=2020-02-01&to=2020-01-01")
    assert (status, reply["error"]["code"]) == (400, "Validation")
    printed = server.luthier("usage", "--account", ACCOUNT, "--csv").splitlines()
    assert printed[0].startswith("day,account,user,model,requests,prompt_tokens")
    assert len(printed) == 4


def used(server: Server, model: str, requests: int) -> dict[str, Any]:
    """Return today's usage of a model. The server counts responses after sending."""
    deadline, today = time.monotonic() + 20, now().date()
    while True:
        server.service.meter.write()
        # Read the database: a request to the service would be counted, too.
        with server.service.database.read() as session:
            rows = usage.report(session, today, today, ACCOUNT)
        if sum(row["requests"] for row in rows if row["model"] == model) >= requests:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    status, body = server.ask("/api/v1/usage/days")
    assert status == 200, body
    # Storage has no user.
    found = [each for each in body["days"] if each["model"] == model]
    assert {each["user"] for each in found if each["requests"]} == {"root"}
    totals = {
        name: sum(each[name] for each in found)
        for name, count in found[0].items()
        if isinstance(count, int | float)
    }
    assert totals["requests"] == requests
    return totals
