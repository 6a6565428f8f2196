"""Chat templates of imported models: they run once an administrator has approved them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from imported_models import BUCKET, ended, put
from luthier_server import Served, home_with_tiny, until

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
)
SHA256 = hashlib.sha256(TEMPLATE.encode()).hexdigest()
REFUSES = "{{ raise_exception('it ran') }}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(home_with_tiny(tmp_path_factory.mktemp("untrusted"), tiny_model_folder))
    made.start()
    made.client("s3").create_bucket(Bucket=BUCKET)
    for name, template in (("own", TEMPLATE), ("refuses", REFUSES)):
        put(made, tiny_model_folder, name, chat_template__jinja=template.encode())
    put(made, tiny_model_folder, "same")
    yield made
    made.end()


@pytest.fixture(scope="module")
def developer(server: Served) -> Any:
    """A client of a user without the administrator role."""
    server.command("admin", "users", "create", "dev", "--role", "developer")
    made = server.command("admin", "keys", "create", "dev", "--kind", "access", "--json")
    key = json.loads(made.stdout)
    return boto3.client(
        "bedrock", endpoint_url=server.url, region_name="us-east-1",
        aws_access_key_id=key["access_key_id"], aws_secret_access_key=key["secret_access_key"],
    )  # fmt: skip


def imported(server: Served, client: Any, name: str, prefix: str) -> dict[str, Any]:
    source = {"s3DataSource": {"s3Uri": f"s3://{BUCKET}/{prefix}/"}}
    arn = client.create_custom_model(modelName=name, modelSourceConfig=source)["modelArn"]
    return ended(server, arn)


def stored_id(server: Served, name: str) -> str:
    listed = json.loads(server.command("admin", "models", "list", "--json").stdout)["models"]
    return str(next(each["model"] for each in listed if each["name"] == name))


def chat(server: Served, name: str) -> Any:
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": name, "messages": messages, "max_tokens": 4, "temperature": 0}
    return server.ask("POST", "/v1/chat/completions", body)


def test_template_runs_after_approval(server: Served, developer: Any) -> None:
    assert imported(server, developer, "own", "own")["modelStatus"] == "Active"
    model = stored_id(server, "own")
    body = {"model": "own", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
    status, raw = server.ask("POST", "/v1/completions", body)
    assert status == 200, raw  # needs no template
    status, refused = chat(server, "own")
    assert status == 400
    for part in (model, SHA256, f"luthier admin models trust {model}"):
        assert part in refused["error"]["message"]
    approved = server.command("admin", "models", "trust", model, "--json")
    assert json.loads(approved.stdout) == {"model": model, "template_sha256": SHA256}
    assert chat(server, "own")[0] == 200  # without another start
    assert server.ask("POST", "/v1/completions", body)[1]["choices"] == raw["choices"]
    log = json.loads(server.command("admin", "audit", "--json").stdout)
    assert "luthier:admin.models.trust" in json.dumps(log)


@pytest.mark.slow
def test_jobs_require_and_inherit_approved_template(server: Served, developer: Any) -> None:
    found = imported(server, developer, "for-a-job", "own")
    rows = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in range(8)]
    server.client("s3").put_object(
        Bucket=BUCKET, Key="rows.jsonl", Body="\n".join(map(json.dumps, rows)).encode()
    )

    def tuned(name: str) -> dict[str, Any]:
        job = developer.create_model_customization_job(
            jobName=name, customModelName=name, roleArn="arn:aws:iam::000000000000:role/tuner",
            baseModelIdentifier=found["modelArn"], customizationType="FINE_TUNING",
            trainingDataConfig={"s3Uri": f"s3://{BUCKET}/rows.jsonl"},
            outputDataConfig={"s3Uri": f"s3://{BUCKET}/out/"},
            hyperParameters={"epochCount": "1", "batchSize": "8"},
        )["jobArn"]  # fmt: skip
        get = developer.get_model_customization_job
        until(lambda: get(jobIdentifier=job)["status"] not in ("InProgress", "Scheduled"))
        ended_job: dict[str, Any] = get(jobIdentifier=job)
        return ended_job

    refused = tuned("too-early")
    assert refused["status"] == "Failed" and SHA256 in refused["failureMessage"]
    server.command("admin", "models", "trust", stored_id(server, "for-a-job"))
    assert tuned("heir")["status"] == "Completed"
    assert chat(server, "heir")[0] == 200


@pytest.mark.slow
def test_known_templates_and_administrators_need_no_approval(
    server: Served, developer: Any
) -> None:
    assert imported(server, developer, "same", "same")["modelStatus"] == "Active"
    assert chat(server, "same")[0] == 200
    administrator = server.client("bedrock")
    assert imported(server, administrator, "trusted", "own")["modelStatus"] == "Active"
    assert chat(server, "trusted")[0] == 200


def test_import_does_not_run_unknown_template(server: Served, developer: Any) -> None:
    assert imported(server, developer, "unrun", "refuses")["modelStatus"] == "Active"
    found = imported(server, server.client("bedrock"), "run", "refuses")
    assert found["modelStatus"] == "Failed" and "it ran" in found["failureMessage"]
