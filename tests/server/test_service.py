"""``luthier serve`` as a process, with unmodified clients and ``kill -9``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from botocore.exceptions import ClientError
from luthier_server import BASE, KEYS, ONE, OTHER, Served, add_base, home_with_tiny, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(
        home_with_tiny(tmp_path_factory.mktemp("service"), tiny_model_folder), forked=False
    )
    made.start()
    yield made
    made.end()


@pytest.fixture(scope="module")
def rows(server: Served) -> str:
    s3 = server.client("s3")
    s3.create_bucket(Bucket="training")
    lines = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in range(24)]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    s3.put_object(Bucket="training", Key="rows.jsonl", Body=body)
    return "s3://training/rows.jsonl"


@pytest.fixture(scope="module")
def job(server: Served, rows: str) -> dict[str, Any]:
    """A job that was running when the server was killed and completed after the restart."""
    bedrock = server.client("bedrock")
    arn = bedrock.create_model_customization_job(
        jobName="first", customModelName="first-model", roleArn="arn:aws:iam::000000000000:role/x",
        baseModelIdentifier=BASE, trainingDataConfig={"s3Uri": rows},
        outputDataConfig={"s3Uri": "s3://training/out/"},
        hyperParameters={"epochCount": "2", "batchSize": "4"},
    )["jobArn"]  # fmt: skip
    until(lambda: server.ask("GET", "/api/v1/jobs/first")[1]["state"] == "Running")
    server.kill()
    server.forked = True  # one real start is enough
    server.start()
    bedrock = server.client("bedrock")
    asked: Callable[[], Any] = lambda: bedrock.get_model_customization_job(jobIdentifier=arn)  # noqa: E731
    until(lambda: asked()["status"] != "InProgress")
    found: dict[str, Any] = asked()
    return found


def test_job_completes_after_killed_server(server: Served, job: dict[str, Any]) -> None:
    assert job["status"] == "Completed", job.get("failureMessage")
    keys = [o["Key"] for o in server.client("s3").list_objects_v2(Bucket="training")["Contents"]]
    folder = f"out/model-customization-job-{job['jobArn'].rpartition('/')[2]}/training_artifacts"
    assert f"{folder}/step_wise_training_metrics.csv" in keys
    bedrock = server.client("bedrock")
    deployment = bedrock.create_custom_model_deployment(
        modelDeploymentName="first-deployment", modelArn=job["outputModelArn"]
    )["customModelDeploymentArn"]
    until(
        lambda: bedrock.get_custom_model_deployment(
            customModelDeploymentIdentifier=deployment
        )["status"] == "Active"
    )  # fmt: skip
    runtime = server.client("bedrock-runtime")
    message = [{"role": "user", "content": [{"text": "number 3?"}]}]
    settings = {"maxTokens": 8, "temperature": 0.0}
    whole = runtime.converse(modelId=deployment, messages=message, inferenceConfig=settings)
    text = whole["output"]["message"]["content"][0]["text"]
    streamed = runtime.converse_stream(
        modelId=deployment, messages=message, inferenceConfig=settings
    )
    pieces = [each["contentBlockDelta"]["delta"]["text"] for each in streamed["stream"]
              if "contentBlockDelta" in each]  # fmt: skip
    assert "".join(pieces) == text
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"])
    chat = client.chat.completions.create(
        model=deployment, messages=[{"role": "user", "content": "number 3?"}], max_tokens=8,
        temperature=0,
    )  # fmt: skip
    assert chat.choices[0].message.content == text
    body = {"messages": [{"role": "user", "content": "number 3?"}], "max_tokens": 8,
            "temperature": 0}  # fmt: skip
    invoked = runtime.invoke_model(modelId=deployment, body=json.dumps(body))
    answer = json.loads(invoked["body"].read())
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["completion_tokens"] == whole["usage"]["outputTokens"]


def test_native_api_returns_events_and_certificate(server: Served, job: dict[str, Any]) -> None:
    assert server.ask("GET", "/api/v1/whoami")[1]["account"] == ONE
    status, events = server.ask("GET", "/api/v1/jobs/first/events")
    kinds = [line.removeprefix("event: ") for line in events.split("\n") if "event: " in line]
    assert (status, kinds[0], kinds[-1]) == (200, "state", "state")
    assert "metrics" in kinds
    status, body = server.ask("GET", "/api/v1/models/first-model/certificate")
    assert status == 200 and body["lineage"][-1] == job["baseModelArn"]
    record = body["certificate"]["record"]
    assert record["files"] and record["recipe"]["base"] == "tiny"
    assert body["certificate"]["curves"]["train"] and body["certificate"]["compute"]["flops"]
    listed = server.ask("GET", "/api/v1/jobs?limit=1")[1]
    assert [each["name"] for each in listed["jobs"]] == ["first"]
    assert server.ask("POST", "/api/v1/jobs/first/stop")[0] == 409
    assert server.ask("GET", "/api/v1/jobs/none")[0] == 404
    assert "createJob" in json.dumps(server.ask("GET", "/api/v1/openapi.json")[1])


def test_native_job_accepts_recipe_settings(server: Served, rows: str) -> None:
    settings = {"training": {"max_steps": 2}, "adaptation": {"method": "bitfit"}}
    asked = {"name": "second", "model_name": "second-model", "base": "tiny", "training": [rows]}
    asked["settings"] = settings
    status, body = server.ask("POST", "/api/v1/jobs", asked)
    assert (status, body.get("recipe", body)["adaptation"]["method"]) == (201, "bitfit")
    assert server.ask("POST", "/api/v1/jobs/second/stop")[0] == 200
    wrong = [
        ({"settings": {"training": {"epochs": -1}}}, "epochs"),
        ({"base": "nobody.knows"}, "nobody.knows"),
        ({"training": ["s3://training/none.jsonl"]}, "none.jsonl"),
        ({"training": ["file:///etc/passwd"]}, ""),
        ({"name": "second"}, ""),
    ]
    for change, word in wrong:
        fresh = {**asked, "name": "third", "model_name": "third-model"}
        status, body = server.ask("POST", "/api/v1/jobs", {**fresh, **change})
        assert 400 <= status < 410 and word in json.dumps(body["error"]), body


@pytest.mark.slow
def test_inspection_and_estimate_through_server(server: Served, rows: str) -> None:
    status, body = server.ask("POST", "/api/v1/inspections", {"training": rows, "base": "tiny"})
    assert status == 200, body
    assert body["verdict"] in ("passed", "warnings")
    assert body["report"]["rows"]["train"] == 24 and "/tmp" not in json.dumps(
        body["report"]["files"]
    )
    planned = {"training": rows, "base": "tiny", "settings": {"training": {"max_steps": 3}}}
    status, body = server.ask("POST", "/api/v1/estimates", planned)
    assert status == 200, body
    assert body["estimate"]["steps"]


def test_resources_are_hidden_from_foreign_account(server: Served, job: dict[str, Any]) -> None:
    bedrock = server.client("bedrock", OTHER)
    assert bedrock.list_model_customization_jobs()["modelCustomizationJobSummaries"] == []
    never = job["outputModelArn"][:-12] + "zzzzzzzzzzzz"
    calls = []
    for arn in (job["outputModelArn"], never):
        with pytest.raises(ClientError) as refused:
            bedrock.get_custom_model(modelIdentifier=arn)
        calls.append(str(refused.value).replace(arn, "ARN"))
    assert calls[0] == calls[1] and "ResourceNotFound" in calls[0]
    with pytest.raises(ClientError, match="NoSuchBucket"):
        server.client("s3", OTHER).list_objects_v2(Bucket="training")
    assert server.ask("GET", "/api/v1/jobs/first", account=OTHER)[0] == 404


def test_log_and_audit_contain_no_secrets(server: Served, job: dict[str, Any]) -> None:
    def luthier(*arguments: str) -> Any:
        return json.loads(server.command(*arguments, "--json").stdout)

    entries = json.dumps(luthier("admin", "audit"))
    assert "CreateModelCustomizationJob" in entries and "s3:PutObject" in entries
    log = (server.home / "server.log").read_text()
    assert '"operation": "CreateModelCustomizationJob"' in log
    for keys in KEYS.values():
        for name in ("secret_access_key", "api_key"):
            assert keys[name] not in log and keys[name] not in entries


@pytest.mark.slow  # another server takes a lease over after a minute
def test_file_search_after_killed_ingestion(
    server: Served, family_folder: Callable[[str], Path]
) -> None:
    add_base(server.home, "all-minilm-l6-v2", "encoder", family_folder("bert"))

    def client() -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"])

    text = "# Leave\n\nEverybody has thirty days of leave.\n\n" + "Parking is free. " * 3_000
    files = [("handbook.md", text.encode())] * 8
    store = client().vector_stores.create(name="handbook")
    batch = client().vector_stores.file_batches.create(
        store.id,
        file_ids=[client().files.create(file=each, purpose="assistants").id for each in files],
    )

    def counts() -> Any:
        found = client().vector_stores.file_batches.retrieve(batch.id, vector_store_id=store.id)
        return found.file_counts

    until(lambda: counts().completed >= 1)
    server.kill()
    server.start()
    assert 1 <= counts().completed < len(files)
    until(lambda: counts().completed == len(files))
    found = client().vector_stores.search(store.id, query="days of leave", max_num_results=50)
    assert {each.filename for each in found.data} == {"handbook.md"}
    tool: Any = {"type": "file_search", "vector_store_ids": [store.id]}
    reply = client().responses.create(model="tiny", input="Leave?", tools=[tool])
    assert [each.type for each in reply.output] == ["file_search_call", "message"]
