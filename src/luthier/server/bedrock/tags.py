"""Tag operations for jobs, custom models, deployments and provisioned throughput."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy.orm import Session

from luthier.server.bedrock.control import ControlRequest, Operate, not_found, parse_tags
from luthier.server.identifiers import (
    JOB,
    MODEL,
    find_endpoint,
    find_job,
    find_model,
)
from luthier.server.tables import tags
from luthier.server.tables.arns import Arn
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.endpoints import DEPLOYMENT, PROVISIONED
from luthier.server.tables.jobs import Job

_BY_KIND: Mapping[str, Callable[..., Job | CustomModel | None]] = {
    JOB: find_job,
    MODEL: find_model,
}


def tag_resource(request: ControlRequest) -> dict[str, Any]:
    """Set tags. A tag replaces the value of an existing key."""
    sent = parse_tags(request["tags"])
    request.record(request["resourceARN"])
    with request.control.database.write() as session:
        tags.put(session, _resource(request, session), sent)
    return {}


def untag_resource(request: ControlRequest) -> dict[str, Any]:
    """Remove tags by key."""
    request.record(request["resourceARN"])
    with request.control.database.write() as session:
        tags.remove(session, _resource(request, session), request["tagKeys"])
    return {}


def list_tags(request: ControlRequest) -> dict[str, Any]:
    """List the tags of a resource by key."""
    request.record(request["resourceARN"])
    with request.control.database.read() as session:
        resource_tags = tags.read(session, _resource(request, session))
    return {"tags": [{"key": key, "value": value} for key, value in resource_tags.items()]}


def _resource(request: ControlRequest, session: Session) -> str:
    """Return the ARN of an existing resource, the key of the tag table."""
    identifier = request["resourceARN"]
    arn = Arn.parse(identifier)
    row: object | None = None
    if arn is not None and arn.kind in (DEPLOYMENT, PROVISIONED):
        row = find_endpoint(session, request.arns, request.account, arn.kind, identifier)
    elif arn is not None and arn.kind in _BY_KIND:
        row = _BY_KIND[arn.kind](session, request.arns, request.account, identifier)
    if row is None:
        raise not_found("resource", identifier)
    # Normalizes the partition (aws, aws-cn …), so that a resource has one set of tags.
    return str(arn)


OPERATIONS: dict[str, Operate] = {
    "TagResource": tag_resource,
    "UntagResource": untag_resource,
    "ListTagsForResource": list_tags,
}
