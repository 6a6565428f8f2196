"""Pagination, tags and client tokens of all operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from bedrock_service import ALICE, BASE, BOB, Service, job_members
from both_databases import with_tables
from botocore.exceptions import ClientError

from luthier.server.tables.database import Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Return SQLite and PostgreSQL databases, which differ in locking."""
    yield from with_tables(database_url)


def refused(call: Callable[..., Any], **members: Any) -> tuple[str, str]:
    with pytest.raises(ClientError) as caught:
        call(**members)
    error = caught.value.response["Error"]
    return error["Code"], error["Message"]


def page_of(client: Any, **members: Any) -> tuple[list[str], str | None]:
    found = client.list_model_customization_jobs(**members)
    names = [each["jobName"] for each in found["modelCustomizationJobSummaries"]]
    return names, found.get("nextToken")


@pytest.mark.parametrize("order", ["Ascending", "Descending"])
def test_pagination_is_complete_while_jobs_are_created(
    bedrock: Any, submit: Callable[..., str], order: str
) -> None:
    for number in range(7):
        submit(f"job-{number}")
    seen, token = page_of(bedrock, maxResults=3, sortOrder=order)
    assert len(seen) == 3
    number = 7
    while token:
        submit(f"job-{number}")
        number += 1
        names, token = page_of(bedrock, maxResults=3, sortOrder=order, nextToken=token)
        assert len(names) == 3 or token is None
        seen += names
    first = [f"job-{each}" for each in range(7)]
    if order == "Descending":
        assert seen == first[::-1]
    else:
        assert seen == [f"job-{each}" for each in range(len(seen))] and len(seen) >= 7


def test_filters_apply_to_every_page(bedrock: Any, submit: Callable[..., str]) -> None:
    for number in range(6):
        submit(f"{'odd' if number % 2 else 'even'}-{number}")
    names, token = page_of(bedrock, maxResults=2, nameContains="odd")
    assert names == ["odd-5", "odd-3"]
    assert page_of(bedrock, maxResults=2, nameContains="odd", nextToken=token) == (["odd-1"], None)


def test_malformed_next_token_is_rejected(bedrock: Any) -> None:
    for given in ("x", "2026-01-01_x", "2026-13-01T00:00:00+00:00_1"):
        assert refused(bedrock.list_model_customization_jobs, nextToken=given)[0] == (
            "ValidationException"
        )


def test_next_token_of_different_operation_is_rejected(
    bedrock: Any, submit: Callable[..., str]
) -> None:
    for number in range(3):
        submit(f"job-{number}")
    _, token = page_of(bedrock, maxResults=1)
    for list_others in (bedrock.list_custom_models, bedrock.list_custom_model_deployments):
        assert refused(list_others, nextToken=token)[0] == "ValidationException"
    assert page_of(bedrock, maxResults=1, nextToken=token)[0] == ["job-1"]


def test_repeated_client_token_returns_same_job(
    service: Service, bedrock: Any, bob: Any, database: Any
) -> None:
    members = job_members("job-1", clientRequestToken="once")
    create = bedrock.create_model_customization_job
    first = create(**members)
    service.complete(ALICE, "job-1")
    with service.server.serving(database):
        again = create(**members)
        assert again["jobArn"] == first["jobArn"]
        assert again["ResponseMetadata"]["HTTPStatusCode"] == 201
        other = job_members("job-2", clientRequestToken="once")
        assert refused(create, **other)[0] == "ConflictException"
        assert page_of(bedrock) == (["job-1"], None)
        bob.create_model_customization_job(**other)
    without = job_members("job-1", clientRequestToken="another")
    assert refused(create, **without)[1] == "The provided job name is currently in use."


def test_rejected_request_does_not_consume_client_token(bedrock: Any) -> None:
    create = bedrock.create_model_customization_job
    wrong = job_members("job-1", clientRequestToken="once", baseModelIdentifier="no.such-model")
    assert refused(create, **wrong)[0] == "ResourceNotFoundException"
    create(**job_members("job-1", clientRequestToken="once"))


def test_concurrent_requests_with_same_token_create_single_job(
    service: Service, bedrock: Any
) -> None:
    def create(number: int) -> str:
        members = job_members("job-1", clientRequestToken="once")
        return str(bedrock.create_model_customization_job(**members)["jobArn"])

    with ThreadPoolExecutor(16) as threads:
        arns = set(threads.map(create, range(32)))
    assert len(arns) == 1 and page_of(bedrock) == (["job-1"], None)


def test_tokens_of_deployments_and_throughput(
    service: Service, bedrock: Any, model: Callable[..., str]
) -> None:
    arn = model()
    deployment = {"modelDeploymentName": "d", "modelArn": arn, "clientRequestToken": "once"}
    made = {bedrock.create_custom_model_deployment(**deployment)["customModelDeploymentArn"]}
    made.add(bedrock.create_custom_model_deployment(**deployment)["customModelDeploymentArn"])
    assert len(made) == 1
    conflict = refused(bedrock.create_custom_model_deployment, **{**deployment, "description": "x"})
    assert conflict[0] == "ConflictException"
    share = {"provisionedModelName": "p", "modelId": BASE, "modelUnits": 1}
    # The same token in another operation is another token.
    create = bedrock.create_provisioned_model_throughput
    arns = {create(**share, clientRequestToken="once")["provisionedModelArn"] for _ in range(2)}
    assert len(arns) == 1


@pytest.fixture
def resources(bedrock: Any, submit: Callable[..., str], model: Callable[..., str]) -> list[str]:
    """Create one resource of each kind with tags, each with the tag ``made=yes``."""
    tags = [{"key": "made", "value": "yes"}]
    custom = model("job-0", customModelTags=tags)
    deployed = {"modelDeploymentName": "d", "modelArn": custom, "tags": tags}
    share = {"provisionedModelName": "p", "modelId": BASE, "modelUnits": 1, "tags": tags}
    return [
        submit("job-1", jobTags=tags),
        custom,
        bedrock.create_custom_model_deployment(**deployed)["customModelDeploymentArn"],
        bedrock.create_provisioned_model_throughput(**share)["provisionedModelArn"],
    ]


def tags_on(client: Any, arn: str) -> dict[str, str]:
    found = client.list_tags_for_resource(resourceARN=arn)["tags"]
    return {tag["key"]: tag["value"] for tag in found}


def test_tags_are_added_and_removed(bedrock: Any, bob: Any, resources: list[str]) -> None:
    for arn in resources:
        assert tags_on(bedrock, arn) == {"made": "yes"}
        given = [{"key": "made", "value": "again"}, {"key": "a b/c", "value": ""}]
        bedrock.tag_resource(resourceARN=arn, tags=given)
        assert tags_on(bedrock, arn) == {"made": "again", "a b/c": ""}
        bedrock.untag_resource(resourceARN=arn, tagKeys=["made", "unknown"])
        assert tags_on(bedrock, arn) == {"a b/c": ""}
        for call, members in (
            (bob.list_tags_for_resource, {}),
            (bob.tag_resource, {"tags": given}),
            (bob.untag_resource, {"tagKeys": ["made"]}),
        ):
            assert refused(call, resourceARN=arn, **members)[0] == "ResourceNotFoundException"
        missing = arn[:-12] + "0" * 12
        code, _ = refused(bedrock.list_tags_for_resource, resourceARN=missing)
        assert code == "ResourceNotFoundException"


def test_at_most_fifty_tags(bedrock: Any, submit: Callable[..., str]) -> None:
    arn = submit()

    def many(start: int, count: int) -> list[dict[str, str]]:
        return [{"key": f"key-{each}", "value": "v"} for each in range(start, start + count)]

    bedrock.tag_resource(resourceARN=arn, tags=many(0, 50))
    bedrock.tag_resource(resourceARN=arn, tags=many(0, 50))
    with pytest.raises(bedrock.exceptions.TooManyTagsException) as caught:
        bedrock.tag_resource(resourceARN=arn, tags=many(50, 1))
    assert caught.value.response["resourceName"] == arn
    assert len(tags_on(bedrock, arn)) == 50
    members = job_members("job-2", jobTags=many(0, 51))
    assert refused(bedrock.create_model_customization_job, **members)[0] == "TooManyTagsException"
    assert page_of(bedrock) == (["job-1"], None)
    assert refused(bedrock.tag_resource, resourceARN=arn, tags=many(0, 201))[0] == (
        "ValidationException"
    )


def test_invalid_tags_are_rejected(bedrock: Any, submit: Callable[..., str]) -> None:
    arn = submit()
    for tags in (
        [{"key": "aws:mine", "value": "v"}],
        [{"key": "a", "value": "v"}, {"key": "a", "value": "w"}],
        [{"key": "k" * 129, "value": "v"}],
        [{"key": "a", "value": "<b>"}],
    ):
        assert refused(bedrock.tag_resource, resourceARN=arn, tags=tags)[0] == "ValidationException"
    assert tags_on(bedrock, arn) == {}


def test_tags_are_deleted_with_model(
    service: Service, bedrock: Any, model: Callable[..., str]
) -> None:
    arn = model("job-1", customModelTags=[{"key": "a", "value": "b"}])
    bedrock.delete_custom_model(modelIdentifier=arn)
    code, _ = refused(bedrock.list_tags_for_resource, resourceARN=arn)
    assert code == "ResourceNotFoundException"


def test_client_tokens_are_separate_per_account(bedrock: Any, bob: Any) -> None:
    members = job_members("job-1", clientRequestToken="once")
    first = bedrock.create_model_customization_job(**members)["jobArn"]
    second = bob.create_model_customization_job(**members)["jobArn"]
    assert f":{ALICE}:" in first and f":{BOB}:" in second
