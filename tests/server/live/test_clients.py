"""Capture through ``luthier serve`` with unmodified clients, the CLI and ``kill -9``."""

from __future__ import annotations

import gzip
import json
import re
import time
from typing import Any

import openai
import pytest
from botocore.exceptions import ClientError
from luthier_server import BASE, KEYS, ONE, OTHER, Served, until

MESSAGES = [{"role": "user", "content": [{"text": "Hello, I am ann.meyer@acme-corp.io"}]}]
CONFIG = {"maxTokens": 4, "temperature": 0.0}


def records(server: Served, bucket: str, account: str = ONE) -> list[dict[str, Any]]:
    """Return all records of a bucket, read with boto3."""
    s3 = server.client("s3", account)
    found = []
    for each in s3.list_objects_v2(Bucket=bucket).get("Contents", ()):
        if each["Key"].endswith("Z_", 0, -24):
            body = s3.get_object(Bucket=bucket, Key=each["Key"])["Body"].read()
            found += [json.loads(line) for line in gzip.decompress(body).splitlines()]
    return sorted(found, key=lambda record: record["timestamp"])


def test_logging_configuration_of_boto3(server: Served) -> None:
    bedrock = server.client("bedrock", tries=1)
    assert "loggingConfig" not in bedrock.get_model_invocation_logging_configuration()
    cloud_watch = {"logGroupName": "g", "roleArn": f"arn:aws:iam::{ONE}:role/x"}
    for wrong, text in (
        ({"cloudWatchConfig": cloud_watch}, "no CloudWatch"),
        ({"s3Config": {"bucketName": "nowhere"}}, "bucket nowhere does not exist"),
    ):
        with pytest.raises(ClientError, match=text) as refused:
            bedrock.put_model_invocation_logging_configuration(loggingConfig=wrong)
        assert refused.value.response["Error"]["Code"] == "ValidationException"
    server.client("s3").create_bucket(Bucket="logs")
    config: dict[str, Any] = {
        "s3Config": {"bucketName": "logs", "keyPrefix": "team/a"}, "textDataDeliveryEnabled": True,
        "imageDataDeliveryEnabled": False,
    }  # fmt: skip
    bedrock.put_model_invocation_logging_configuration(loggingConfig=config)
    answer = bedrock.get_model_invocation_logging_configuration()
    assert answer["loggingConfig"] == config
    other = server.client("bedrock", OTHER).get_model_invocation_logging_configuration()
    assert "loggingConfig" not in other

    runtime = server.client("bedrock-runtime")
    metadata = {"team": "support"}
    whole = runtime.converse(
        modelId=BASE, messages=MESSAGES, inferenceConfig=CONFIG, requestMetadata=metadata
    )
    stream = runtime.converse_stream(modelId=BASE, messages=MESSAGES, inferenceConfig=CONFIG)
    assert [*stream["stream"]]
    first, second = until(lambda: (found := records(server, "logs")) and len(found) == 2 and found)
    assert first["requestId"] == whole["ResponseMetadata"]["RequestId"]
    assert (first["operation"], second["operation"]) == ("Converse", "ConverseStream")
    assert first["requestMetadata"] == metadata and "requestMetadata" not in second
    output = first["output"]["outputBodyJson"]
    assert output["output"] == whole["output"] == second["output"]["outputBodyJson"]["output"]
    assert first["output"]["outputTokenCount"] == whole["usage"]["outputTokens"]
    assert output["stopReason"] and output["usage"] and output["metrics"]
    assert "ann.meyer" not in json.dumps([first, second])
    keys = [each["Key"] for each in server.client("s3").list_objects_v2(Bucket="logs")["Contents"]]
    folder = f"team/a/AWSLogs/{ONE}/BedrockModelInvocationLogs"
    assert f"{folder}/amazon-bedrock-logs-permission-check" in keys
    pattern = (
        rf"{folder}/us-east-1/\d{{4}}/\d\d/\d\d/\d\d/\d{{8}}T\d{{9}}Z_[0-9a-f]{{16}}\.json\.gz"
    )
    assert any(re.fullmatch(pattern, key) for key in keys)
    bedrock.delete_model_invocation_logging_configuration()
    assert "loggingConfig" not in bedrock.get_model_invocation_logging_configuration()


@pytest.mark.slow
def test_killed_server_loses_at_most_the_last_second(server: Served) -> None:
    server.command("live", "capture", "on", "--share", "1", "--account", ONE)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"])
    time.sleep(1)  # the server notices the change
    answers: list[tuple[float, str]] = []
    until_killed = time.monotonic() + 3
    while time.monotonic() < until_killed:
        answer = client.chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": "Hi"}], max_tokens=2
        )
        answers.append((time.monotonic(), answer.id))
    killed = time.monotonic()
    server.kill()
    server.start("--no-workers")
    bucket = "luthier-capture"
    written = {each["output"]["outputBodyJson"]["id"] for each in records(server, bucket)}
    assert {id_ for moment, id_ in answers if moment < killed - 1} <= written
    assert written <= {id_ for _, id_ in answers}
    shown = json.loads(server.command("live", "capture", "show", "--json").stdout)
    chats = {"model": BASE, "operation": "openai.chat.completions.create", "requests": len(written)}
    assert shown["enabled"] and chats in shown["requests"]
    off = json.loads(server.command("live", "capture", "off", "--delete", "--json").stdout)
    assert off["deleted_objects"] and not records(server, bucket)
