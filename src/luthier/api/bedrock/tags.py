"""Tags of jobs, custom models, deployments and provisioned throughput."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy.orm import Session

from luthier.api.bedrock.control import Operate, Request, not_found, tags_of
from luthier.api.bedrock.identifiers import (
    DEPLOYMENT,
    JOB,
    MODEL,
    PROVISIONED,
    find_deployment,
    find_job,
    find_model,
    find_provisioned,
)
from luthier.store import tags
from luthier.store.arns import Arn, Arns

Find = Callable[[Session, Arns, str, str], object | None]

TAGGABLE: dict[str, Find] = {
    JOB: find_job,
    MODEL: find_model,
    DEPLOYMENT: find_deployment,
    PROVISIONED: find_provisioned,
}
"""How what an ARN names is found, by the kind of the ARN."""


def tag_resource(request: Request) -> dict[str, Any]:
    """Set tags; the same key is replaced."""
    given = tags_of(request["tags"])
    request.allow(request["resourceARN"])
    with request.control.database.write() as session:
        tags.put(session, _resource(request, session), given)
    return {}


def untag_resource(request: Request) -> dict[str, Any]:
    """Take tags away by key."""
    request.allow(request["resourceARN"])
    with request.control.database.write() as session:
        tags.remove(session, _resource(request, session), request["tagKeys"])
    return {}


def list_tags(request: Request) -> dict[str, Any]:
    """All tags, by key."""
    request.allow(request["resourceARN"])
    with request.control.database.read() as session:
        found = tags.read(session, _resource(request, session))
    return {"tags": [{"key": key, "value": value} for key, value in found.items()]}


def _resource(request: Request, session: Session) -> str:
    """The ARN of something that is there, under which its tags are kept."""
    text = request["resourceARN"]
    arn = Arn.parse(text)
    find = TAGGABLE.get(arn.kind) if arn else None
    if find is None or find(session, request.arns, request.account, text) is None:
        raise not_found("resource", text)
    # Partitions of AWS are told apart by clients alone: one resource, one place for its tags.
    return str(arn)


OPERATIONS: dict[str, Operate] = {
    "TagResource": tag_resource,
    "UntagResource": untag_resource,
    "ListTagsForResource": list_tags,
}
