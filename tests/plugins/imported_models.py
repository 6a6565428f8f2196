"""Helpers for tests of imported models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier_server import ONE, Served, until

BUCKET = "models"
GREEDY = {"maxTokens": 12, "temperature": 0.0}
QUESTION = [{"role": "user", "content": [{"text": "What is the capital of France?"}]}]


def put(server: Served, folder: Path, prefix: str, **changed: bytes | None) -> str:
    """The files of ``folder`` in the bucket; ``changed`` by name, ``__`` for a dot."""
    changes = {name.replace("__", "."): content for name, content in changed.items()}
    put_into(server.client("s3"), BUCKET, folder, prefix, changes)
    return f"s3://{BUCKET}/{prefix}/"


def put_into(
    s3: Any, bucket: str, folder: Path, prefix: str, changes: Mapping[str, bytes | None]
) -> None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in changes:
            s3.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=path.read_bytes())
    for name, content in changes.items():
        if content is not None:
            s3.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)


def create(server: Served, name: str, uri: str, account: str = ONE, **members: Any) -> str:
    source = {"s3DataSource": {"s3Uri": uri}}
    bedrock = server.client("bedrock", account)
    arn: str = bedrock.create_custom_model(modelName=name, modelSourceConfig=source, **members)[
        "modelArn"
    ]
    return arn


def ended(server: Served, arn: str) -> dict[str, Any]:
    """Return the model after its status Creating."""
    found: dict[str, Any] = {}

    def done() -> bool:
        found.update(server.client("bedrock").get_custom_model(modelIdentifier=arn))
        assert found["modelStatus"] in ("Creating", "Active", "Failed")
        return bool(found["modelStatus"] != "Creating")

    until(done)
    return found


def says(server: Served, model_id: str) -> str:
    answer = server.client("bedrock-runtime").converse(
        modelId=model_id, messages=QUESTION, inferenceConfig=GREEDY
    )
    text: str = answer["output"]["message"]["content"][0]["text"]
    return text


def deployed(server: Served, name: str, model: str) -> str:
    bedrock = server.client("bedrock")
    arn: str = bedrock.create_custom_model_deployment(modelDeploymentName=name, modelArn=model)[
        "customModelDeploymentArn"
    ]
    get = bedrock.get_custom_model_deployment
    until(lambda: get(customModelDeploymentIdentifier=arn)["status"] == "Active")
    return arn


def nothing_left(home: Path) -> bool:
    """Return True if imports left only their models."""
    left = [*home.rglob(".tmp-*"), *(home / "jobs").glob("import-*")]
    return not left
