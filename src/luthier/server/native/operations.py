"""Operations of the native face, the face that finds and checks them, and its OpenAPI 3.1 document.

An operation names its parts once: path, query, body and answer are pydantic models, from which requests
are checked, answers written and the document made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.json_schema import models_json_schema
from sqlalchemy.orm import Session

from luthier.limits import AccountQuotas
from luthier.server.audit import record_action
from luthier.server.http.messages import (
    Fault,
    Request,
    RequestHead,
    Response,
)
from luthier.server.http.routing import Operation, Route, Router
from luthier.server.identifiers import (
    Invocable,
    find_foundation,
    find_model,
    invocable,
    invocable_model,
    resolve_name,
)
from luthier.server.jobs.submit import SETTABLE_DATA
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.foundation import FoundationModel
from luthier.server.tables.locations import Locations
from luthier.validation import describe_error

STATUS = {
    "Validation": 400, "Serialization": 400, "Conflict": 409, "ServiceQuotaExceeded": 400,
    "MissingAuthenticationToken": 401, "UnrecognizedClient": 401, "InvalidSignature": 401,
    "IncompleteSignature": 400, "AccessDenied": 403, "ResourceNotFound": 404, "UnknownOperation": 404,
    "MethodNotAllowed": 405, "RequestEntityTooLarge": 413,
    "Throttling": 429, "InternalServer": 500,
    "ServiceUnavailable": 503, "ModelNotReady": 503, "ModelError": 500, "ModelTimeout": 504,
}  # fmt: skip
"""HTTP status of each fault; 400 for others."""
MOST_ERRORS = 10
"""Errors of a body that a response names."""
_REFERENCE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "parameter": {"type": "string", "description": "The field that is meant."},
            },
        }
    },
}


class Input(BaseModel):
    """What is sent: its fields are known, others are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class View(BaseModel):
    """What is answered."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Empty(Input):
    """Nothing is sent."""


@dataclass(frozen=True)
class NativeOperation:
    """One thing that clients can ask for, with the models of its parts."""

    name: str
    method: str
    path: str
    """With names in braces: ``/api/v1/jobs/{job}``."""
    run: Callable[..., Any]
    """Called with the request, and with its query or body if it has one; gives an ``answer``, or a
    :class:`Response` that is sent as it is."""
    about: str
    """One sentence for the document."""
    answer: type[BaseModel] | None = None
    """``None`` where an :class:`Response` is given."""
    query: type[BaseModel] = Empty
    body: type[BaseModel] | None = None
    status: int = 200
    media: str = "application/json"
    """Of the answer."""
    pictures: bool = False
    """Whether ``Accept: image/png`` gets a picture instead."""
    upload: Callable[[Request], dict[str, Any]] | None = None
    """Makes the members of ``body`` from one that is an image or a sound itself, and no JSON."""
    uploads: tuple[str, ...] = ()
    """What such a body may be: ``image``, ``audio``."""
    long: bool = False
    """Whether it takes a model's time."""


_ABOVE = {"base": "base", "data.train": "training", "data.validation": "validation",
          "teacher.model": "teacher", "objective.grader": "grader"}  # fmt: skip
"""What is no setting of a job but a member of its own."""
_SETTINGS = (
    "training.", "adaptation.", "objective.", "sampling.", "insights.",
    *(f"data.{name}" for name in SETTABLE_DATA),
)  # fmt: skip


def setting_name(setting: str) -> str:
    """Return the native API's name for a setting of a recipe, such as ``training.epochs=3``."""
    for prefix, member in _ABOVE.items():
        if setting == prefix or setting.startswith((f"{prefix}.", f"{prefix}=")):
            return f"{member}{setting.removeprefix(prefix)}"
    return f"settings.{setting}" if setting.startswith(_SETTINGS) else setting


class NativeFace:
    """Finds operations by method and path."""

    name, request_id_header = "native", "x-request-id"

    def __init__(self, operations: Sequence[NativeOperation]) -> None:
        self.router = Router(
            Operation(
                f"native.{each.name}",
                each.method,
                each.path,
                partial(_run, each),
                long=each.long,
                action=f"luthier:{each.name[0].upper()}{each.name[1:]}",
            )
            for each in operations
        )

    def serves(self, head: RequestHead, service: str) -> bool:
        """What is below its path."""
        return head.path.startswith("/api/")

    def route(self, head: RequestHead) -> Route:
        """What answers to a request; :class:`Fault` where nothing does."""
        routes = self.router.routes(head.path)
        if head.method in routes:
            return routes[head.method]
        if routes:
            methods = ", ".join(sorted(routes))
            raise Fault("MethodNotAllowed", f"{head.path} takes {methods}.", allow=methods)
        text = f"There is no {head.method} {head.path}; see /api/v1/openapi.json."
        raise Fault("UnknownOperation", text)

    def refusal(self, fault: Fault, request_id: str) -> Response:
        """``{"error": {"code", "message", "parameter"}}``."""
        fault = fault.with_setting_names(setting_name)
        error = {"code": fault.code, "message": fault.message, "parameter": fault.parameter}
        headers = {"Allow": fault.details["allow"]} if "allow" in fault.details else {}
        body = {key: value for key, value in error.items() if value is not None}
        return Response.json({"error": body}, STATUS.get(fault.code, 400), **headers)


def _run(operation: NativeOperation, request: Request) -> Response:
    query = {key: values[-1] for key, values in request.query.items()}
    parts = [_parse(operation.query, query)] if operation.query is not Empty or query else []
    if operation.body is not None:
        uploaded = operation.upload and content_kind(request) in operation.uploads
        sent = operation.upload(request) if operation.upload and uploaded else _json(request)
        parts.append(_parse(operation.body, sent))
    given = operation.run(request, *parts)
    if isinstance(given, Response):
        return given
    return Response.json(given.model_dump(mode="json", exclude_none=True), operation.status)


def content_kind(request: Request) -> str:
    """What the body is by its header: ``application``, ``image``, ``audio``, …."""
    return request.headers.get("content-type", "").partition("/")[0].strip().lower()


def _json(request: Request) -> Any:
    try:
        return request.json if request.body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise Fault("Serialization", f"The body is no JSON: {error}.") from error


def _parse(kind: type[BaseModel], value: Any) -> Any:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[:MOST_ERRORS]
        places = [".".join(map(str, each["loc"])) for each in first]
        text = "; ".join(
            f"{place or 'the body'}{describe_error(each)}"
            for place, each in zip(places, first, strict=True)
        )
        raise Fault("Validation", text, parameter=places[0] or None) from error


def document(operations: Sequence[NativeOperation], version: str) -> dict[str, Any]:
    """The whole document, ready for JSON."""
    bodies = [each.body for each in operations if each.body is not None]
    answers = [each.answer for each in operations if each.answer is not None]
    wanted: list[tuple[type[BaseModel], Any]] = [(each, "validation") for each in bodies]
    wanted += [(each, "serialization") for each in answers]
    references, found = models_json_schema(
        list(dict.fromkeys(wanted)),
        ref_template=_REFERENCE,  # each model once
    )
    schemas = {"Error": _ERROR, **found.get("$defs", {})}
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each, references)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "luthier",
            "version": version,
            "description": "Jobs, reports, estimates, models and certificates of a luthier server.",
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(each: NativeOperation, references: Any) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"type": "object"}}
    if each.answer is not None:
        content = {"schema": references[each.answer, "serialization"]}
    elif each.media != "application/json":
        content = {"schema": {"type": "string"}}
    answers = {each.media: content}
    if each.pictures:
        answers["image/png"] = {"schema": {"format": "binary"}}
    described: dict[str, Any] = {
        "operationId": each.name,
        "summary": each.about,
        "parameters": [*_path(each), *_query(each.query)],
        "responses": {
            str(each.status): {"description": each.about, "content": answers},
            **{str(status): _error_response(status) for status in sorted(set(STATUS.values()))},
        },
    }
    if each.body is not None:
        schema = references[each.body, "validation"]
        sent = {f"{kind}/*": {"schema": {"format": "binary"}} for kind in each.uploads}
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}, **sent},
        }
    return described


def _error_response(status: int) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model="Error")}
    return {
        "description": f"Refused with status {status}.",
        "content": {"application/json": {"schema": schema}},
    }


def _path(each: NativeOperation) -> list[dict[str, Any]]:
    names = re.findall(r"\{(\w+)\}", each.path)
    schema = {"type": "string", "minLength": 1}
    return [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]


def _query(kind: type[BaseModel]) -> list[dict[str, Any]]:
    schema = kind.model_json_schema()
    needed = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in needed, "schema": value}
        for name, value in schema.get("properties", {}).items()
    ]


@dataclass(frozen=True)
class Context:
    """The service, as one face sees it."""

    database: Database
    arns: Arns
    locations: Locations
    quotas: Callable[[str], AccountQuotas]
    """Of an account."""
    wake: Callable[[], None]
    """Tells the scheduler that there is something to do."""
    delete_model: Callable[[CustomModel], None]
    """Deletes a model, wherever it is; raises ``WrongState`` where it is in use."""

    def record(self, request: Request, action: str, path: str) -> None:
        """Note ``action`` for the audit log; ``path`` is the end of an ARN, or ``*`` for everything."""
        kind, _, rest = path.partition("/")
        resource = path if path == "*" else self.arns.of(request.account, kind, rest)
        record_action(f"luthier:{action}", resource)

    def record_base(self, action: str, model: FoundationModel) -> None:
        """Note for the audit log an action on a foundation model."""
        record_action(f"luthier:{action}", self.arns.foundation_model(model.id))

    def base(
        self, session: Session, account: str, identifier: str
    ) -> FoundationModel | CustomModel:
        """The foundation model, or the account's custom model, of an id, alias, name or ARN."""
        found = find_foundation(self.arns, identifier)
        return found or self.custom(session, account, identifier, active=True)

    def asked_model(
        self, request: Request, session: Session, action: str, *, active: bool = False
    ) -> CustomModel:
        """Return the account's model that the path names, and record its ARN for the audit log."""
        name = request.params["model"]
        model = find_model(session, self.arns, request.account, name)
        if model is not None and active and model.status != ACTIVE:
            model = None
        path = f"{model.foundation}/{model.id}" if model else name
        self.record(request, action, f"custom-model/{path}")
        if model is None:
            raise not_found("model", name)
        return model

    def invoked_model(self, request: Request, action: str) -> Invocable:
        """Return the model that answers to the name in the path.

        The name is of a deployment or of a custom model; see
        :func:`luthier.server.identifiers.resolve_name`.
        """
        name = request.params["model"]
        named = resolve_name(self.database, self.arns, request.account, name)
        if named != name:
            self.record(request, action, named.rpartition(":")[2])
            return invocable(self.database, self.arns, request.account, named)
        found = invocable_model(self.database, self.arns, request.account, name)
        path = f"custom-model/{name}" if found is None else found.arn.rpartition(":")[2]
        self.record(request, action, path)
        if found is None:
            raise not_found("model", name)
        return found

    def custom(
        self, session: Session, account: str, identifier: str, active: bool = False
    ) -> CustomModel:
        """The account's custom model of this name, id, ``ft:`` id or ARN."""
        model = find_model(session, self.arns, account, identifier)
        if model is None or (active and model.status != ACTIVE):
            raise not_found("model", identifier)
        return model


def not_found(noun: str, name: str) -> Fault:
    """Nothing of this account is called so."""
    return Fault("ResourceNotFound", f"There is no {noun} {name!r}.")
