"""Shared parts of the OpenAI API: FastAPI routes, the authenticated call, and list pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError

from luthier.limits import MIB, ServerLimits
from luthier.server.actions import record_action, record_created
from luthier.server.components import Components
from luthier.server.http.messages import Fault
from luthier.server.http.routes import ApiCall, ApiRoute, api_router
from luthier.server.openai.protocol import JsonObject, invalid, invalid_member

if TYPE_CHECKING:
    from luthier.server.openai.batches import BatchRunner
    from luthier.server.openai.eval_runner import EvalParts, EvaluationRunner
    from luthier.server.openai.generation import Inference
    from luthier.server.openai.ingestion import IngestionRunner
    from luthier.server.stores.conversations import Conversations
    from luthier.server.stores.store_indexes import StoreIndexes
    from luthier.server.stores.uploaded_files import UploadedFiles

GRADER_BODY_BYTES = 4 * MIB
"""Maximum size of a request with graders, in bytes."""


@dataclass(frozen=True, kw_only=True)
class Context(Components):
    """Parts of the server that the OpenAI API uses."""

    files: UploadedFiles
    inference: Inference
    batches: BatchRunner
    indexes: StoreIndexes
    ingestion: IngestionRunner
    evaluations: EvaluationRunner
    eval_parts: EvalParts
    limits: ServerLimits
    conversations: Conversations


class Call(ApiCall[Context]):
    """A call of an operation by an authenticated caller."""

    def record(self, kind: str, identifier: str = "*") -> None:
        """Record a resource of ``kind`` as changed by the operation, for the audit log."""
        record_action(self.action, self.context.arns.openai(self.account, kind, identifier))

    def record_created(self, kind: str, identifier: str) -> None:
        """Record that the operation created a resource of ``kind``."""
        record_created(self.context.arns.openai(self.account, kind, identifier))


OpenAICall = Annotated[Call, Depends(Call.of)]


class OpenAIRoute(ApiRoute):
    """Route with the operation's name as route name, such as ``batches.create``."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        self.operation = f"openai.{options['name']}"
        self.action = f"luthier:{self.operation}"
        options["operation_id"] = options["operation_id"] or options["name"]
        super().__init__(path, endpoint, **options)

    def invalid(self, error: RequestValidationError) -> Fault:
        """Return a fault that names the first invalid member."""
        return invalid_member(
            [{**each, "loc": each["loc"][1:]} for each in error.errors()], error.body
        )

    def not_json(self, error: ValueError) -> Fault:
        """Return the fault for a body that is not JSON."""
        return invalid(f"The body of the request is not valid JSON: {error}.")


class GraderRoute(OpenAIRoute):
    """Route for requests that contain graders."""

    body_limit = GRADER_BODY_BYTES


def openai_router(route_class: type[OpenAIRoute] = OpenAIRoute) -> APIRouter:
    """Return an empty router for operations below ``/v1``."""
    return api_router("/v1", route_class)


Limit = Annotated[int, Query(ge=1, le=100)]
"""Maximum number of rows of a page."""
Order = Literal["asc", "desc"]
Row = TypeVar("Row")


def metadata_filter(request: Request) -> dict[str, str]:
    """Return the values of the query's ``metadata[KEY]=VALUE``."""
    return {
        key[len("metadata[") : -1]: value
        for key, value in request.query_params.items()
        if key.startswith("metadata[") and key.endswith("]")
    }


def page(
    rows: Sequence[Any], limit: int, to_object: Callable[[Any], JsonObject] = dict
) -> JsonObject:
    """Return a list object of at most ``limit`` rows. An additional row in ``rows`` means that
    more rows follow."""
    data = [to_object(row) for row in rows[:limit]]
    return {
        "object": "list",
        "data": data,
        "has_more": len(rows) > limit,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def row_before(after: str | None, noun: str, find: Callable[[str], Row | None]) -> Row | None:
    """Return the last row of the previous page, or None for the first page.

    Raises:
        Fault: 400 if no row has the id ``after``.
    """
    if after is None:
        return None
    row = find(after)
    if row is None:
        raise invalid(f"No such {noun}: {after}.", "after")
    return row
