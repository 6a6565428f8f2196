"""Foundation models and custom models through boto3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bedrock_service import ALICE, BASE, ENCODER, Service, eventually, job_members
from botocore.exceptions import ClientError

from luthier.limits import AccountQuotas

FOUNDATION = f"arn:aws:bedrock:us-east-1::foundation-model/{BASE}"


def refused(call: Callable[..., Any], **members: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(**members)
    return str(caught.value.response["Error"]["Code"])


ENCODERS = [
    ENCODER, "luthier.fasttext", "luthier.item-counts", "luthier.tfidf",
    "intfloat.multilingual-e5-small", "google.efficientnet-lite0",
    "luthier.small-cnn", "luthier.small-audio-cnn", "luthier.band-means",
    "luthier.colour-statistics",
]  # fmt: skip
IMAGES = ["luthier.small-dcgan", "luthier.small-unet", "luthier.small-vae"]
OCR = ["baidu.pp-ocrv6-small", "luthier.small-ocr"]
SERIES = ["luthier.small-window-vae", "luthier.small-sensor-vae", "luthier.z-score"]


def test_foundation_model_list_has_modalities(bedrock: Any, bob: Any) -> None:
    found = {m["modelId"]: m for m in bedrock.list_foundation_models()["modelSummaries"]}
    assert found.keys() == {BASE, *ENCODERS, *IMAGES, *OCR, *SERIES}
    for series in SERIES:
        assert found[series]["inputModalities"] == found[series]["outputModalities"] == []
    for reader in OCR:
        assert found[reader]["inputModalities"] == ["IMAGE"]
        assert found[reader]["outputModalities"] == ["TEXT"]
    assert found[BASE]["outputModalities"] == ["TEXT"] and found[BASE]["responseStreamingSupported"]
    assert found[ENCODER]["outputModalities"] == ["EMBEDDING"]
    kinds = {name: found[name]["inputModalities"] for name in (*ENCODERS, *IMAGES)}
    assert kinds == {
        ENCODER: ["TEXT"], "google.efficientnet-lite0": ["IMAGE"], "luthier.small-cnn": ["IMAGE"],
        "luthier.fasttext": ["TEXT"], "luthier.item-counts": ["TEXT"], "luthier.tfidf": ["TEXT"],
        "intfloat.multilingual-e5-small": ["TEXT"],
        "luthier.small-audio-cnn": [], "luthier.band-means": [],
        "luthier.colour-statistics": ["IMAGE"], "luthier.small-vae": ["IMAGE"],
        "luthier.small-dcgan": ["TEXT"], "luthier.small-unet": ["TEXT"],
    }  # fmt: skip
    assert bob.list_foundation_models()["modelSummaries"] == list(found.values())


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"byProvider": "SBERT"}, [ENCODER]),
        ({"byProvider": "Nobody"}, []),
        ({"byCustomizationType": "DISTILLATION"}, [BASE]),
        ({"byOutputModality": "EMBEDDING"}, ENCODERS),
        ({"byOutputModality": "IMAGE"}, IMAGES),
        ({"byInferenceType": "ON_DEMAND", "byOutputModality": "TEXT"}, [BASE, *OCR]),
    ],
)
def test_filters_of_foundation_models(bedrock: Any, filters: Any, expected: list[str]) -> None:
    found = bedrock.list_foundation_models(**filters)["modelSummaries"]
    assert [model["modelId"] for model in found] == expected


@pytest.mark.parametrize("identifier", [BASE, FOUNDATION, "smollm2-135m-instruct"])
def test_get_foundation_model_by_identifier(bedrock: Any, identifier: str) -> None:
    answer = bedrock.get_foundation_model(modelIdentifier=identifier)["modelDetails"]
    assert answer["modelArn"] == FOUNDATION and answer["modelLifecycle"] == {"status": "ACTIVE"}


def test_unknown_foundation_model_is_rejected(bedrock: Any) -> None:
    get = bedrock.get_foundation_model
    for unknown in (
        "no.such-model",
        FOUNDATION.replace("us-east-1", "eu-west-1"),
        FOUNDATION + "x",
    ):
        assert refused(get, modelIdentifier=unknown) == "ResourceNotFoundException"
    for malformed in ("nothing", "two words", "a..b", "UPPER.case"):
        assert refused(get, modelIdentifier=malformed) == "ValidationException"


def test_custom_model_view_returns_job_details(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    job = submit("job-1", customModelName="mine", hyperParameters={"epochCount": "1"})
    missing = refused(bedrock.get_custom_model, modelIdentifier="mine")
    assert missing == "ResourceNotFoundException"
    assert bedrock.list_custom_models()["modelSummaries"] == []
    made = service.complete(ALICE, "job-1", train_loss=0.5)
    model = bedrock.get_custom_model(modelIdentifier="mine")
    arn = model["modelArn"]
    assert arn == f"arn:aws:bedrock:us-east-1:{ALICE}:custom-model/{BASE}/{made.id}"
    assert (
        model["jobArn"] == job and model["jobName"] == "job-1" and model["modelStatus"] == "Active"
    )
    assert model["baseModelArn"] == FOUNDATION and model["customizationType"] == "FINE_TUNING"
    assert model["hyperParameters"] == {"epochCount": "1"}
    assert model["trainingMetrics"] == {"trainingLoss": 0.5}
    again = bedrock.get_custom_model(modelIdentifier=arn)
    assert again["modelArn"] == arn
    (listed,) = bedrock.list_custom_models()["modelSummaries"]
    assert listed["modelArn"] == arn and listed["baseModelName"] == BASE
    assert listed["ownerAccountId"] == ALICE


def test_filters_of_custom_models(bedrock: Any, model: Callable[..., str]) -> None:
    first = model("job-1", customModelName="first")
    model("job-2", customModelName="second", baseModelIdentifier=first)
    model("job-3", customModelName="encoder", baseModelIdentifier=ENCODER)

    def names(**filters: Any) -> list[str]:
        found = bedrock.list_custom_models(**filters)["modelSummaries"]
        return [each["modelName"] for each in found]

    assert names() == ["encoder", "second", "first"]
    assert names(baseModelArnEquals=FOUNDATION) == ["first"]
    assert names(baseModelArnEquals=first) == ["second"]
    assert names(foundationModelArnEquals=FOUNDATION) == ["second", "first"]
    assert names(foundationModelArnEquals=FOUNDATION.replace("us-east-1", "eu-west-1")) == []
    assert names(isOwned=False) == [] and len(names(isOwned=True)) == 3
    assert names(modelStatus="Active", nameContains="co") == ["encoder", "second"]
    assert names(modelStatus="Failed") == []
    middle = bedrock.get_custom_model(modelIdentifier="second")["creationTime"]
    assert names(creationTimeAfter=middle) == ["encoder"]
    assert names(creationTimeBefore=middle, sortOrder="Ascending") == ["first"]


def test_custom_models_are_sorted_by_creation(
    service: Service, bedrock: Any, submit: Callable[..., str]
) -> None:
    for name in ("job-1", "job-2", "job-3"):
        submit(name)
    for name in ("job-3", "job-1", "job-2"):
        service.complete(ALICE, name)
    pages = bedrock.get_paginator("list_custom_models").paginate(
        sortOrder="Ascending", PaginationConfig={"PageSize": 1}
    )
    found = [model["modelName"] for page in pages for model in page["modelSummaries"]]
    assert found == ["model-of-job-3", "model-of-job-1", "model-of-job-2"]


def test_delete_a_model(
    service: Service, bedrock: Any, model: Callable[..., str], luthier_home: Path
) -> None:
    arn = model("job-1", customModelName="mine")
    stored = f"smollm2:job-{service.job(ALICE, 'job-1').id}"
    folder = luthier_home / "models" / "custom" / "smollm2" / stored.partition(":")[2]
    folder.mkdir(parents=True)
    (folder / "luthier.json").write_text(json.dumps({"id": stored}))
    bedrock.delete_custom_model(modelIdentifier=arn)
    assert not folder.exists()
    # Deletion through the server also unloads the model.
    assert service.deleted == [stored]
    for call in (bedrock.get_custom_model, bedrock.delete_custom_model):
        assert refused(call, modelIdentifier=arn) == "ResourceNotFoundException"
        assert refused(call, modelIdentifier="mine") == "ResourceNotFoundException"
    job = bedrock.get_model_customization_job(jobIdentifier="job-1")
    assert job["status"] == "Completed" and "outputModelArn" not in job
    model("job-2", customModelName="mine")


def test_model_files_remain_while_adapter_depends_on_model(
    service: Service, bedrock: Any, model: Callable[..., str], luthier_home: Path
) -> None:
    arn = model("job-1")
    stored = f"smollm2:job-{service.job(ALICE, 'job-1').id}"
    places = luthier_home / "models" / "custom" / "smollm2"
    for name, manifest in ((stored, {"id": stored}), ("smollm2:child", {"parent": stored})):
        folder = places / name.partition(":")[2]
        folder.mkdir(parents=True)
        (folder / "luthier.json").write_text(json.dumps({"id": name, **manifest}))
    bedrock.delete_custom_model(modelIdentifier=arn)
    assert (places / stored.partition(":")[2] / "luthier.json").is_file()


def test_model_in_use_cannot_be_deleted(
    service: Service, bedrock: Any, model: Callable[..., str], submit: Callable[..., str]
) -> None:
    arn = model("job-1")
    deployment = bedrock.create_custom_model_deployment(modelDeploymentName="d", modelArn=arn)
    deployed = deployment["customModelDeploymentArn"]
    get = bedrock.get_custom_model_deployment
    eventually(lambda: get(customModelDeploymentIdentifier=deployed)["status"] == "Active")
    assert refused(bedrock.delete_custom_model, modelIdentifier=arn) == "ConflictException"
    bedrock.delete_custom_model_deployment(customModelDeploymentIdentifier=deployed)
    submit("job-2", baseModelIdentifier=arn)
    assert refused(bedrock.delete_custom_model, modelIdentifier=arn) == "ConflictException"
    bedrock.stop_model_customization_job(jobIdentifier="job-2")
    assert bedrock.get_custom_model(modelIdentifier=arn)["modelStatus"] == "Active"
    bedrock.delete_custom_model(modelIdentifier=arn)


def test_model_is_hidden_from_foreign_account(
    bob: Any, bedrock: Any, model: Callable[..., str]
) -> None:
    arn = model("job-1")
    for call in (bob.get_custom_model, bob.delete_custom_model):
        assert refused(call, modelIdentifier=arn) == "ResourceNotFoundException"
        assert refused(call, modelIdentifier="model-of-job-1") == "ResourceNotFoundException"
    assert bob.list_custom_models()["modelSummaries"] == []
    assert bedrock.get_custom_model(modelIdentifier=arn)
    bob.create_model_customization_job(**job_members("job-1"))


SOURCE = {"s3DataSource": {"s3Uri": "s3://data/folder/"}}


def test_repeated_import_token_returns_same_model(service: Service, bedrock: Any) -> None:
    create = bedrock.create_custom_model
    asked: dict[str, Any] = {
        "modelName": "mine", "modelSourceConfig": SOURCE, "clientRequestToken": "token",
        "modelTags": [{"key": "a", "value": "b"}],
        "modelKmsKeyArn": f"arn:aws:kms:us-east-1:{ALICE}:key/" + "1" * 36,
    }  # fmt: skip
    answer = create(**asked)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 202 and service.told_of.is_set()
    arn = answer["modelArn"]
    assert arn.startswith(f"arn:aws:bedrock:us-east-1:{ALICE}:custom-model/imported/")
    assert create(**asked)["modelArn"] == arn
    assert refused(create, **{**asked, "modelName": "other"}) == "ConflictException"
    assert refused(create, **{**asked, "clientRequestToken": "new"}) == "ValidationException"
    model = bedrock.get_custom_model(modelIdentifier="mine")
    assert model["modelStatus"] == "Creating" and model["modelKmsKeyArn"] == asked["modelKmsKeyArn"]
    assert "baseModelArn" not in model
    (listed,) = bedrock.list_custom_models(modelStatus="Creating")["modelSummaries"]
    assert (listed["modelArn"], listed["customizationType"]) == (arn, "IMPORTED")
    assert bedrock.list_custom_models(modelStatus="Active")["modelSummaries"] == []
    assert bedrock.list_tags_for_resource(resourceARN=arn)["tags"] == asked["modelTags"]
    assert refused(bedrock.delete_custom_model, modelIdentifier=arn) == "ConflictException"
    with pytest.raises(ClientError, match="ValidationException"):
        bedrock.create_model_customization_job(**job_members("job", baseModelIdentifier=arn))


def test_invalid_model_import_is_rejected(
    service: Service, bedrock: Any, bob: Any, database: Any
) -> None:
    create = bedrock.create_custom_model
    tag = {"key": "aws:x", "value": ""}
    package = f"arn:aws:sagemaker:us-east-1:{ALICE}:model-package/x/1"
    for members in (
        {"modelName": "a b", "modelSourceConfig": SOURCE},
        {"modelName": "mine"},
        {"modelName": "mine", "modelSourceConfig": {"s3DataSource": {"s3Uri": "s3://x/y"}}},
        {"modelName": "mine", "modelSourceConfig": {"s3DataSource": {"s3Uri": "s3://elsewhere/"}}},
        {"modelName": "mine", "modelSourceConfig": SOURCE, "modelTags": [tag]},
        {"modelName": "mine", "modelSourceConfig": SOURCE, "roleArn": "me"},
        {
            "modelName": "mine",
            "customModelDataSource": {"modelPackageArnDataSource": {"modelPackageArn": package}},
        },
    ):
        assert refused(create, **members) == "ValidationException", members
    tags = [{"key": f"k{n}", "value": ""} for n in range(51)]
    many = refused(create, modelName="mine", modelSourceConfig=SOURCE, modelTags=tags)
    assert many == "TooManyTagsException"
    assert bob.create_custom_model(modelName="mine", modelSourceConfig=SOURCE)["modelArn"]
    with service.server.serving(database, AccountQuotas(custom_models=1)):
        create(modelName="one", modelSourceConfig=SOURCE)
        over = refused(create, modelName="two", modelSourceConfig=SOURCE)
        assert over == "ServiceQuotaExceededException"
    assert [m["modelName"] for m in bedrock.list_custom_models()["modelSummaries"]] == ["one"]
