"""``luthier serve`` on an encrypted store: all of it works, and nothing is on the disk in plain."""

from __future__ import annotations

import base64
import json
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from luthier_server import KEYS, ONE, Served, home_with_tiny, until

from luthier.encryption import keys, memory

CANARY = "zanzibar-canary-7731"
pytestmark = pytest.mark.slow


def holding(home: Path, text: str = CANARY) -> list[str]:
    """Files below ``home`` that hold ``text`` in plain."""
    found = []
    for path in home.rglob("*"):
        try:
            if path.is_file() and text.encode() in path.read_bytes():
                found.append(str(path.relative_to(home)))
        except FileNotFoundError:
            continue
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    home = home_with_tiny(tmp_path_factory.mktemp("encrypted"), tiny_model_folder)
    file = tmp_path_factory.mktemp("elsewhere") / "key"
    file.write_text(key)
    file.chmod(0o600)
    made = Served(home)
    made.options = ["--encryption-key", str(file)]
    made.own = {keys.ENVIRONMENT: key}
    made.start()
    yield made
    made.end()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        shutil.rmtree(memory.memory())


@pytest.fixture(scope="module")
def rows(server: Served) -> str:
    s3 = server.client("s3")
    s3.create_bucket(Bucket="data")
    lines = [{"prompt": f"{CANARY} {n}?", "completion": f"it is {n}, {CANARY}."} for n in range(16)]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    s3.put_object(Bucket="data", Key="rows.jsonl", Body=body)
    assert s3.get_object(Bucket="data", Key="rows.jsonl")["Body"].read() == body
    part = s3.get_object(Bucket="data", Key="rows.jsonl", Range="bytes=2-21")["Body"].read()
    assert part == body[2:22]
    return "s3://data/rows.jsonl"


def ended(server: Served, name: str) -> dict[str, Any]:
    """The job when it has ended; all the while nothing of the rows may be on the disk."""

    def look() -> Any:
        assert holding(server.home) == []
        job = server.ask("GET", f"/api/v1/jobs/{name}")[1]
        return job if job["state"] in ("Completed", "Failed", "Stopped") else None

    job: dict[str, Any] = until(look)
    assert job["state"] == "Completed", job["failure"]
    return job


def submit(server: Served, name: str, rows: str, **more: Any) -> None:
    settings = {"training": {"max_steps": 6, "batch_size": 4}, **more.pop("settings", {})}
    asked = {
        "name": name,
        "model_name": name,
        "base": "tiny",
        "training": [rows],
        "settings": settings,
    }
    status, body = server.ask("POST", "/api/v1/jobs", {**asked, **more})
    assert status == 201, body


def test_large_objects_in_parts_come_back_whole(server: Served) -> None:
    s3 = server.client("s3")
    s3.create_bucket(Bucket="parts")
    parts = [(CANARY.encode() * 300_000)[: (5 << 20) + 13], CANARY.encode() * 9]
    upload = s3.create_multipart_upload(Bucket="parts", Key="big")["UploadId"]
    where: dict[str, Any] = {"Bucket": "parts", "Key": "big", "UploadId": upload}
    tags = [
        s3.upload_part(**where, PartNumber=n, Body=part)["ETag"] for n, part in enumerate(parts, 1)
    ]
    assert holding(server.home) == []
    values = [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]
    s3.complete_multipart_upload(**where, MultipartUpload={"Parts": values})
    s3.copy_object(Bucket="parts", Key="copy", CopySource="parts/big")
    whole = b"".join(parts)
    for key in ("big", "copy"):
        assert s3.get_object(Bucket="parts", Key=key)["Body"].read() == whole
        for start, end in (
            (0, 0),
            (65_535, 65_536),
            (5 << 20, (5 << 20) + 30),
            (len(whole) - 9, len(whole) - 1),
        ):
            part = s3.get_object(Bucket="parts", Key=key, Range=f"bytes={start}-{end}")[
                "Body"
            ].read()
            assert part == whole[start : end + 1]
    assert holding(server.home) == []


def test_a_job_survives_kills_and_its_model_answers(server: Served, rows: str) -> None:
    submit(server, "tuned", rows, settings={"training": {"max_steps": 60, "batch_size": 4}})
    until(lambda: server.ask("GET", "/api/v1/jobs/tuned")[1]["details"].get("progress"))
    server.kill()
    server.start()
    job = ended(server, "tuned")
    weights = list(server.home.glob(f"models/custom/*/job-{job['id']}/*.safetensors"))
    assert [path.read_bytes()[:8] for path in weights] == [b"luthier\0"]
    body = server.ask("GET", "/api/v1/models/tuned")[1]
    answer = chat(server, body["arn"])
    assert answer == chat(server, body["arn"])


def chat(server: Served, arn: str) -> str:
    bedrock = server.client("bedrock")
    name = f"d{time.monotonic_ns()}"
    deployment = bedrock.create_custom_model_deployment(modelDeploymentName=name, modelArn=arn)
    made = deployment["customModelDeploymentArn"]
    asked = {"customModelDeploymentIdentifier": made}
    until(lambda: bedrock.get_custom_model_deployment(**asked)["status"] == "Active")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"])
    messages: Any = [{"role": "user", "content": "number 3?"}]
    answer = client.chat.completions.create(
        model=made, messages=messages, max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content is not None
    return answer.choices[0].message.content


def test_whole_networks_are_encrypted_and_served_too(server: Served, rows: str) -> None:
    submit(server, "whole", rows, settings={"adaptation": {"method": "full"}})
    job = ended(server, "whole")
    (weights,) = server.home.glob(f"models/custom/*/job-{job['id']}/model.safetensors")
    assert weights.read_bytes()[:8] == b"luthier\0"
    chat(server, server.ask("GET", "/api/v1/models/whole")[1]["arn"])
    # By processes of their own, which are handed the keys.
    status, body = server.ask("POST", "/api/v1/inspections", {"training": rows, "base": "tiny"})
    assert status == 200, body
    status, body = server.ask("POST", "/api/v1/estimates", {"training": rows, "base": "whole"})
    assert status == 200, body


def test_a_model_from_outside_is_encrypted_and_answers(
    server: Served, tiny_model_folder: Path
) -> None:
    s3, bedrock = server.client("s3"), server.client("bedrock")
    s3.create_bucket(Bucket="outside")
    for path in tiny_model_folder.iterdir():
        s3.put_object(Bucket="outside", Key=f"tiny/{path.name}", Body=path.read_bytes())
    source = {"s3DataSource": {"s3Uri": "s3://outside/tiny/"}}
    arn = bedrock.create_custom_model(modelName="outside", modelSourceConfig=source)["modelArn"]

    def status() -> str:
        weights = server.home.glob("models/custom/**/*.safetensors")
        assert all(path.read_bytes()[:8] in (b"luthier\0", b"") for path in weights)
        return str(bedrock.get_custom_model(modelIdentifier=arn)["modelStatus"])

    until(lambda: status() != "Creating")
    assert status() == "Active"
    (weights,) = server.home.glob("models/custom/imported/*/model.safetensors")
    assert weights.read_bytes()[:8] == b"luthier\0"
    chat(server, arn)


def test_a_job_that_fails_keeps_a_log_that_opens_with_the_key(server: Served) -> None:
    s3 = server.client("s3")
    s3.put_object(Bucket="data", Key="bad.jsonl", Body=f'{{"prompt": "{CANARY}"}}\n'.encode() * 3)
    submit(server, "bad", "s3://data/bad.jsonl")
    until(lambda: server.ask("GET", "/api/v1/jobs/bad")[1]["state"] == "Failed")
    job = server.ask("GET", "/api/v1/jobs/bad")[1]
    log = server.home / "jobs" / f"{job['id']}.log"
    assert holding(server.home) == [] and b"sealed" in log.read_bytes()
    done = server.command("admin", "encryption", "open", str(log))
    assert "failed" in done.stdout and "DataError" in done.stdout
    wrong = server.command("admin", "encryption", "open", str(log), key="A" * 43 + "=", fails=True)
    assert "Nothing was changed" in wrong.stderr


def test_files_and_batches_are_encrypted(server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"])
    body = {"model": "tiny", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 4}
    line = {"custom_id": CANARY, "method": "POST", "url": "/v1/chat/completions", "body": body}
    text = (json.dumps(line) + "\n").encode()
    file = client.files.create(file=("in.jsonl", text), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    until(lambda: client.batches.retrieve(batch.id).status == "completed")
    done = client.batches.retrieve(batch.id)
    assert CANARY in client.files.content(str(done.output_file_id)).text
    assert client.files.content(file.id).content == text
    assert holding(server.home) == []


def test_evals_are_encrypted(server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"])
    check: Any = {"type": "string_check", "name": "same", "input": "{{item.a}}", "operation": "eq"}
    made = client.evals.create(
        data_source_config={"type": "custom", "item_schema": {"type": "object"}},
        testing_criteria=[{**check, "reference": CANARY}],
    )
    content: Any = {"type": "file_content", "content": [{"item": {"a": CANARY}}]}
    run = client.evals.runs.create(made.id, data_source={"type": "jsonl", "source": content})
    until(lambda: client.evals.runs.retrieve(run.id, eval_id=made.id).status == "completed")
    (row,) = client.evals.runs.output_items.list(run.id, eval_id=made.id)
    assert row.status == "pass" and row.datasource_item == {"a": CANARY}
    assert holding(server.home) == []


def test_nothing_of_it_stays_in_memory_either(server: Served) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(server.home))
        patch.setenv(keys.ENVIRONMENT, server.own[keys.ENVIRONMENT])
        assert holding(memory.memory()) == []


def test_the_key_is_in_no_file_log_or_command_line(server: Served) -> None:
    assert holding(server.home, server.own[keys.ENVIRONMENT]) == []


@pytest.mark.parametrize(("key", "reason"), [("", "is encrypted"), ("A" * 43 + "=", "not the one")])
def test_a_server_without_the_key_does_not_start(server: Served, key: str, reason: str) -> None:
    done = server.command("serve", "--port", "0", key=key, fails=True)
    assert reason in done.stderr


def test_a_key_is_changed_between_two_starts(server: Served, rows: str, tmp_path: Path) -> None:
    server.end()
    new = base64.b64encode(secrets.token_bytes(32)).decode()
    (tmp_path / "new").write_text(new)
    (tmp_path / "new").chmod(0o600)
    server.command("admin", "encryption", "rotate", str(tmp_path / "new"))
    server.command("serve", "--port", "0", fails=True)
    server.own[keys.ENVIRONMENT] = new
    Path(server.options[1]).write_text(new)
    server.start()
    text = server.client("s3").get_object(Bucket="data", Key="rows.jsonl")["Body"].read()
    assert CANARY.encode() in text
