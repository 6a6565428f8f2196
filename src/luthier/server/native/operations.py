"""Shared parts of the native API: FastAPI routes, the authenticated call, and error responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Semaphore
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from luthier.server.actions import record_action, record_created
from luthier.server.components import Components
from luthier.server.http.messages import Fault
from luthier.server.http.messages import Response as Answer
from luthier.server.http.routes import ApiCall, ApiRoute, api_router
from luthier.server.identifiers import find_model
from luthier.server.jobs.submit import SETTABLE_DATA
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.foundation import FoundationModel
from luthier.validation import describe_located_error

STATUS = {
    "Validation": 400, "Serialization": 400, "Conflict": 409, "ServiceQuotaExceeded": 400,
    "MissingAuthenticationToken": 401, "UnrecognizedClient": 401, "InvalidSignature": 401,
    "IncompleteSignature": 400, "AccessDenied": 403, "ResourceNotFound": 404, "UnknownOperation": 404,
    "MethodNotAllowed": 405, "RequestEntityTooLarge": 413,
    "Throttling": 429, "InternalServer": 500,
    "ServiceUnavailable": 503, "ModelNotReady": 503, "ModelError": 500, "ModelTimeout": 504,
}  # fmt: skip
"""HTTP status by fault code; 400 for other codes."""
ResultState = Literal["Queued", "Running", "Stopping", "Completed", "Failed", "Stopped"]
"""State of an export, an evaluation, a comparison or a study."""
MOST_ERRORS = 10
"""Maximum number of validation errors in a message."""


class Input(BaseModel):
    """Body or query of a request; unknown fields are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Page(Input):
    """Page of a list, newest first."""

    limit: int = Field(default=100, ge=1, le=1000)
    position: int | None = Field(default=None, ge=0, le=2**62)
    """``next`` of the previous page."""

    def next(self, rows: Sequence[Any]) -> int | None:
        """Return the position of the next page from ``limit + 1`` rows; ``None`` without a page."""
        return int(rows[self.limit - 1].seq) if len(rows) > self.limit else None


class View(BaseModel):
    """Body of a response."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ErrorDetail(View):
    """Error of a request."""

    code: str
    message: str
    parameter: str | None = None
    """Invalid field of the request."""
    rule: str | None = None
    """Id of the violated rule, if a check rejected the request."""


class ErrorView(View):
    """Response to a rejected or failed request."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorView, "description": f"Refused with status {status}."}
    for status in sorted(set(STATUS.values()))
}
ERRORS["4XX"] = {"model": ErrorView}  # replaces FastAPI's error format
_ABOVE = {"base": "base", "data.train": "training", "data.validation": "validation",
          "teacher.model": "teacher", "objective.grader": "grader"}  # fmt: skip
"""Fields of a new job by recipe setting; all other settings are below ``settings``."""
_SETTINGS = (
    "training.", "adaptation.", "objective.", "sampling.", "insights.",
    *(f"data.{name}" for name in SETTABLE_DATA),
)  # fmt: skip


def setting_name(setting: str) -> str:
    """Return the native API's name of a recipe setting, such as ``training.epochs=3``."""
    setting = setting.removeprefix("--")  # studies name options of the command
    for prefix, member in _ABOVE.items():
        if setting == prefix or setting.startswith((f"{prefix}.", f"{prefix}=")):
            return f"{member}{setting.removeprefix(prefix)}"
    return f"settings.{setting}" if setting.startswith(_SETTINGS) else setting


def refusal(fault: Fault, request_id: str) -> Answer:
    """Return the response ``{"error": {"code", "message", "parameter", "rule"}}``."""
    fault = fault.with_setting_names(setting_name)
    parameter, rule = fault.parameter, fault.rule or None
    error = ErrorDetail(code=fault.code, message=fault.message, parameter=parameter, rule=rule)
    headers = {"Allow": fault.details["allow"]} if "allow" in fault.details else {}
    body = {"error": error.model_dump(exclude_none=True)}
    return Answer.json(body, STATUS.get(fault.code, 400), **headers)


class NativeRoute(ApiRoute):
    """Route whose function name determines the operation and the IAM action."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        first, *rest = endpoint.__name__.split("_")
        name = first + "".join(map(str.capitalize, rest))
        self.operation = f"native.{name}"
        self.action = f"luthier:{name[0].upper()}{name[1:]}"
        super().__init__(
            path, endpoint, **{**options, "operation_id": name, "response_model_exclude_none": True}
        )

    def invalid(self, error: RequestValidationError) -> Fault:
        """Return a fault that describes the first errors."""
        found = error.errors()
        # pydantic leaves invalid items out of the length of an array.
        inner = {each["loc"][:-1] for each in found}
        first = [e for e in found if e["type"] != "too_short" or e["loc"] not in inner]
        first = first[:MOST_ERRORS]
        text = "; ".join(describe_located_error(each, "the body", 1) for each in first)
        parameter = ".".join(map(str, first[0]["loc"][1:]))
        return Fault("Validation", text, parameter=parameter or None)

    async def parse(self, request: Request) -> Any:
        """Return the JSON body, or the body for an uploaded file."""
        kind = request.headers.get("content-type", "").partition("/")[0].strip().lower()
        sent = (self.openapi_extra or {}).get("requestBody", {"content": ()})
        if self.body_field is not None and f"{kind}/*" in sent["content"]:
            model: Any = self.body_field.field_info.annotation
            return model.from_file(kind, await request.body())
        return await super().parse(request)


def uploads(*kinds: str) -> dict[str, Any]:
    """Return the OpenAPI description for file uploads of ``kinds`` (``image``, ``audio``); see
    ``from_file``."""
    file = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"content": {f"{kind}/*": file for kind in kinds}}}


def native_router() -> APIRouter:
    """Return an empty router for operations below ``/api/v1``."""
    return api_router("/api/v1", NativeRoute, responses=ERRORS)


class Context(Components):
    """Parts of the server that the native API uses."""

    def base(self, account: str, name: str) -> FoundationModel | CustomModel:
        """Return a foundation model, or a custom model of the account, by any name."""
        model = self.models.base(account, name)
        if model is None:
            raise not_found("model", name)
        return model


class Call(ApiCall[Context]):
    """A call of an operation by an authenticated caller."""

    def record(self, path: str) -> None:
        """Record the resource ``path``, the last part of an ARN, as changed by the operation, for
        the audit log.
        """
        kind, _, rest = path.partition("/")
        record_action(self.action, self.context.arns.of(self.account, kind, rest))

    def record_created(self, path: str) -> None:
        """Record that the operation created the resource ``path``."""
        kind, _, rest = path.partition("/")
        record_created(self.context.arns.of(self.account, kind, rest))

    def model(self, session: Session, name: str, *, active: bool = False) -> CustomModel:
        """Return the account's model, and record the model's ARN for the audit log."""
        model = find_model(session, self.context.arns, self.account, name)
        self.record(
            f"custom-model/{model.foundation}/{model.id}" if model else f"custom-model/{name}"
        )
        if model is None or (active and model.status != ACTIVE):
            raise not_found("model", name)
        return model


def not_found(noun: str, name: str) -> Fault:
    """Return the fault for an unknown name."""
    return Fault("ResourceNotFound", f"There is no {noun} {name!r}.")


@contextmanager
def limit_concurrency(free: Semaphore, busy: str, retry_seconds: int) -> Iterator[None]:
    """Run the block while ``free`` has a place.

    Raises:
        Fault: ``Throttling`` with the text ``busy``, without a place.
    """
    if not free.acquire(blocking=False):
        raise Fault("Throttling", busy, retry_after=retry_seconds)
    try:
        yield
    finally:
        free.release()


NativeCall = Annotated[Call, Depends(Call.of)]
