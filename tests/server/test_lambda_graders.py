"""Reinforcement fine-tuning with boto3 and local graders in place of Lambda functions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from luthier_server import BASE, ONE, Served, home_with_tiny, until

from luthier.errors import RecipeError
from luthier.graders import LambdaFunction

VOWELS = """
def lambda_handler(event, context):
    scored = []
    for each in event:
        said = each["messages"][-1]["content"]
        assert each["metadata"]["reference_answer"] == each["reference_answer"]
        score = sum(letter in "aeiou" for letter in said) / (1 + len(said))
        scored.append({"id": each["id"], "aggregate_reward_score": score, "metrics_list": []})
    return scored
"""
RAISES = """
def lambda_handler(event, context):
    if any(each["metadata"]["reference_answer"] == "5" for each in event):
        raise ValueError("five is odd")
    return [{"id": each["id"], "aggregate_reward_score": 1.0} for each in event]
"""
HANGS = """
def lambda_handler(event, context):
    while True: pass
"""
NONSENSE = """
def lambda_handler(event, context):
    return [{"id": each["id"], "aggregate_reward_score": "very good"} for each in event]
"""
FAILURES = {
    "raises": ("r.jsonl:6:", "grader `raises` raised ValueError: five is odd", "Fix the function"),
    "hangs": ("r.jsonl:1:", "grader `hangs` did not end within 0.5 s", "raise its `seconds`"),
    "nonsense": ("r.jsonl:1:", "grader `nonsense` raised ValueError", "aggregate_reward_score"),
}


def can_isolate() -> bool:
    try:
        LambdaFunction(source=VOWELS).check()
    except RecipeError:
        return False
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_isolate(), reason="needs namespaces of the kernel"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("functions")
    made = Served(home_with_tiny(tmp_path_factory.mktemp("service"), tiny_model_folder))
    for name, source in (("vowels", VOWELS), ("raises", RAISES), ("nonsense", NONSENSE)):
        (folder / f"{name}.py").write_text(source)
        made.options += ["--grader", f"{name}={folder / name}.py"]
    table = f'method = "lambda"\nname = "hangs"\nseconds = 0.5\nsource = """{HANGS}"""\n'
    (folder / "hangs.toml").write_text(table)
    made.options += ["--grader", f"hangs={folder / 'hangs.toml'}"]
    made.start()
    s3 = made.client("s3")
    s3.create_bucket(Bucket="training")
    rows = [{"messages": [{"role": "user", "content": f"Say {n}"}], "reference_answer": str(n)}
            for n in range(12)]  # fmt: skip
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    s3.put_object(Bucket="training", Key="r.jsonl", Body=body)
    yield made
    made.end()


def ended(server: Served, name: str) -> dict[str, Any]:
    """Submit the job ``name`` with the grader ``name`` and return the job when it ends."""
    bedrock = server.client("bedrock")
    function = f"arn:aws:lambda:us-east-1:{ONE}:function:{name}"
    settings = {"epochCount": 1, "batchSize": 16, "trainingSamplePerPrompt": 2,
                "inferenceMaxTokens": 8, "learningRate": 1e-4}  # fmt: skip
    bedrock.create_model_customization_job(
        jobName=name, customModelName=f"{name}-model", roleArn=f"arn:aws:iam::{ONE}:role/x",
        baseModelIdentifier=BASE, customizationType="REINFORCEMENT_FINE_TUNING",
        trainingDataConfig={"s3Uri": "s3://training/r.jsonl"},
        outputDataConfig={"s3Uri": f"s3://training/{name}/"},
        customizationConfig={"rftConfig": {
            "graderConfig": {"lambdaGrader": {"lambdaArn": function}}, "hyperParameters": settings,
        }},
    )  # fmt: skip

    def over() -> dict[str, Any] | None:
        found: dict[str, Any] = bedrock.get_model_customization_job(jobIdentifier=name)
        return None if found["status"] == "InProgress" else found

    found: dict[str, Any] = until(over)
    return found


def test_lambda_grader_rewards_are_in_metrics(server: Served) -> None:
    job = ended(server, "vowels")
    assert job["status"] == "Completed", job.get("failureMessage")
    assert job["hyperParameters"] == {
        "epochCount": "1",
        "batchSize": "16",
        "learningRate": "0.0001",
    }
    s3 = server.client("s3")
    keys = [o["Key"] for o in s3.list_objects_v2(Bucket="training", Prefix="vowels/")["Contents"]]
    (key,) = [each for each in keys if each.endswith("step_wise_training_metrics.csv")]
    text = s3.get_object(Bucket="training", Key=key)["Body"].read().decode()
    (line,) = csv.DictReader(io.StringIO(text))
    assert 0 < float(line["reward_mean"]) < 1 and float(line["completions"]) == 24
    assert line["ungraded"] == "0"
    models = server.client("bedrock").list_custom_models()["modelSummaries"]
    assert [each["modelStatus"] for each in models] == ["Active"]


@pytest.mark.parametrize("name", FAILURES)
def test_failing_lambda_grader_fails_job(server: Served, name: str) -> None:
    job = ended(server, name)
    assert job["status"] == "Failed" and "outputModelArn" not in job
    for part in FAILURES[name]:
        assert part in job["failureMessage"], job["failureMessage"]
    assert "s3://training/r.jsonl" in job["failureMessage"]
