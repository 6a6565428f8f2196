"""Customization jobs through boto3: made, looked at, listed, stopped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from bedrock_service import ALICE, BASE, ENCODER, Service, job_members
from botocore.exceptions import ClientError

from luthier.server.bedrock.hyperparameters import HYPERPARAMETERS
from luthier.server.tables import jobs as queue
from luthier.server.tables.audit import entries

DISTILLATION = {
    "customizationType": "DISTILLATION",
    "customizationConfig": {
        "distillationConfig": {
            "teacherModelConfig": {
                "teacherModelIdentifier": BASE,
                "maxResponseLengthForInference": 99,
            }
        }
    },
}
REINFORCEMENT = {
    "customizationType": "REINFORCEMENT_FINE_TUNING",
    "customizationConfig": {
        "rftConfig": {
            "graderConfig": {
                "lambdaGrader": {
                    "lambdaArn": "arn:aws:lambda:us-east-1:111111111111:function:grade"
                }
            },
            "hyperParameters": {"epochCount": 3, "trainingSamplePerPrompt": 4, "batchSize": 16},
        }
    },
}


def refused(call: Callable[..., Any], **members: Any) -> tuple[str, str]:
    """Code and message of the refusal."""
    with pytest.raises(ClientError) as caught:
        call(**members)
    error = caught.value.response["Error"]
    return error["Code"], error["Message"]


@pytest.mark.parametrize("epochs", ["1.5", "0", "2.0", "-1", "many", ""])
def test_epoch_count_must_be_positive_integer(bedrock: Any, epochs: str) -> None:
    members = job_members("first", hyperParameters={"epochCount": epochs})
    code, message = refused(bedrock.create_model_customization_job, **members)
    assert code == "ValidationException" and "epochCount" in message


def test_audit_entry_has_arn_of_created_job(service: Service, bedrock: Any) -> None:
    members = job_members("first", clientRequestToken="token-1")
    arns = [bedrock.create_model_customization_job(**members)["jobArn"] for _ in range(2)]
    with service.database.read() as session:
        assert [each.resource for each in entries(session)] == arns


def test_job_view_returns_requested_fields(service: Service, bedrock: Any) -> None:
    asked = job_members(
        "first+job.1",
        customModelName="my_model-1",
        hyperParameters={"learningRate": "1.0e-4", "epochCount": "3", "luthier.loraRank": "8"},
        validationDataConfig={"validators": [{"s3Uri": "s3://data/v1.jsonl"}]},
        customModelKmsKeyId="12345678-1234-1234-1234-123456789012",
        vpcConfig={"subnetIds": ["subnet-1"], "securityGroupIds": ["sg-1"]},
        clientRequestToken="token-1",
    )
    answer = bedrock.create_model_customization_job(**asked)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 201
    arn = answer["jobArn"]
    assert arn.startswith(f"arn:aws:bedrock:us-east-1:{ALICE}:model-customization-job/{BASE}/")
    for identifier in (arn, "first+job.1"):
        job = bedrock.get_model_customization_job(jobIdentifier=identifier)
        assert job["jobArn"] == arn and job["status"] == "InProgress"
    same = ("roleArn", "trainingDataConfig", "outputDataConfig", "vpcConfig", "jobName")
    assert {name: job[name] for name in same} == {name: asked[name] for name in same}
    assert job["hyperParameters"] == asked["hyperParameters"]
    assert job["validationDataConfig"] == asked["validationDataConfig"]
    assert job["outputModelName"] == "my_model-1" and "outputModelArn" not in job
    assert job["outputModelKmsKeyArn"].endswith(":key/12345678-1234-1234-1234-123456789012")
    assert job["baseModelArn"].endswith(f"::foundation-model/{BASE}")
    assert job["clientRequestToken"] == "token-1"
    assert job["customizationType"] == "FINE_TUNING"
    assert "endTime" not in job and "failureMessage" not in job
    recipe = service.job(ALICE, "first+job.1").recipe
    assert recipe["training"]["epochs"] == 3 and recipe["training"].get("batch_size") is None
    assert recipe["training"]["learning_rate"] == 1e-4 and recipe["adaptation"]["rank"] == 8
    assert [uri for _, uri in service.places.checked] == [
        "s3://data/train.jsonl",
        "s3://data/v1.jsonl",
    ]


def test_job_view_without_validation_data(bedrock: Any, submit: Callable[..., str]) -> None:
    job = bedrock.get_model_customization_job(jobIdentifier=submit())
    assert job["validationDataConfig"] == {"validators": []}
    assert "hyperParameters" not in job


def test_job_without_hyperparameters_shows_chosen_values(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    """A job with hyperparameters returns the request's values only: Terraform replaces changed
    models."""
    chosen = {"training.epochs": 6.0, "training.batch_size": 2, "training.learning_rate": 2e-4}
    arns = submit("open"), submit("set", hyperParameters={"epochCount": "6"})
    for name in ("open", "set"):
        with service.database.write() as session:
            job = session.merge(service.job(ALICE, name))
            job.details = {**job.details, "chosen": chosen}
    shown = [bedrock.get_model_customization_job(jobIdentifier=arn) for arn in arns]
    assert shown[0]["hyperParameters"] == {
        "epochCount": "6", "batchSize": "2", "learningRate": "0.0002"
    }  # fmt: skip
    assert shown[1]["hyperParameters"] == {"epochCount": "6"}


def test_completed_job_has_model_and_losses(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    validators = [{"s3Uri": "s3://data/v1.jsonl"}, {"s3Uri": "s3://data/v2.jsonl"}]
    arn = submit("job-1", validationDataConfig={"validators": validators})
    made = service.complete(ALICE, "job-1", train_loss=0.25, validation_losses=[0.5, 0.75])
    job = bedrock.get_model_customization_job(jobIdentifier=arn)
    assert job["status"] == "Completed" and job["endTime"]
    assert job["outputModelArn"].endswith(f":custom-model/{BASE}/{made.id}")
    assert job["trainingMetrics"] == {"trainingLoss": 0.25}
    assert job["validationMetrics"] == [{"validationLoss": 0.5}, {"validationLoss": 0.75}]
    (listed,) = bedrock.list_model_customization_jobs()["modelCustomizationJobSummaries"]
    assert listed["customModelArn"] == job["outputModelArn"]
    assert listed["status"] == "Completed"


def test_nan_loss_is_omitted_from_training_metrics(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    arn = submit()
    service.complete(ALICE, "job-1", train_loss=float("nan"))
    job = bedrock.get_model_customization_job(jobIdentifier=arn)
    assert job["trainingMetrics"] == {}


def test_failed_job_reports_cause_and_releases_model_name(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    arn = submit("job-1", customModelName="wanted")
    service.fail(ALICE, "job-1", "train.jsonl:3: [json.invalid] no JSON")
    job = bedrock.get_model_customization_job(jobIdentifier=arn)
    assert job["status"] == "Failed" and "train.jsonl:3" in job["failureMessage"]
    assert "outputModelArn" not in job
    submit("job-2", customModelName="wanted")
    assert refused(bedrock.create_model_customization_job, **job_members("job-1")) == (
        "ValidationException",
        "The provided job name is currently in use.",
    )


def test_names_in_use(bedrock: Any, submit: Callable[..., str], bob: Any) -> None:
    submit("job-1", customModelName="wanted")
    create = bedrock.create_model_customization_job
    assert refused(create, **job_members("job-1", customModelName="other")) == (
        "ValidationException",
        "The provided job name is currently in use.",
    )
    assert refused(create, **job_members("job-2", customModelName="wanted")) == (
        "ValidationException",
        "The provided model name is currently in use.",
    )
    submit("job-1", client=bob, customModelName="wanted")


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"jobName": "-starts-with-a-hyphen"}, "'jobName' failed to satisfy constraint"),
        ({"jobName": "a" * 64}, "Member must have length less than or equal to 63"),
        ({"customModelName": "two__lines"}, "regular expression pattern"),
        ({"roleArn": "arn:aws:iam::1:role/x"}, "'roleArn'"),
        ({"clientRequestToken": "no spaces"}, "'clientRequestToken'"),
        ({"customizationType": "DPO"}, "Member must satisfy enum value set: [FINE_TUNING, "),
        ({"customizationType": "IMPORTED"}, "IMPORTED"),
        ({"trainingDataConfig": {}}, "s3Uri"),
        ({"trainingDataConfig": {"s3Uri": "http://data/x"}}, "'trainingDataConfig.s3Uri'"),
        ({"trainingDataConfig": {"s3Uri": "s3://data/a%20b"}}, "'trainingDataConfig.s3Uri'"),
        ({"trainingDataConfig": {"s3Uri": "s3://elsewhere/x"}}, "s3://elsewhere/x"),
        ({"outputDataConfig": {"s3Uri": "s3://elsewhere/x"}}, "cannot be written"),
        ({"trainingDataConfig": {"s3Uri": "file://host/data/x"}}, "'trainingDataConfig.s3Uri'"),
        ({"validationDataConfig": {"validators": [{"s3Uri": "s3://data/v"}] * 11}}, "validators"),
        ({"hyperParameters": {"epochCount": "0"}}, "epochCount"),
        ({"hyperParameters": {"batchSize": "2.5"}}, "batchSize"),
        ({"hyperParameters": {"epochCount": "٣"}}, "epochCount"),
        ({"hyperParameters": {"learningRate": "nan"}}, "learningRate"),
        ({"hyperParameters": {"learningRate": "1e999"}}, "learningRate"),
        ({"hyperParameters": {"earlyStoppingThreshold": "x"}}, "earlyStoppingThreshold"),
        ({"hyperParameters": {"epochs": "2"}}, "'epochs'"),
        ({"hyperParameters": {"luthier.adaptation": "magic"}}, "magic"),
        ({"customizationType": "DISTILLATION"}, "needs distillationConfig"),
        ({**DISTILLATION, "customizationType": "FINE_TUNING"}, "takes none"),
        ({**REINFORCEMENT, "customizationType": "DISTILLATION"}, "needs distillationConfig"),
        ({"customizationType": "REINFORCEMENT_FINE_TUNING"}, "needs rftConfig"),
        (
            {
                "customizationType": "REINFORCEMENT_FINE_TUNING",
                "customizationConfig": {
                    "rftConfig": {
                        **REINFORCEMENT["customizationConfig"]["rftConfig"],  # type: ignore[index]
                        "hyperParameters": {"maxPromptLength": 100},
                    }
                },
            },
            "maxPromptLength is not supported",
        ),
        ({"baseModelIdentifier": ENCODER, **DISTILLATION}, "does not support DISTILLATION"),
        ({"jobTags": [{"key": "a", "value": "1"}, {"key": "a", "value": "2"}]}, "more than once"),
        ({"jobTags": [{"key": "aws:x", "value": "1"}]}, "aws:"),
    ],
)
def test_invalid_job_request_is_rejected(bedrock: Any, members: dict[str, Any], text: str) -> None:
    create = bedrock.create_model_customization_job
    code, message = refused(create, **job_members(**members))
    assert code == "ValidationException" and text in message
    assert bedrock.list_model_customization_jobs()["modelCustomizationJobSummaries"] == []


def test_all_validation_errors_are_reported_together(bedrock: Any) -> None:
    create = bedrock.create_model_customization_job
    _, message = refused(create, **job_members("bad name", customModelName="bad name"))
    assert message.startswith("2 validation errors detected: Value 'bad name' at 'jobName'")
    assert "Value 'bad name' at 'customModelName' failed to satisfy constraint" in message


def test_job_with_missing_base_model_is_rejected(
    bedrock: Any, bob: Any, model: Callable[..., str]
) -> None:
    own = model()
    for identifier in ("no.such-model", "nothing", own.replace(own[-12:], "0" * 12)):
        members = job_members("job-2", baseModelIdentifier=identifier)
        code, _ = refused(bedrock.create_model_customization_job, **members)
        assert code == "ResourceNotFoundException"
    members = job_members("job-2", baseModelIdentifier=own)
    assert refused(bob.create_model_customization_job, **members)[0] == "ResourceNotFoundException"


@pytest.mark.parametrize("by", ["arn", "name"])
def test_job_on_custom_model_preserves_root(
    service: Service, bedrock: Any, model: Callable[..., str], submit: Callable[..., str], by: str
) -> None:
    first = model("job-1", customModelName="first")
    arn = submit("job-2", baseModelIdentifier=first if by == "arn" else "first")
    assert f":model-customization-job/{BASE}/" in arn
    job = bedrock.get_model_customization_job(jobIdentifier=arn)
    assert job["baseModelArn"].endswith(f"::foundation-model/{BASE}")
    service.complete(ALICE, "job-2")
    second = bedrock.get_custom_model(modelIdentifier="model-of-job-2")
    assert second["baseModelArn"] == first


def test_distillation_job_records_teacher_model(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    arn = submit("job-1", **DISTILLATION)
    job = bedrock.get_model_customization_job(jobIdentifier=arn)
    assert job["customizationConfig"] == DISTILLATION["customizationConfig"]
    recipe = service.job(ALICE, "job-1").recipe
    assert recipe["teacher"]["model"] == "smollm2-135m-instruct"
    assert recipe["sampling"]["max_tokens"] == 99


def test_reinforcement_requires_registered_grader(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    arn = submit("job-1", **REINFORCEMENT)
    job = bedrock.get_model_customization_job(jobIdentifier=arn)
    assert job["customizationConfig"] == REINFORCEMENT["customizationConfig"]
    recipe = service.job(ALICE, "job-1").recipe
    assert recipe["objective"]["num_generations"] == 4
    assert recipe["training"]["epochs"] == 3 and recipe["training"]["batch_size"] == 16
    other = {
        "rftConfig": {
            "graderConfig": {
                "lambdaGrader": {"lambdaArn": "arn:aws:lambda:us-east-1:111111111111:function:x"}
            }
        }
    }
    members = job_members("job-2", **{**REINFORCEMENT, "customizationConfig": other})
    assert refused(bedrock.create_model_customization_job, **members)[0] == "ValidationException"


def test_unused_request_fields_are_shown_with_warning(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    config: Any = copy.deepcopy(REINFORCEMENT["customizationConfig"])
    config["rftConfig"]["hyperParameters"]["reasoningEffort"] = "high"
    members: Any = {
        **REINFORCEMENT,
        "customizationConfig": config,
        "customModelKmsKeyId": "12345678-1234-1234-1234-123456789012",
        "vpcConfig": {"subnetIds": ["subnet-1"], "securityGroupIds": ["sg-1"]},
    }
    arn = submit("job-1", **members)
    assert bedrock.get_model_customization_job(jobIdentifier=arn)["customizationConfig"] == config
    submit("job-2", **REINFORCEMENT)
    record = {}
    for name in ("job-1", "job-2"):
        with service.database.read() as session:
            job = service.job(ALICE, name)
            events = queue.events(session, job, kinds=("warning",), limit=9)
            record[name] = [event.message for event in events]
    assert record["job-2"] == []
    said = sorted(record["job-1"])
    assert [text.partition(" ")[0] for text in said] == [
        "customModelKmsKeyId", "reasoningEffort", "vpcConfig",
    ]  # fmt: skip
    config["rftConfig"]["hyperParameters"]["reasoningEffort"] = "highest"
    members = job_members("job-3", **{**REINFORCEMENT, "customizationConfig": config})
    code, _ = refused(bedrock.create_model_customization_job, **members)
    assert code == "ValidationException"


def test_every_hyper_parameter_reaches_the_recipe(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    values = {
        "learningRate": 0.05, "learningRateMultiplier": 0.05, "earlyStoppingThreshold": 0.05,
        "luthier.adaptation": "lora", "luthier.schedule": "linear", "luthier.longRows": "drop",
        "luthier.loraDropout": 0.05, "luthier.validationShare": 0.05, "luthier.shuffle": False,
    }  # fmt: skip
    values = {name: values.get(name, 2) for name in HYPERPARAMETERS}
    sent = {name: str(value).lower() for name, value in values.items()}
    job = bedrock.get_model_customization_job(jobIdentifier=submit("job-1", hyperParameters=sent))
    assert job["hyperParameters"] == sent
    recipe = service.job(ALICE, "job-1").recipe
    for name, setting in HYPERPARAMETERS.items():
        group, field = setting.split(".")
        if name not in ("learningRate", "learningRateMultiplier"):
            assert recipe[group][field] == values[name], name
    assert recipe["training"]["learning_rate"] == pytest.approx(0.05 * 0.05)
    submit("job-2", hyperParameters={"learningRateMultiplier": "2"})
    assert service.job(ALICE, "job-2").recipe["training"]["learning_rate_multiplier"] == 2


def test_stop_of_running_and_ended_jobs(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    arn = submit()
    for _ in range(2):
        answer = bedrock.stop_model_customization_job(jobIdentifier=arn)
        assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200
    job = bedrock.get_model_customization_job(jobIdentifier=arn)
    assert job["status"] == "Stopped" and "outputModelArn" not in job
    submit("job-2")
    service.complete(ALICE, "job-2")
    stop = bedrock.stop_model_customization_job
    assert refused(stop, jobIdentifier="job-2")[0] == "ConflictException"
    assert refused(stop, jobIdentifier="job-3")[0] == "ResourceNotFoundException"


def test_job_is_hidden_from_foreign_account(
    bedrock: Any, bob: Any, submit: Callable[..., str]
) -> None:
    arn = submit()
    for call in (bob.get_model_customization_job, bob.stop_model_customization_job):
        theirs = refused(call, jobIdentifier=arn)
        never = refused(call, jobIdentifier=arn[:-12] + "0" * 12)
        assert theirs[0] == never[0] == "ResourceNotFoundException"
        assert theirs[1].replace(arn, "X") == never[1].replace(arn[:-12] + "0" * 12, "X")
        assert refused(call, jobIdentifier="job-1")[0] == "ResourceNotFoundException"
    assert bob.list_model_customization_jobs()["modelCustomizationJobSummaries"] == []


def test_invalid_job_identifier_is_rejected(bedrock: Any, submit: Callable[..., str]) -> None:
    arn = submit()
    get = bedrock.get_model_customization_job
    for wrong in ("not a name", arn + "x", "a" * 2000, "-"):
        assert refused(get, jobIdentifier=wrong)[0] == "ValidationException"
    for elsewhere in (arn.replace("us-east-1", "eu-west-1"), arn.replace("smollm2", "smollm3")):
        assert refused(get, jobIdentifier=elsewhere)[0] == "ResourceNotFoundException"


def test_filters_of_job_list(service: Service, bedrock: Any, submit: Callable[..., str]) -> None:
    for name in ("alpha", "Alphabet", "beta"):
        submit(name)
    service.complete(ALICE, "beta")
    bedrock.stop_model_customization_job(jobIdentifier="alpha")

    def names(**filters: Any) -> list[str]:
        found = bedrock.list_model_customization_jobs(**filters)
        return [each["jobName"] for each in found["modelCustomizationJobSummaries"]]

    assert names() == ["beta", "Alphabet", "alpha"]
    assert names(sortOrder="Ascending", sortBy="CreationTime") == ["alpha", "Alphabet", "beta"]
    assert names(nameContains="lpha") == ["Alphabet", "alpha"]
    assert names(nameContains="alpha") == ["alpha"]
    assert names(statusEquals="Completed") == ["beta"]
    assert names(statusEquals="InProgress", nameContains="beta") == []
    middle = bedrock.get_model_customization_job(jobIdentifier="Alphabet")["creationTime"]
    assert "Alphabet" not in names(creationTimeAfter=middle) + names(creationTimeBefore=middle)
    assert names(creationTimeAfter=middle, creationTimeBefore=middle) == []


def test_details_of_the_parts(service: Service, bedrock: Any, submit: Callable[..., str]) -> None:
    arn = submit()
    details = bedrock.get_model_customization_job(jobIdentifier=arn)["statusDetails"]
    assert {part["status"] for part in details.values()} == {"NotStarted"}
    moment = "2026-01-31T12:00:00.123456+00:00"
    part = {"created": moment, "modified": moment, "status": "InProgress"}
    with service.database.write() as session:
        job = session.merge(service.job(ALICE, "job-1"))
        job.details = {**job.details, "parts": {"validation": part}}
    parts = bedrock.get_model_customization_job(jobIdentifier=arn)["statusDetails"]
    assert parts["validationDetails"]["status"] == "InProgress"
    bedrock.stop_model_customization_job(jobIdentifier=arn)
    parts = bedrock.get_model_customization_job(jobIdentifier=arn)["statusDetails"]
    assert parts["validationDetails"]["status"] == "Stopped"
