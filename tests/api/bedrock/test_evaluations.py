"""Evaluation jobs by unmodified boto3 against ``luthier serve``; answers held against the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
from answers import check_answer
from botocore.exceptions import ClientError
from luthier_server import BASE, KEYS, ONE, OTHER, Served, home_with_tiny, until

from luthier.api.bedrock.evaluation_tasks import JobParts, JobTask, converse_members
from luthier.api.bedrock.evaluations import job_task
from luthier.api.evaluations import EvaluationRunner
from luthier.api.http.messages import Caller, Fault
from luthier.chat_models.base import Failure
from luthier.evaluation.robustness import perturbations, word_error_rate
from luthier.files import write_json
from luthier.graders.rubrics import BEDROCK_METRICS, BEDROCK_RAG_METRICS, FAULTS, RUBRICS
from luthier.limits import AccountQuotas, ServerLimits
from luthier.models.manifest import MANIFEST
from luthier.store import evaluations as store
from luthier.store import queue
from luthier.store.database import Database
from luthier.store.evaluations import EvaluationRun
from luthier.store.locations import Locations
from luthier.store.object_files import ObjectFiles

READER = "luthier.tiny-encoder"
"""A base model that writes nothing."""
ROLE = "arn:aws:iam::000000000000:role/any"
LIMITED: list[dict[str, Any]] = [
    {
        "account": ONE,
        "user": user,
        "access_key_id": f"AKIATEST{user}",
        "secret_access_key": f"secret-{user}-0123456789abcdef",
        "policies": [{"Version": "2012-10-17", "Statement": [
            {"Effect": "Allow", "Action": action, "Resource": "*"}]}],
    }
    for user, action in (("evaluator", "bedrock:*EvaluationJob*"), ("guest", "bedrock:Converse"))
]  # fmt: skip
"""Users without the right to ask models, and without those to evaluate."""


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    family_folder: Callable[[str], Path],
) -> Iterator[Served]:
    home = home_with_tiny(tmp_path_factory.mktemp("service"), tiny_model_folder)
    encoder = home / "models" / "base" / "tiny-encoder"
    shutil.copytree(family_folder("bert"), encoder)
    write_json(
        encoder / MANIFEST,
        {"id": "tiny-encoder", "kind": "encoder", "created": "2026-01-01T00:00:00+00:00"},
    )
    write_json(home / "bootstrap.json", {"principals": [*KEYS.values(), *LIMITED]})
    made = Served(home)
    made.start()
    made.client("s3").create_bucket(Bucket="evals")
    yield made
    made.end()


@pytest.fixture(scope="module")
def bedrock(server: Served) -> Any:
    return checked(server, ONE)


def checked(server: Served, account: str) -> Any:
    return with_checks(server.client("bedrock", account, tries=1))


def with_checks(client: Any) -> Any:
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
    return lines_below(server, job, f"models/{model}/taskTypes/{task}/datasets/{name}/")


def lines_below(server: Served, job: Any, folder: str) -> list[Any]:
    prefix = f"out/{job['jobName']}/{job['jobArn'].rpartition('/')[2]}/{folder}"
    s3 = server.client("s3")
    (found,) = s3.list_objects_v2(Bucket="evals", Prefix=prefix)["Contents"]
    assert found["Key"].removeprefix(prefix).count("/") == 0
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
    with pytest.raises(other.exceptions.ResourceNotFoundException):
        other.list_tags_for_resource(resourceARN=arn)
    (error,) = other.batch_delete_evaluation_job(jobIdentifiers=[arn])["errors"]
    assert error["code"] == "ResourceNotFoundException"
    run = f"/v1/evals/{arn[-12:]}/runs/{arn[-12:]}"
    assert server.ask("GET", run)[0] == 404
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
        ({**members("w", fine), "inferenceConfig": {"models": [source, source]}}, "one model"),
        (members("w", data(uri, "Builtin.Accuracy"), judge="nobody.judge"), "nobody.judge"),
        (members("w", data(uri, "Builtin.Helpfulness"), judge=READER), "tiny-encoder writes no text"),
        ({**members("w", fine), "inferenceConfig": {"models": [
            {"bedrockModel": {"modelIdentifier": READER}}]}}, "tiny-encoder writes no text"),
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
        self.read: dict[str, list[str]] = {}
        """What was to be graded, by rubric."""

    def scorer(self, model: str) -> Any:
        raise AssertionError

    def writer(self, judge: Any, sampling: Any, schema: Any = None) -> Any:
        (name,) = (name for name, text in RUBRICS.items() if text == judge.rubric)

        def write(asked: Any) -> Any:
            self.read[name] = [turns[1].content for turns in asked]
            return [self.said.get(name, "Fine.\nScore: 10") for _ in asked]

        return write


class Ids:
    """Every model is there."""

    def resource(self, identifier: str) -> str:
        return identifier

    def stored_id(self, account: str, identifier: str) -> str:
        return identifier


CALLER = Caller("1", "u", ())


def parts_with(
    judges: Any, authorize: Any = lambda *asked: None, locations: Any = None
) -> JobParts:
    nothing: Any = None
    ids: Any = Ids()
    return JobParts(locations, nothing, ids, authorize, judges, ServerLimits())


def task_of(asked: dict[str, Any], judges: Judges, **further: Any) -> JobTask:
    class Run(EvaluationRun):
        __abstract__ = True
        request = asked
        application = asked.get("applicationType")

    return job_task(parts_with(judges, **further), Run, CALLER)  # type: ignore[arg-type]


def test_scores_of_a_judge() -> None:
    judges = Judges(
        {"correctness": "Half.\nScore: 1", "relevance": Failure("judge.failed", "it is gone")}
    )
    asked = members("job", data("s3://evals/a", *BEDROCK_METRICS, task="Custom"), judge="judge")
    source = {"precomputedInferenceSource": {"inferenceSourceIdentifier": "app"}}
    asked["inferenceConfig"] = {"models": [source]}
    task = task_of(asked, judges)
    record = {"prompt": "a", "modelResponses": [{"response": "b", "modelIdentifier": "app"}]}
    graded = task.grade(CALLER, 1, (0, record))
    found = {
        each["metricName"]: each["result"]
        for each in graded.record["line"]["automatedEvaluationResult"]["scores"]
    }
    assert graded.status == "error" and graded.criteria["Builtin.Relevance"] == "error"
    assert (found.pop("Builtin.Correctness"), found.pop("Builtin.Relevance")) == (0.0, None)
    # What a good answer has not is counted by how much of it there is.
    assert found == {name: float(name not in FAULTS) for name in found}


def test_who_may_no_longer_ask_the_judge_has_no_further_row_graded() -> None:
    refused = list[str]()

    def authorize(caller: Caller, action: str, resource: str) -> None:
        if refused:
            raise Fault("AccessDenied", f"not {action} on {resource}")

    task = task_of(rag("job", data("s3://evals/a", RELEVANT), judge="judge"), Judges({}),
                   authorize=authorize)  # fmt: skip
    row = (0, turn())
    assert task.grade(CALLER, 1, row).status == "pass"
    refused.append("from now on")
    with pytest.raises(Fault, match="not bedrock:InvokeModel on judge") as fault:
        task.grade(CALLER, 2, row)
    line = task.error_row(row, fault.value).record["line"]
    assert line["error"]["errorCode"] == "AccessDenied"
    assert [each["results"] for each in line["conversationTurns"]] == [[]]


RELEVANT, COVERED = "Builtin.ContextRelevance", "Builtin.ContextCoverage"


def turn(output: dict[str, Any] | None = None, **further: Any) -> dict[str, Any]:
    """A row of a RAG system, of one turn."""
    given = output or {
        "knowledgeBaseIdentifier": "my-rag",
        "retrievedResults": {
            "retrievalResults": [{"name": "1", "content": {"text": f"passage {n}"}} for n in "ab"]
        },
    }
    texts = [{"content": [{"text": "Paris."}]}]
    prompt = {"content": [{"text": "What is the capital of France?"}]}
    row = {"prompt": prompt, "referenceResponses": texts, "output": given, **further}
    return {"conversationTurns": [row]}


def answered(text: str = "It is Paris.", **further: Any) -> dict[str, Any]:
    """The output of one that answers."""
    passages = [{"content": {"text": text}} for text in ("Paris is the capital.", "Rome is not.")]
    part = {"textResponsePart": {"text": "Paris", "span": {"start": 6, "end": 11}}}
    return {
        "text": text,
        "knowledgeBaseIdentifier": "my-rag",
        "modelIdentifier": "theirs",
        "retrievedPassages": {"retrievalResults": passages},
        "citations": [{"generatedResponsePart": part, "retrievedReferences": passages}],
        **further,
    }


def rag(
    name: str, *sets: Any, judge: str | None = BASE, generates: bool = False, **further: Any
) -> Any:
    kind = "retrieveAndGenerateSourceConfig" if generates else "retrieveSourceConfig"
    source = {"precomputedRagSourceConfig": {kind: {"ragSourceIdentifier": "my-rag"}}}
    asked = members(name, *sets, judge=judge, applicationType="RagEvaluation")
    return {**asked, "inferenceConfig": {"ragConfigs": [source]}, **further}


def rag_results(server: Served, job: Any, name: str = "mine") -> list[Any]:
    return lines_below(server, job, f"inference_configs/0/datasets/{name}/")


@pytest.mark.slow
def test_what_a_rag_system_retrieved_is_graded(server: Served, bedrock: Any) -> None:
    rows = [turn(), turn(answered())]
    uri = upload(server, "retrieved.jsonl", rows)
    asked = rag("retrieved", data(uri, RELEVANT, COVERED))
    arn = bedrock.create_evaluation_job(**asked)["jobArn"]
    job = ended(bedrock, arn)
    assert job["status"] == "Completed", job
    assert (job["jobType"], job["applicationType"]) == ("Automated", "RagEvaluation")
    assert job["inferenceConfig"] == asked["inferenceConfig"]
    for line, row in zip(rag_results(server, job), rows, strict=True):
        ((found,), (given,)) = line["conversationTurns"], row["conversationTurns"]
        assert found["output"] == given.pop("output") and found["inputRecord"] == given
        assert [each["metricName"] for each in found["results"]] == [RELEVANT, COVERED]
        for each in found["results"]:
            assert each["result"] is None or 0 <= each["result"] <= 1
            (detail,) = each["evaluatorDetails"]
            assert detail["modelIdentifier"] == BASE and detail["explanation"]
    listed = bedrock.list_evaluation_jobs(applicationTypeEquals="RagEvaluation")["jobSummaries"]
    (summary,) = (each for each in listed if each["jobName"] == "retrieved")
    assert summary["applicationType"] == "RagEvaluation"
    assert summary["evaluatorModelIdentifiers"] == [BASE] and "modelIdentifiers" not in summary
    assert summary["inferenceConfigSummary"] == {
        "ragConfigSummary": {"precomputedRagSourceIdentifiers": ["my-rag"]}
    }
    others = bedrock.list_evaluation_jobs(applicationTypeEquals="ModelEvaluation")
    assert "retrieved" not in [each["jobName"] for each in others["jobSummaries"]]


def test_what_a_rag_system_answered_is_graded() -> None:
    said: Any = {
        "groundedness": "Half.\nScore: 5",
        "citation_precision": "No.\nScore: 1",
        "helpfulness": "no score",
    }
    judges = Judges(said)
    asked = rag("job", data("s3://evals/a", *BEDROCK_RAG_METRICS), judge="judge", generates=True)
    task = task_of(asked, judges)
    record = turn(answered())
    record["conversationTurns"] += turn(answered("As I said."))["conversationTurns"]
    data_set = task.sets[0]
    assert task.problem(data_set, record) == ""
    graded = task.grade(CALLER, 1, (0, record))
    turns = graded.record["line"]["conversationTurns"]
    for each in turns:
        found = {score["metricName"]: score["result"] for score in each["results"]}
        assert [*found] == [*BEDROCK_RAG_METRICS]
        assert found.pop("Builtin.Faithfulness") == pytest.approx(4 / 9)
        assert (
            found.pop("Builtin.CitationPrecision") == 0 and found.pop("Builtin.Helpfulness") is None
        )
        assert found == {name: float(name not in FAULTS) for name in found}
    assert graded.status == "error" and graded.criteria["Builtin.Helpfulness"] == "error"
    assert graded.criteria["Builtin.Faithfulness"] == "pass"
    # Each passage that is cited is looked at by itself, with the part that cites it; of the second
    # turn, behind the first.
    assert len(judges.read["citation_precision"]) == 2
    text = judges.read["citation_precision"][1]
    assert "<passage 1>\nRome is not.\n</passage 1>" in text and "<reply>\nParis\n" in text
    assert "assistant: It is Paris.\n\nuser: What is the capital" in text
    (text,) = judges.read["groundedness"]
    assert "<passage 2>\nRome is not." in text and "<reply>\nAs I said.\n" in text
    assert "<reference>\nParis.\n" in judges.read["correctness"][0]
    explanations = turns[0]["results"][5]["evaluatorDetails"][0]["explanation"]
    assert explanations == "1. No.\nScore: 1\n\n2. No.\nScore: 1"


def test_nothing_retrieved_and_nothing_cited() -> None:
    nothing = {"retrievalResults": list[Any]()}
    empty = {"knowledgeBaseIdentifier": "my-rag", "retrievedResults": nothing}
    task = task_of(rag("job", data("s3://a/b", RELEVANT, COVERED), judge="judge"), Judges({}))
    assert task.problem(task.sets[0], turn(empty)) == ""
    line, _ = task.measure(task.sets[0], turn(empty))
    scores = line["conversationTurns"][0]["results"]
    assert [each["result"] for each in scores] == [None, 0.0]
    assert all("No passages" in each["evaluatorDetails"][0]["explanation"] for each in scores)
    names = ("Builtin.Faithfulness", "Builtin.CitationPrecision", "Builtin.CitationCoverage")
    judges = Judges({})
    task = task_of(rag("job", data("s3://a/b", *names), judge="judge", generates=True), judges)
    silent = turn(answered(citations=[], retrievedPassages=nothing))
    assert task.problem(task.sets[0], silent) == ""
    line, _ = task.measure(task.sets[0], silent)
    assert [each["result"] for each in line["conversationTurns"][0]["results"]] == [1.0, None, 1.0]
    assert "There are no passages." in judges.read["citation_coverage"][0]


def test_rows_of_rag_systems_that_cannot_be_graded(server: Served, bedrock: Any) -> None:
    first = "conversationTurns[0]"
    bare = answered()
    plain = {name: bare[name] for name in ("text", "knowledgeBaseIdentifier")}
    retrieved: Any = turn()["conversationTurns"][0]
    for generates, row, said in (
        (False, [], "it must be an object"),
        (False, {"prompt": "a"}, "conversationTurns is required: a list of turns"),
        (False, {"conversationTurns": []}, "1 or more items"),
        (False, {"conversationTurns": [{"prompt": "a", "output": plain}]},
         f'{first}.prompt must be an object: as {{"content"'),
        (False, {"conversationTurns": [{"prompt": retrieved["prompt"]}]},
         f"{first}.output is required: what your system retrieved"),
        (False, turn({"retrievedResults": {"retrievalResults": []}}),
         "knowledgeBaseIdentifier is required: the ragSourceIdentifier"),
        (False, turn({**plain, "knowledgeBaseIdentifier": "other"}), "of the job, my-rag"),
        (False, turn(plain), "retrievedResults.retrievalResults is required"),
        (False, turn({**plain, "retrievedResults": {"retrievalResults": [{"content": {}}]}}),
         f"{first}.output.retrievedResults.retrievalResults[0].content.text is required"),
        (False, {"conversationTurns": [retrieved] * 2}, "one turn a row"),
        (False, turn(referenceResponses=[]), f"referenceResponses is required, as {COVERED}"),
        (False, turn(prompt={"content": [{"text": " "}]}), "prompt has no text"),
        (True, turn(), f"{first}.output.text is required: the answer"),
        (True, turn(plain), "retrievedPassages.retrievalResults is required"),
        (True, turn(answered(citations=None)), "[] where nothing is cited"),
        (True, turn(answered(citations=[{**bare["citations"][0], "retrievedReferences":
            bare["citations"][0]["retrievedReferences"] * 51}])), "more than 100 passages"),
        (True, {"conversationTurns": turn(bare)["conversationTurns"] * 6}, "at most 5 items"),
        (True, turn({**bare, **{f"key {n}": n for n in range(1000)}}), "1,000 are read."),
    ):  # fmt: skip
        names = [*BEDROCK_RAG_METRICS] if generates else [RELEVANT, COVERED]
        asked = rag("job", data("s3://evals/a", *names), judge="judge", generates=generates)
        task = task_of(asked, Judges({}))
        problem = task.problem(task.sets[0], row)
        assert said in problem and problem.endswith("."), (row, problem)
    good = upload(server, "rag-good.jsonl", [turn()])
    bad = upload(server, "rag-bad.jsonl", [turn(), "", turn(plain), json.dumps("x" * 2_000_000)])
    sets = (data(good, RELEVANT), data(bad, RELEVANT, name="theirs"))
    job = ended(bedrock, bedrock.create_evaluation_job(**rag("rag-bad", *sets))["jobArn"])
    assert job["status"] == "Failed"
    (message,) = job["failureMessages"]
    # By the line of the file, whatever stands before it.
    assert "theirs, row 3: conversationTurns[0].output.retrievedResults" in message
    assert "theirs, row 4: it has more than 262,144 bytes" in message


def test_rag_jobs_that_cannot_be_had(server: Served, bedrock: Any) -> None:
    uri = upload(server, "rag.jsonl", [turn()])
    fine = data(uri, RELEVANT)
    retrieve = {"knowledgeBaseId": "ABCDEFGHIJ", "knowledgeBaseRetrievalConfiguration": {
        "vectorSearchConfiguration": {"numberOfResults": 3}}}  # fmt: skip
    base = {"ragConfigs": [{"knowledgeBaseConfig": {"retrieveConfig": retrieve}}]}
    human = {"human": {"datasetMetricConfigs": [fine]}}
    for wrong, said in (
        (rag("w", fine, inferenceConfig=base), "name it in precomputedRagSourceConfig"),
        (rag("w", fine, judge=None), "name it in evaluatorModelConfig"),
        (rag("w", fine, evaluationConfig=human), "no people here"),
        (rag("w", fine, applicationType="ModelEvaluation"), "it is RagEvaluation"),
        (members("w", fine, judge=BASE, applicationType="RagEvaluation"), "it is ModelEvaluation"),
        (rag("w", data(uri, "Builtin.Accuracy")), "of retrieve-only jobs"),
        (rag("w", data(uri, RELEVANT), generates=True), "of retrieve-and-generate jobs"),
        (rag("w", data(uri, RELEVANT, RELEVANT)), "named twice"),
        (rag("w", data(uri, RELEVANT, name="..")), "cannot be called so"),
        (rag("w", data(None, RELEVANT)), "AWS's own"),
        (rag("w", fine, judge="nobody.judge"), "nobody.judge"),
    ):
        with pytest.raises(ClientError, match=said):
            bedrock.create_evaluation_job(**wrong)
    # What is evaluated follows from the configuration.
    asked = rag("implied", data(uri, COVERED))
    del asked["applicationType"]
    job = ended(bedrock, bedrock.create_evaluation_job(**asked)["jobArn"])
    assert (job["status"], job["applicationType"]) == ("Completed", "RagEvaluation")


def test_who_lacks_a_right_evaluates_nothing(server: Served, bedrock: Any) -> None:
    uri = upload(server, "rights.jsonl", [turn()])
    asked = rag("rights", data(uri, COVERED))
    arn = bedrock.create_evaluation_job(**asked)["jobArn"]
    evaluator, guest = (
        with_checks(
            boto3.client(
                "bedrock", endpoint_url=server.url, region_name="us-east-1",
                aws_access_key_id=each["access_key_id"],
                aws_secret_access_key=each["secret_access_key"],
            )
        )
        for each in LIMITED
    )  # fmt: skip
    assert evaluator.get_evaluation_job(jobIdentifier=arn)["jobName"] == "rights"
    asked["jobName"] = "others"
    for client, attempt, named in (
        (evaluator, lambda: evaluator.create_evaluation_job(**asked), "bedrock:InvokeModel"),
        (guest, lambda: guest.create_evaluation_job(**asked), "CreateEvaluationJob"),
        (guest, lambda: guest.get_evaluation_job(jobIdentifier=arn), "GetEvaluationJob"),
        (guest, lambda: guest.list_evaluation_jobs(), "ListEvaluationJobs"),
        (guest, lambda: guest.stop_evaluation_job(jobIdentifier=arn), "StopEvaluationJob"),
        (guest, lambda: guest.batch_delete_evaluation_job(jobIdentifiers=[arn]), "BatchDelete"),
    ):
        with pytest.raises(client.exceptions.AccessDeniedException, match=named):
            attempt()
    assert ended(bedrock, arn)["status"] == "Completed"


def test_lists_refuse_filters_that_they_do_not_know(bedrock: Any) -> None:
    for wrong in (
        {"statusEquals": "Gone"},
        {"applicationTypeEquals": "Rag"},
        {"sortBy": "Name"},
        {"sortOrder": "Sideways"},
        {"nameContains": "A B"},
        {"nextToken": "YQ=="},
        {"maxResults": 1001},
    ):
        with pytest.raises(bedrock.exceptions.ValidationException):
            bedrock.list_evaluation_jobs(**wrong)
    assert not bedrock.list_evaluation_jobs(statusEquals="Stopping")["jobSummaries"]


@pytest.mark.slow
def test_a_bucket_that_is_gone_when_results_are_written(server: Served, bedrock: Any) -> None:
    s3 = server.client("s3")
    s3.create_bucket(Bucket="brief")
    uri = upload(server, "brief.jsonl", [turn()] * 4)
    asked = rag("brief", data(uri, COVERED), outputDataConfig={"s3Uri": "s3://brief/out"})
    arn = bedrock.create_evaluation_job(**asked)["jobArn"]
    s3.delete_bucket(Bucket="brief")
    job = ended(bedrock, arn)
    assert job["status"] == "Failed"
    (message,) = job["failureMessages"]
    assert "graded" in message and message.endswith("be written: There is no bucket brief.")


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_a_job_goes_on_where_a_killed_server_stopped(
    server: Served, tmp_path: Path, replaced: bool
) -> None:
    rows = [turn(prompt={"content": [{"text": f"Question {n}?"}]}) for n in range(30)]
    name = f"killed-{replaced}".lower()
    uri = upload(server, f"{name}.jsonl", rows)
    client = checked(server, ONE)
    arn = client.create_evaluation_job(**rag(name, data(uri, COVERED)))["jobArn"]
    database = Database(f"sqlite:///{server.home / 'luthier.db'}")
    run_id = arn.rpartition("/")[2]

    def graded() -> set[int]:
        with database.read() as session:
            return store.done_rows(session, run_id)

    until(lambda: len(graded()) > 1)
    server.kill()
    before = graded()
    assert len(before) < len(rows)
    locations = Locations(database, files=ObjectFiles(server.home / "objects"))
    if replaced:
        others = tmp_path / "others.jsonl"
        others.write_text("".join(f"{json.dumps(row)}\n" for row in reversed(rows)))
        locations.write(ONE, uri.removesuffix(f"{name}.jsonl"), f"{name}.jsonl", others)
    parts = parts_with(Judges({}), locations=locations)
    tasks = {"bedrock": partial(job_task, parts)}
    runner = EvaluationRunner(database, tasks, lambda *_: AccountQuotas())
    clock = [0.0]
    runner.watch = queue.LeaseWatch(60, lambda: clock[0])
    assert not runner.run_once()
    clock[0] = 61.0
    assert runner.run_once()
    server.start()
    job = checked(server, ONE).get_evaluation_job(jobIdentifier=arn)
    if replaced:
        assert job["status"] == "Failed" and graded() == before
        (message,) = job["failureMessages"]
        assert "was replaced while the job ran" in message and "make a new job" in message
        database.close()
        return
    assert job["status"] == "Completed", job
    found = rag_results(server, job)
    assert [each["conversationTurns"][0]["inputRecord"]["prompt"] for each in found] == [
        each["conversationTurns"][0]["prompt"] for each in rows
    ]
    explanations = [
        each["conversationTurns"][0]["results"][0]["evaluatorDetails"][0]["explanation"]
        for each in found
    ]
    again = {n for n, said in enumerate(explanations, 1) if said == "Fine.\nScore: 10"}
    assert again == {*range(1, len(rows) + 1)} - before
    database.close()


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
