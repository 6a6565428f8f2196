"""Evaluation jobs by unmodified boto3 against ``luthier serve``; answers held against the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from answers import check_answer
from botocore.exceptions import ClientError
from luthier_server import BASE, ONE, OTHER, Served, home_with_tiny, until

from luthier.api.bedrock.evaluation_tasks import JobParts, JobTask, converse_members
from luthier.api.http.messages import Caller, Fault
from luthier.chat_models.base import Failure
from luthier.evaluation.robustness import perturbations, word_error_rate
from luthier.graders.rubrics import BEDROCK_METRICS, FAULTS, RUBRICS
from luthier.limits import ServerLimits
from luthier.store.evaluations import EvaluationRun

ROLE = "arn:aws:iam::000000000000:role/any"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(home_with_tiny(tmp_path_factory.mktemp("service"), tiny_model_folder))
    made.start()
    made.client("s3").create_bucket(Bucket="evals")
    yield made
    made.end()


@pytest.fixture(scope="module")
def bedrock(server: Served) -> Any:
    return checked(server, ONE)


def checked(server: Served, account: str) -> Any:
    client = server.client("bedrock", account, tries=1)
    client.meta.events.register("before-parse.bedrock.*", check_answer)
    return client


def upload(server: Served, name: str, rows: Sequence[Any]) -> str:
    text = "".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in rows)
    server.client("s3").put_object(Bucket="evals", Key=name, Body=text.encode())
    return f"s3://evals/{name}"


def data(
    uri: str | None, *metrics: str, task: str = "QuestionAndAnswer", name: str = "mine"
) -> Any:
    location = {"datasetLocation": {"s3Uri": uri}} if uri else {}
    return {"taskType": task, "dataset": {"name": name, **location}, "metricNames": list(metrics)}


def members(name: str, *sets: Any, judge: str | None = None, **further: Any) -> dict[str, Any]:
    automated: dict[str, Any] = {"datasetMetricConfigs": list(sets)}
    if judge:
        models = [{"modelIdentifier": judge}]
        automated["evaluatorModelConfig"] = {"bedrockEvaluatorModels": models}
    model = {"modelIdentifier": BASE, "inferenceParams": '{"inferenceConfig": {"maxTokens": 4}}'}
    return {
        "jobName": name,
        "roleArn": ROLE,
        "evaluationConfig": {"automated": automated},
        "inferenceConfig": {"models": [{"bedrockModel": model}]},
        "outputDataConfig": {"s3Uri": "s3://evals/out/"},
        **further,
    }


def ended(bedrock: Any, arn: str) -> Any:
    def job() -> Any:
        return bedrock.get_evaluation_job(jobIdentifier=arn)

    until(lambda: job()["status"] != "InProgress")
    return job()


def results(server: Served, job: Any, model: str, task: str, name: str = "mine") -> list[Any]:
    prefix = (
        f"out/{job['jobName']}/{job['jobArn'].rpartition('/')[2]}/models/{model}/taskTypes/{task}/"
        f"datasets/{name}/"
    )
    s3 = server.client("s3")
    (found,) = s3.list_objects_v2(Bucket="evals", Prefix=prefix)["Contents"]
    assert found["Key"].endswith("_output.jsonl")
    text = s3.get_object(Bucket="evals", Key=found["Key"])["Body"].read().decode()
    return [json.loads(line) for line in text.splitlines()]


def test_answers_are_measured_and_written_where_bedrock_writes_them(
    server: Served, bedrock: Any
) -> None:
    rows = [{"prompt": f"What is {n}?", "referenceResponse": f"It is {n}.", "category": "numbers"}
            for n in range(3)]  # fmt: skip
    uri = upload(server, "rows.jsonl", rows)
    asked = members(
        "first",
        data(uri, "Builtin.Accuracy", "Builtin.Robustness"),
        data(uri, "Builtin.Robustness", task="Generation", name="again"),
        jobDescription="a first one",
        clientRequestToken="token-1",
        jobTags=[{"key": "team", "value": "bikes"}],
    )
    arn = bedrock.create_evaluation_job(**asked)["jobArn"]
    assert bedrock.create_evaluation_job(**asked)["jobArn"] == arn
    job = ended(bedrock, arn)
    assert job["status"] == "Completed", job
    assert (job["jobType"], job["applicationType"]) == ("Automated", "ModelEvaluation")
    for name in ("jobDescription", "roleArn", "evaluationConfig", "inferenceConfig"):
        assert job[name] == asked[name]
    lines = results(server, job, BASE, "QuestionAndAnswer")
    assert [line["inputRecord"] for line in lines] == rows
    runtime = server.client("bedrock-runtime")
    for line in lines:
        scores = {
            each["metricName"]: each["result"]
            for each in line["automatedEvaluationResult"]["scores"]
        }
        assert set(scores) == {"Accuracy", "Robustness"}
        assert all(0 <= score <= 1 for score in scores.values())
        turns = [{"role": "user", "content": [{"text": line["inputRecord"]["prompt"]}]}]
        direct = runtime.converse(
            modelId=BASE, messages=turns, inferenceConfig={"maxTokens": 4, "temperature": 0}
        )
        text = direct["output"]["message"]["content"][0]["text"]
        assert line["modelResponses"] == [{"response": text, "modelIdentifier": BASE}]
    again = results(server, job, BASE, "Generation", "again")
    assert [each["automatedEvaluationResult"]["scores"][0]["metricName"] for each in again] == [
        "Robustness"
    ] * 3
    tags = bedrock.list_tags_for_resource(resourceARN=arn)["tags"]
    assert tags == [{"key": "team", "value": "bikes"}]
    (summary,) = bedrock.list_evaluation_jobs(nameContains="first")["jobSummaries"]
    assert summary["evaluationTaskTypes"] == ["QuestionAndAnswer", "Generation"]
    assert summary["modelIdentifiers"] == [BASE]
    assert not bedrock.list_evaluation_jobs(statusEquals="Failed", nameContains="first")[
        "jobSummaries"
    ]
    with pytest.raises(ClientError, match="The provided job name is currently in use"):
        bedrock.create_evaluation_job(**{**asked, "clientRequestToken": "token-2"})


def test_a_judge_grades_answers_that_come_with_the_rows(server: Served, bedrock: Any) -> None:
    rows = [
        {"prompt": "Hello", "modelResponses": [{"response": "Hi", "modelIdentifier": "my-app"}]}
    ]
    uri = upload(server, "answers.jsonl", rows)
    names = ["Builtin.Correctness", "Builtin.Refusal"]
    asked = members("judged", data(uri, *names, task="Custom"), judge=BASE)
    source = {"precomputedInferenceSource": {"inferenceSourceIdentifier": "my-app"}}
    asked["inferenceConfig"] = {"models": [source]}
    arn = bedrock.create_evaluation_job(**asked)["jobArn"]
    job = ended(bedrock, arn)
    assert job["status"] == "Completed", job
    (line,) = results(server, job, "my-app", "Custom")
    assert line["modelResponses"] == rows[0]["modelResponses"]
    scores = line["automatedEvaluationResult"]["scores"]
    assert [each["metricName"] for each in scores] == names
    for each in scores:
        # A model of random numbers says no score; what it said stands there.
        assert each["result"] is None or 0 <= each["result"] <= 1
        (detail,) = each["evaluatorDetails"]
        assert detail["modelIdentifier"] == BASE and detail["explanation"]


def test_rows_that_cannot_be_evaluated_fail_the_job(server: Served, bedrock: Any) -> None:
    for number, (row, said) in enumerate(
        (
            ("{", "no JSON"),
            ({"referenceResponse": "a"}, "needs a text 'prompt'"),
            ({"prompt": "a"}, "mine, row 1: it needs a 'referenceResponse'"),
            ({"prompt": "a", "referenceResponse": 3}, "has to be a text"),
            (" ", "no rows"),
        )
    ):
        uri = upload(server, f"bad-{number}.jsonl", [row])
        arn = bedrock.create_evaluation_job(
            **members(f"bad-{number}", data(uri, "Builtin.Accuracy"))
        )
        job = ended(bedrock, arn["jobArn"])
        assert job["status"] == "Failed" and said in job["failureMessages"][0], job


def test_jobs_are_stopped_and_deleted_by_their_account(server: Served, bedrock: Any) -> None:
    rows = [{"prompt": f"What is {n}?", "referenceResponse": "a"} for n in range(500)]
    uri = upload(server, "many.jsonl", rows)
    arn = bedrock.create_evaluation_job(**members("long", data(uri, "Builtin.Robustness")))[
        "jobArn"
    ]
    other = checked(server, OTHER)
    missing = f"{arn[:-12]}{'a' * 12}"
    for client, identifier in ((other, arn), (bedrock, missing)):
        for attempt in (client.get_evaluation_job, client.stop_evaluation_job):
            with pytest.raises(client.exceptions.ResourceNotFoundException):
                attempt(jobIdentifier=identifier)
    assert not other.list_evaluation_jobs()["jobSummaries"]
    early = bedrock.batch_delete_evaluation_job(jobIdentifiers=[arn, missing])
    assert [each["code"] for each in early["errors"]] == [
        "ConflictException", "ResourceNotFoundException",
    ]  # fmt: skip
    bedrock.stop_evaluation_job(jobIdentifier=arn)
    bedrock.stop_evaluation_job(jobIdentifier=arn)
    assert bedrock.get_evaluation_job(jobIdentifier=arn)["status"] == "Stopped"
    gone = bedrock.batch_delete_evaluation_job(jobIdentifiers=[arn])
    assert gone["evaluationJobs"] == [{"jobIdentifier": arn, "jobStatus": "Deleting"}]
    with pytest.raises(bedrock.exceptions.ResourceNotFoundException):
        bedrock.get_evaluation_job(jobIdentifier=arn)
    # Nothing of it stands in OpenAI's list of evals.
    assert server.ask("GET", "/v1/evals")[1]["data"] == []


def test_what_cannot_be_had_is_said_when_the_job_is_made(server: Served, bedrock: Any) -> None:
    uri = upload(server, "good.jsonl", [{"prompt": "a", "referenceResponse": "b"}])
    fine = data(uri, "Builtin.Accuracy")
    human = {"human": {"datasetMetricConfigs": [fine]}}
    source = {"precomputedInferenceSource": {"inferenceSourceIdentifier": "x"}}
    for wrong, said in (
        (members("w", data(None, "Builtin.Accuracy", name="Builtin.BoolQ")), "AWS's own"),
        (members("w", data(uri, "Builtin.Toxicity")), "classifier of toxic language"),
        (members("w", data(uri, "Builtin.Correctness")), "no metric Builtin.Correctness without"),
        (members("w", data(uri, "Builtin.Accuracy"), judge=BASE), "no metric Builtin.Accuracy with"),
        (members("w", data(uri, "Builtin.Accuracy", task="Summarization")), "BERTScore"),
        (members("w", data(uri, "Builtin.Accuracy", "Builtin.Accuracy")), "named twice"),
        (members("w", data("s3://evals/none.jsonl", "Builtin.Accuracy")), "none.jsonl"),
        (members("w", fine, outputDataConfig={"s3Uri": "s3://nowhere/"}), "nowhere"),
        ({**members("w", fine), "evaluationConfig": human}, "no people here"),
        ({**members("w", fine), "applicationType": "RagEvaluation"}, "no knowledge bases"),
        ({**members("w", fine), "inferenceConfig": {"models": [source, source]}}, "one model"),
        (members("w", data(uri, "Builtin.Accuracy"), judge="nobody.judge"), "nobody.judge"),
        ({**members("w", data(uri, "Builtin.Robustness")), "inferenceConfig": {"models": [source]}},
         "needs bedrockModel"),
    ):  # fmt: skip
        with pytest.raises(ClientError, match=said):
            bedrock.create_evaluation_job(**wrong)
    unknown = members("w", fine)
    unknown["inferenceConfig"]["models"][0]["bedrockModel"]["modelIdentifier"] = "nobody.model"
    with pytest.raises(bedrock.exceptions.ResourceNotFoundException):
        bedrock.create_evaluation_job(**unknown)


class Judges:
    """Judges that say what they are told to, by the rubric they are asked about."""

    def __init__(self, said: dict[str, str | Failure]) -> None:
        self.said = said

    def scorer(self, model: str) -> Any:
        raise AssertionError

    def writer(self, judge: Any, sampling: Any, schema: Any = None) -> Any:
        (name,) = (name for name, text in RUBRICS.items() if text == judge.rubric)
        return lambda asked: [self.said.get(name, "Fine.\nScore: 10") for _ in asked]


def test_scores_of_a_judge() -> None:
    class Ids:
        def resource(self, identifier: str) -> str:
            return identifier

        def stored_id(self, account: str, identifier: str) -> str:
            return identifier

    nothing: Any = None
    said = {"correctness": "Half.\nScore: 1", "relevance": Failure("judge.failed", "it is gone")}
    parts = JobParts(
        nothing,
        nothing,
        Ids(),
        lambda *asked: None,
        Judges(said),
        ServerLimits(),  # type: ignore[arg-type]
    )
    asked = members("job", data("s3://evals/a", *BEDROCK_METRICS, task="Custom"), judge="judge")
    source = {"precomputedInferenceSource": {"inferenceSourceIdentifier": "app"}}
    asked["inferenceConfig"] = {"models": [source]}

    class Run(EvaluationRun):
        __abstract__ = True
        request = asked

    task = JobTask(parts, Run, Caller("1", "u", ()))  # type: ignore[arg-type]
    record = {"prompt": "a", "modelResponses": [{"response": "b", "modelIdentifier": "app"}]}
    graded = task.grade(Caller("1", "u", ()), 1, (0, record))
    found = {
        each["metricName"]: each["result"]
        for each in graded.record["line"]["automatedEvaluationResult"]["scores"]
    }
    assert graded.status == "error" and graded.criteria["Builtin.Relevance"] == "error"
    assert (found.pop("Builtin.Correctness"), found.pop("Builtin.Relevance")) == (0.0, None)
    # What a good answer has not is counted by how much of it there is.
    assert found == {name: float(name not in FAULTS) for name in found}


def test_parameters_of_the_model_that_is_asked() -> None:
    assert converse_members(None) == {"inferenceConfig": {"temperature": 0, "maxTokens": 512}}
    given = {"inferenceConfig": {"topP": 0.5, "temperature": 0.3}}
    assert converse_members(json.dumps(given))["inferenceConfig"] == {
        "temperature": 0.3, "maxTokens": 512, "topP": 0.5,
    }  # fmt: skip
    native = {"temperature": 0.2, "top_p": 0.5, "max_gen_len": 9}
    assert converse_members(json.dumps(native))["inferenceConfig"] == {
        "temperature": 0.2, "maxTokens": 9, "topP": 0.5,
    }  # fmt: skip
    for wrong in (
        "[]",
        "{",
        '{"temperature": 7}',
        '{"heat": 1}',
        '{"inferenceConfig": {"topP": 3}}',
    ):
        with pytest.raises(Fault):
            converse_members(wrong)


def test_prompts_are_written_in_other_ways_that_mean_the_same() -> None:
    prompt = "What is the Capital of France, and how many people live there today?"
    found = perturbations(prompt)
    assert found == perturbations(prompt) and len(found) == 4
    assert prompt.lower() in found and prompt not in found
    assert any(each.split() != prompt.split() and each.lower() == prompt.lower() for each in found)
    assert all(0.5 < len(each) / len(prompt) < 1.5 for each in found)
    assert perturbations("123") == []
    assert word_error_rate("a b c", "a b c") == 0
    assert word_error_rate("a x c d", "a b c d") == 0.25
    assert word_error_rate("a b c d e f", "") == 1
