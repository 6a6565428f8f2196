"""Deployments and provisioned throughput through boto3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bedrock_service import (
    ALICE,
    BASE,
    BOB,
    ENCODER,
    Service,
    eventually,
)
from botocore.exceptions import ClientError

from luthier.server.http.messages import Fault
from luthier.server.identifiers import ModelIds, invocable, invoked_arn

FOUNDATION = f"arn:aws:bedrock:us-east-1::foundation-model/{BASE}"


def refused(call: Callable[..., Any], **members: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(**members)
    return str(caught.value.response["Error"]["Code"])


def deploy(bedrock: Any, arn: str, name: str = "d", **members: Any) -> str:
    """Return the ARN of a deployment, possibly still Creating."""
    asked = {"modelDeploymentName": name, "modelArn": arn, **members}
    answer = bedrock.create_custom_model_deployment(**asked)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 202
    return str(answer["customModelDeploymentArn"])


def deployment(bedrock: Any, identifier: str) -> Any:
    return bedrock.get_custom_model_deployment(customModelDeploymentIdentifier=identifier)


def active(bedrock: Any, identifier: str) -> None:
    eventually(lambda: deployment(bedrock, identifier)["status"] == "Active")


def asked(service: Service, model_id: str, account: str = ALICE) -> Any:
    """Return the model that serves ``modelId``."""
    return invocable(service.database, service.control.arns, account, model_id)


def not_asked(service: Service, model_id: str, account: str = ALICE) -> tuple[str, str]:
    with pytest.raises(Fault) as caught:
        asked(service, model_id, account)
    return caught.value.code, caught.value.message


def test_deployment_becomes_active_after_loading(
    service: Service, bedrock: Any, model: Callable[..., str]
) -> None:
    arn = model()
    service.preparation.free.clear()
    deployed = deploy(bedrock, arn, "my-deployment", description="for tests")
    view = deployment(bedrock, deployed)
    assert view["status"] == "Creating" and view["modelDeploymentName"] == "my-deployment"
    assert view["modelArn"] == arn and view["description"] == "for tests"
    assert not_asked(service, deployed)[0] == "ModelNotReady"
    delete = bedrock.delete_custom_model_deployment
    assert refused(delete, customModelDeploymentIdentifier=deployed) == "ConflictException"
    service.preparation.free.set()
    active(bedrock, "my-deployment")
    stored = f"smollm2:job-{service.job(ALICE, 'job-1').id}"
    found = asked(service, deployed)
    assert (found.stored_id, found.arn, found.model) == (stored, deployed, arn)
    assert service.preparation.seen == [stored]
    (listed,) = bedrock.list_custom_model_deployments()["modelDeploymentSummaries"]
    assert listed["customModelDeploymentName"] == "my-deployment"
    assert listed["customModelDeploymentArn"] == deployed
    delete(customModelDeploymentIdentifier=deployed)
    assert refused(delete, customModelDeploymentIdentifier=deployed) == "ResourceNotFoundException"
    assert not_asked(service, deployed)[0] == "ResourceNotFound"
    deploy(bedrock, arn, "my-deployment")


def test_deployment_with_damaged_files_fails(
    service: Service, bedrock: Any, model: Callable[..., str]
) -> None:
    arn = model()
    service.preparation.broken.add(f"smollm2:job-{service.job(ALICE, 'job-1').id}")
    deployed = deploy(bedrock, arn)
    eventually(lambda: deployment(bedrock, deployed)["status"] == "Failed")
    view = deployment(bedrock, deployed)
    assert "damaged" in view["failureMessage"] and "/secret" not in view["failureMessage"]
    assert not_asked(service, deployed)[0] == "Validation"
    bedrock.delete_custom_model_deployment(customModelDeploymentIdentifier=deployed)
    bedrock.delete_custom_model(modelIdentifier=arn)


def test_invalid_deployment_request_is_rejected(
    bedrock: Any, bob: Any, model: Callable[..., str]
) -> None:
    arn = model()
    deploy(bedrock, arn, "taken")
    create = bedrock.create_custom_model_deployment
    missing = arn[:-12] + "0" * 12
    for name, of, code in (
        ("taken", arn, "ValidationException"),
        ("bad name", arn, "ValidationException"),
        ("other", "model-of-job-1-is-no-arn", "ValidationException"),
        ("other", missing, "ResourceNotFoundException"),
        ("other", arn.replace("us-east-1", "eu-west-1"), "ResourceNotFoundException"),
    ):
        assert refused(create, modelDeploymentName=name, modelArn=of) == code
    theirs = {"modelDeploymentName": "d", "modelArn": arn}
    assert refused(bob.create_custom_model_deployment, **theirs) == "ResourceNotFoundException"
    assert len(bedrock.list_custom_model_deployments()["modelDeploymentSummaries"]) == 1


def test_deployment_update_serves_old_model_until_ready(
    service: Service, bedrock: Any, model: Callable[..., str]
) -> None:
    first, second = model("job-1"), model("job-2")
    deployed = deploy(bedrock, first)
    active(bedrock, deployed)
    service.preparation.free.clear()
    update = bedrock.update_custom_model_deployment
    answer = update(customModelDeploymentIdentifier=deployed, modelArn=second)
    assert answer["customModelDeploymentArn"] == deployed
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 202
    view = deployment(bedrock, deployed)
    assert view["status"] == "Active" and view["modelArn"] == first
    assert view["updateDetails"] == {"modelArn": second, "updateStatus": "Updating"}
    assert asked(service, deployed).model == first
    for model_arn in (first, second):
        with pytest.raises(bedrock.exceptions.ConflictException) as caught:
            bedrock.delete_custom_model(modelIdentifier=model_arn)
        call = "DeleteCustomModelDeployment (customModelDeploymentIdentifier d)"
        assert call in str(caught.value)
    service.preparation.free.set()
    eventually(lambda: deployment(bedrock, deployed)["modelArn"] == second)
    assert deployment(bedrock, deployed)["updateDetails"]["updateStatus"] == "UpdateCompleted"
    assert asked(service, deployed).model == second
    bedrock.delete_custom_model(modelIdentifier=first)


def test_failed_deployment_update_serves_old_model(
    service: Service, bedrock: Any, model: Callable[..., str]
) -> None:
    first, second, encoder = model("job-1"), model("job-2"), model("j", baseModelIdentifier=ENCODER)
    deployed = deploy(bedrock, first)
    active(bedrock, deployed)
    update = bedrock.update_custom_model_deployment
    of = {"customModelDeploymentIdentifier": deployed}
    assert refused(update, modelArn=encoder, **of) == "ValidationException"
    service.preparation.broken.add(f"smollm2:job-{service.job(ALICE, 'job-2').id}")
    update(modelArn=second, **of)
    failed = "UpdateFailed"
    eventually(lambda: deployment(bedrock, deployed)["updateDetails"]["updateStatus"] == failed)
    assert deployment(bedrock, deployed)["modelArn"] == first
    assert asked(service, deployed).model == first
    bedrock.delete_custom_model(modelIdentifier=second)
    assert deployment(bedrock, deployed)["updateDetails"]["modelArn"] == second


def test_filters_of_deployments(service: Service, bedrock: Any, model: Callable[..., str]) -> None:
    first, second = model("job-1"), model("job-2")
    for name, arn in (("alpha", first), ("beta", second), ("Alpha", first)):
        active(bedrock, deploy(bedrock, arn, name))

    def names(**filters: Any) -> list[str]:
        found = bedrock.list_custom_model_deployments(**filters)["modelDeploymentSummaries"]
        return [each["customModelDeploymentName"] for each in found]

    assert names() == ["Alpha", "beta", "alpha"]
    assert names(modelArnEquals=first, sortOrder="Ascending") == ["alpha", "Alpha"]
    assert names(nameContains="lpha", statusEquals="Active") == ["Alpha", "alpha"]
    assert names(statusEquals="Failed") == []
    middle = deployment(bedrock, "beta")["createdAt"]
    assert names(createdAfter=middle) == ["Alpha"] and names(createdBefore=middle) == ["alpha"]


def test_activation_resumes_after_server_restart(
    service: Service, bedrock: Any, model: Callable[..., str], database: Any
) -> None:
    arn = model()
    service.control.activation.close()
    service.control.activation.__init__(database, lambda stored_id: 1 / 0)  # type: ignore[misc]
    service.control.activation.close()
    with pytest.raises(ClientError):
        # Killed between the transaction and the work: the pool accepts no work.
        deploy(bedrock, arn)
    assert deployment(bedrock, "d")["status"] == "Creating"
    with service.server.serving(database) as again:
        again.control.activation.resume()
        active(bedrock, "d")


def throughput(bedrock: Any, model_id: str, name: str = "p", **members: Any) -> str:
    asked = {"provisionedModelName": name, "modelId": model_id, "modelUnits": 1, **members}
    answer = bedrock.create_provisioned_model_throughput(**asked)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 201
    return str(answer["provisionedModelArn"])


def provisioned(bedrock: Any, identifier: str) -> Any:
    return bedrock.get_provisioned_model_throughput(provisionedModelId=identifier)


def in_service(bedrock: Any, identifier: str) -> None:
    eventually(lambda: provisioned(bedrock, identifier)["status"] == "InService")


def test_provisioned_throughput_lifecycle(
    service: Service, bedrock: Any, bob: Any, model: Callable[..., str]
) -> None:
    arn = model("job-1", customModelName="mine")
    service.preparation.free.clear()
    made = throughput(bedrock, "mine", "p-1", modelUnits=3, commitmentDuration="OneMonth")
    assert provisioned(bedrock, made)["status"] == "Creating"
    assert not_asked(service, made)[0] == "ModelNotReady"
    service.preparation.free.set()
    in_service(bedrock, "p-1")
    view = provisioned(bedrock, made)
    assert view["modelArn"] == view["desiredModelArn"] == arn
    assert view["foundationModelArn"] == FOUNDATION
    assert view["modelUnits"] == view["desiredModelUnits"] == 3
    assert view["commitmentDuration"] == "OneMonth" and view["commitmentExpirationTime"]
    found = asked(service, made)
    assert found.model == arn
    with pytest.raises(bedrock.exceptions.ConflictException) as caught:
        bedrock.delete_custom_model(modelIdentifier=arn)
    assert "p-1" in str(caught.value)
    missing = refused(bob.get_provisioned_model_throughput, provisionedModelId=made)
    assert missing == "ResourceNotFoundException"
    assert not_asked(service, made, BOB)[0] == "ResourceNotFound"
    bedrock.delete_provisioned_model_throughput(provisionedModelId="p-1")
    delete = bedrock.delete_provisioned_model_throughput
    assert refused(delete, provisionedModelId="p-1") == "ResourceNotFoundException"
    bedrock.delete_custom_model(modelIdentifier=arn)


def test_provisioned_throughput_accepts_each_foundation_model_name(bedrock: Any) -> None:
    for number, name in enumerate((BASE, FOUNDATION, "smollm2-135m-instruct")):
        made = throughput(bedrock, name, f"p-{number}")
        assert provisioned(bedrock, made)["modelArn"] == FOUNDATION


def test_invalid_provisioned_throughput_is_rejected(bedrock: Any) -> None:
    create = bedrock.create_provisioned_model_throughput
    throughput(bedrock, BASE, "taken")
    for name, model_id, units, code in (
        ("taken", BASE, 1, "ValidationException"),
        ("other", "no.such-model", 1, "ResourceNotFoundException"),
        ("other", "nothing", 1, "ResourceNotFoundException"),
        ("other", "not a model", 1, "ValidationException"),
        ("-", BASE, 1, "ValidationException"),
    ):
        members = {"provisionedModelName": name, "modelId": model_id, "modelUnits": units}
        assert refused(create, **members) == code


def test_update_of_provisioned_throughput(
    service: Service, bedrock: Any, model: Callable[..., str]
) -> None:
    first, second = model("job-1"), model("job-2")
    encoder = model("job-3", baseModelIdentifier=ENCODER)
    made = throughput(bedrock, first, "p-1")
    in_service(bedrock, made)
    throughput(bedrock, BASE, "p-2")
    update = bedrock.update_provisioned_model_throughput
    of = {"provisionedModelId": made}
    assert refused(update, desiredModelId=encoder, **of) == "ValidationException"
    assert refused(update, desiredProvisionedModelName="p-2", **of) == "ValidationException"
    service.preparation.free.clear()
    update(desiredProvisionedModelName="p-new", desiredModelId=second, **of)
    view = provisioned(bedrock, "p-new")
    assert view["status"] == "Updating" and view["modelArn"] == first
    assert view["desiredModelArn"] == second and asked(service, made).model == first
    service.preparation.free.set()
    in_service(bedrock, made)
    assert asked(service, made).model == second
    service.preparation.broken.add(f"smollm2:job-{service.job(ALICE, 'job-1').id}")
    update(desiredModelId=first, **of)
    eventually(lambda: "failureMessage" in provisioned(bedrock, made))
    view = provisioned(bedrock, made)
    assert view["status"] == "InService" and view["modelArn"] == view["desiredModelArn"] == second


def test_filters_of_provisioned_throughput(bedrock: Any, model: Callable[..., str]) -> None:
    arn = model()
    for name, model_id in (("alpha", BASE), ("beta", arn), ("gamma", BASE)):
        in_service(bedrock, throughput(bedrock, model_id, name))

    def names(**filters: Any) -> list[str]:
        found = bedrock.list_provisioned_model_throughputs(**filters)["provisionedModelSummaries"]
        return [each["provisionedModelName"] for each in found]

    assert names() == ["gamma", "beta", "alpha"]
    assert names(modelArnEquals=FOUNDATION, sortOrder="Ascending") == ["alpha", "gamma"]
    assert names(statusEquals="InService", nameContains="eta") == ["beta"]
    assert names(statusEquals="Failed") == []
    middle = provisioned(bedrock, "beta")["creationTime"]
    assert names(creationTimeAfter=middle) == ["gamma"]
    assert names(creationTimeBefore=middle) == ["alpha"]


def test_deployment_name_takes_precedence_over_model_name(
    service: Service, bedrock: Any, model: Callable[..., str]
) -> None:
    first, second = model("job-1", customModelName="prod"), model("job-2", customModelName="new")
    ids = ModelIds(service.database, service.control.arns)
    assert not_asked(service, "prod")[0] == "Validation"  # a custom model without deployment
    provided = throughput(bedrock, first, "prod")
    eventually(lambda: provisioned(bedrock, "prod")["status"] == "InService")
    assert asked(service, "prod").arn == provided == ids.resource(ALICE, "prod")
    deployed = deploy(bedrock, second, "prod")
    active(bedrock, "prod")
    found = asked(service, "prod")
    assert (found.arn, found.model) == (deployed, second)
    assert ids.resource(ALICE, "prod") == deployed
    deploy(bedrock, second, "smollm2-135m-instruct")
    assert asked(service, "smollm2-135m-instruct").model == FOUNDATION
    for name, account in (("prod", BOB), ("Prod", ALICE), ("prod\n", ALICE)):
        assert not_asked(service, name, account)[0] in ("ResourceNotFound", "Validation")


def test_model_identifiers_accepted_for_inference(
    service: Service, bedrock: Any, model: Callable[..., str]
) -> None:
    arn = model("job-1", customModelName="mine")
    for name in (BASE, FOUNDATION, "smollm2-135m-instruct"):
        found = asked(service, name)
        assert (found.stored_id, found.model) == ("smollm2-135m-instruct", FOUNDATION)
        assert invoked_arn(service.control.arns, name) == FOUNDATION
    code, message = not_asked(service, arn)
    assert code == "Validation"
    deployed = deploy(bedrock, arn, "my-deployment")
    elsewhere = FOUNDATION.replace("us-east-1", "eu-west-1")
    for malformed in ("", "not a model", "a" * 3000, "arn:aws:bedrock:x", "a/b", "\n"):
        code, message = not_asked(service, malformed)
        assert (code, message) == ("Validation", "The provided model identifier is invalid.")
    ids = ModelIds(service.database, service.control.arns)
    assert ids.stored_id(ALICE, BASE) == "smollm2-135m-instruct"
    assert ids.resource(ALICE, arn) == arn and ids.resource(ALICE, BASE) == FOUNDATION
    for unknown in ("no.such-model", "nothing", elsewhere):
        assert not_asked(service, unknown)[0] == "ResourceNotFound"
    assert not_asked(service, "my-deployment", BOB)[0] == "ResourceNotFound"
    assert ids.resource(BOB, "my-deployment") != deployed
    assert not_asked(service, arn, BOB)[0] == "ResourceNotFound"
