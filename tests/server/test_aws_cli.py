"""The AWS CLI against ``luthier serve``: commands, output and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from luthier_server import BASE, KEYS, ONE, Served, home_with_tiny, until

AWS = Path(sys.executable).with_name("aws")
ROLE = "arn:aws:iam::000000000000:role/x"
ASK = ("--messages", json.dumps([{"role": "user", "content": [{"text": "number 3?"}]}]),
       "--inference-config", "maxTokens=8,temperature=0")  # fmt: skip
BODY = json.dumps(
    {"messages": [{"role": "user", "content": "number 3?"}], "max_tokens": 8, "temperature": 0}
)
pytestmark = pytest.mark.skipif(not AWS.exists(), reason="awscli is not installed")


class Cli:
    """The ``aws`` command in an empty home folder, with the keys of an account."""

    def __init__(self, server: Served, folder: Path) -> None:
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self.variables = {
            **kept, "HOME": str(folder), "AWS_ENDPOINT_URL": server.url, "AWS_PAGER": "",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": KEYS[ONE]["access_key_id"],
            "AWS_SECRET_ACCESS_KEY": KEYS[ONE]["secret_access_key"], "AWS_MAX_ATTEMPTS": "1",
        }  # fmt: skip

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [AWS, *arguments], cwd=self.folder, env={**self.variables, **variables},
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def says(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def gives(self, *arguments: str) -> Any:
        return json.loads(self.says(*arguments))

    def refused(self, *arguments: str, **variables: str) -> str:
        done = self.run(*arguments, **variables)
        assert done.returncode != 0, done.stdout
        return done.stderr.strip()


def cli_of(server: Served, folder: Path) -> Cli:
    lines = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in range(24)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    folder.joinpath("rows.jsonl").write_text(text, encoding="utf-8")
    cli = Cli(server, folder)
    cli.says("s3", "mb", "s3://training")
    cli.says("s3", "cp", "rows.jsonl", "s3://training/rows.jsonl", "--no-progress")
    return cli


@pytest.fixture(scope="module")
def cli(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    return cli_of(server, tmp_path_factory.mktemp("here"))


def job(name: str, **changes: str) -> list[str]:
    """Return the command that submits a job, with changed options."""
    options = {
        "job-name": name, "custom-model-name": f"{name}-model", "role-arn": ROLE,
        "base-model-identifier": BASE, "training-data-config": "s3Uri=s3://training/rows.jsonl",
        "output-data-config": "s3Uri=s3://training/out/",
        "hyper-parameters": "epochCount=2,batchSize=4", **changes,
    }  # fmt: skip
    given = [part for key, value in options.items() for part in (f"--{key}", value)]
    return ["bedrock", "create-model-customization-job", *given]


@pytest.mark.slow
def test_aws_cli_copies_objects(cli: Cli) -> None:
    big = os.urandom(9 * 2**20)  # more than the CLI sends in one part
    cli.folder.joinpath("big.bin").write_bytes(big)
    cli.folder.joinpath("é").mkdir()
    cli.folder.joinpath("é", "a b+c.bin").write_bytes(b"x")
    cli.says("s3", "cp", "big.bin", "s3://training/parts/big.bin", "--no-progress")
    cli.says("s3", "sync", "é", "s3://training/é", "--no-progress")
    cli.says("s3", "cp", "s3://training/parts/big.bin", "back.bin", "--no-progress")
    assert cli.folder.joinpath("back.bin").read_bytes() == big
    cli.says("s3", "rm", "s3://training/parts", "--recursive")
    listed = cli.says("s3", "ls", "--recursive", "s3://training").splitlines()
    assert [line.split(maxsplit=3)[3] for line in listed] == ["rows.jsonl", "é/a b+c.bin"]
    assert cli.says("s3", "ls").endswith("training")


@pytest.mark.slow
def test_presigned_v2_url_error_names_s3v4(cli: Cli) -> None:
    old = cli.says("s3", "presign", "s3://training/rows.jsonl")
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(old, timeout=10)
    assert (refused.value.code, b"s3v4" in refused.value.read()) == (403, True)
    cli.folder.joinpath(".aws").mkdir()
    setting = "[default]\ns3 =\n  signature_version = s3v4\n"
    cli.folder.joinpath(".aws", "config").write_text(setting, encoding="utf-8")
    with urllib.request.urlopen(
        cli.says("s3", "presign", "s3://training/rows.jsonl"), timeout=10
    ) as answer:
        assert answer.read() == cli.folder.joinpath("rows.jsonl").read_bytes()


@pytest.mark.slow
def test_aws_cli_lists_and_stops_job(cli: Cli) -> None:
    arn = cli.gives(*job("queued"))["jobArn"]
    shown = cli.gives("bedrock", "get-model-customization-job", "--job-identifier", "queued")
    assert (shown["jobArn"], shown["status"]) == (arn, "InProgress")
    assert shown["hyperParameters"] == {"epochCount": "2", "batchSize": "4"}
    cli.says("bedrock", "stop-model-customization-job", "--job-identifier", arn)
    query = "modelCustomizationJobSummaries[].[jobName,status]"
    asked = ("bedrock", "list-model-customization-jobs", "--status-equals", "Stopped")
    assert cli.says(*asked, "--query", query, "--output", "text").split() == ["queued", "Stopped"]


@pytest.mark.slow
def test_aws_cli_reports_aws_error_codes(cli: Cli) -> None:
    create = "when calling the CreateModelCustomizationJob operation: "
    said = cli.refused(*job("wrong", **{"hyper-parameters": "epochCount=0"}))
    assert f"(ValidationException) {create}" in said and "epochCount" in said
    said = cli.refused(*job("wrong", **{"training-data-config": "s3Uri=s3://training/none.jsonl"}))
    assert f"(ValidationException) {create}" in said and "none.jsonl" in said
    shown = ("bedrock", "get-custom-model", "--model-identifier", "none")
    assert "(ResourceNotFoundException) when calling the GetCustomModel" in cli.refused(*shown)
    said = cli.refused(*shown, AWS_SECRET_ACCESS_KEY="another")
    assert "(InvalidSignatureException)" in said and "Secret Access Key" in said
    assert "(BucketNotEmpty)" in cli.refused("s3", "rb", "s3://training")
    assert "(404)" in cli.refused("s3", "cp", "s3://training/none", "none")


@pytest.mark.slow
def test_aws_cli_trains_and_deploys_model(tmp_path: Path, tiny_model_folder: Path) -> None:
    server = Served(home_with_tiny(tmp_path / "service", tiny_model_folder))
    server.start()
    (tmp_path / "here").mkdir()
    cli = cli_of(server, tmp_path / "here")
    cli.says(*job("first"))
    shown = ("bedrock", "get-model-customization-job", "--job-identifier", "first")
    until(lambda: cli.gives(*shown)["status"] != "InProgress")
    result = cli.gives(*shown)
    assert result["status"] == "Completed", result.get("failureMessage")
    assert "validation_artifacts" not in cli.says("s3", "ls", "--recursive", "s3://training/out/")
    cli.says("s3", "cp", "--recursive", "s3://training/out/", "out", "--no-progress")
    (metrics,) = cli.folder.glob("out/*/training_artifacts/step_wise_training_metrics.csv")
    assert metrics.read_text(encoding="utf-8").startswith("step_number,epoch_number,training_loss")
    model = result["outputModelArn"]
    arn = cli.gives(
        "bedrock", "create-custom-model-deployment", "--model-deployment-name", "d",
        "--model-arn", model,
    )["customModelDeploymentArn"]  # fmt: skip
    deployment = ("--custom-model-deployment-identifier", arn)
    shown = ("bedrock", "get-custom-model-deployment", *deployment)
    until(lambda: cli.gives(*shown)["status"] == "Active")
    answered = cli.gives("bedrock-runtime", "converse", "--model-id", arn, *ASK)
    asked = ("bedrock-runtime", "invoke-model", "--model-id", arn, "--body", BODY)
    cli.says(*asked, "--content-type", "application/json", "answer.json")
    answer = json.loads(cli.folder.joinpath("answer.json").read_text(encoding="utf-8"))
    text = answered["output"]["message"]["content"][0]["text"]
    assert answer["choices"][0]["message"]["content"] == text
    assert "on-demand throughput" in cli.refused(
        "bedrock-runtime", "converse", "--model-id", model, *ASK
    )
    gone = ("bedrock", "delete-custom-model", "--model-identifier", model)
    assert "(ConflictException)" in cli.refused(*gone)
    cli.says("bedrock", "delete-custom-model-deployment", *deployment)
    cli.says(*gone)
    assert cli.gives("bedrock", "list-custom-models")["modelSummaries"] == []
    server.end()
