"""What an operation of the native face is, and the face that finds and checks it.

An operation names its parts once: path, query, body and answer are pydantic models, from which requests
are checked, answers written and the OpenAPI document made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, ValidationError

from luthier.api.wire import Answer, Call, Fault, Route
from luthier.jobs.submit import SETTABLE_DATA

STATUS = {
    "Validation": 400, "Serialization": 400, "Conflict": 409, "ServiceQuotaExceeded": 400,
    "MissingAuthenticationToken": 401, "UnrecognizedClient": 401, "InvalidSignature": 401,
    "ExpiredToken": 401,
    "IncompleteSignature": 400, "AccessDenied": 403, "ResourceNotFound": 404, "UnknownOperation": 404,
    "MethodNotAllowed": 405, "RequestEntityTooLarge": 413,
    "RequestTimeout": 408, "Throttling": 429, "InternalServer": 500,
    "ServiceUnavailable": 503,
}  # fmt: skip
"""HTTP status of each fault; 400 for others."""


class Part(BaseModel):
    """What is sent: its fields are known, others are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Told(BaseModel):
    """What is answered."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Empty(Part):
    """Nothing is sent."""


@dataclass(frozen=True)
class Request:
    """A call whose parts were checked."""

    call: Call
    params: dict[str, str]
    query: Any
    body: Any

    @property
    def account(self) -> str:
        """Whose things are meant."""
        return self.call.caller.account


@dataclass(frozen=True)
class Operation:
    """One thing that clients can ask for."""

    name: str
    method: str
    path: str
    """With names in braces: ``/api/v1/jobs/{job}``."""
    run: Callable[[Request], Any]
    """Gives an ``answer``, or an :class:`Answer` that is sent as it is."""
    about: str
    """One sentence for the document."""
    answer: type[BaseModel] | None = None
    """``None`` where an :class:`Answer` is given."""
    query: type[BaseModel] = Empty
    body: type[BaseModel] | None = None
    status: int = 200
    media: str = "application/json"
    """Of the answer."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches raw paths; a name takes one segment."""
        return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(self.path)))


_ABOVE = {"base": "base", "data.train": "training", "data.validation": "validation",
          "teacher.model": "teacher", "objective.grader": "grader"}  # fmt: skip
"""What is no setting of a job but a member of its own."""
_SETTINGS = ("training.", "adaptation.", "objective.", "sampling.", "insights.", "method")


def setting_name(field: str, value: str | None) -> str | None:
    """What the native API calls a field of the recipe (:mod:`luthier.setting_names`)."""
    said = "" if value is None else f"={value}"
    for prefix, member in _ABOVE.items():
        if field == prefix or field.startswith(f"{prefix}."):
            return f"{member}{field.removeprefix(prefix)}{said}"
    group, _, rest = field.partition(".")
    if field.startswith(_SETTINGS) or (group == "data" and rest.partition(".")[0] in SETTABLE_DATA):
        return f"settings.{field}{said}"
    return None


class NativeFace:
    """Finds operations by method and path."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = tuple(operations)
        self._patterns = [(each.pattern, each) for each in operations]

    def route(self, method: str, path: str) -> Route:
        """The operation of a raw path; :class:`Fault` where there is none."""
        allowed = []
        for pattern, operation in self._patterns:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            if operation.method == method:
                params = {name: unquote(text) for name, text in found.groupdict().items()}
                return Route(f"native.{operation.name}", partial(_run, operation), params)
            allowed.append(operation.method)
        if allowed:
            text = f"{path} takes {', '.join(sorted(allowed))}."
            raise Fault("MethodNotAllowed", text, allow=", ".join(sorted(allowed)))
        raise Fault("UnknownOperation", f"There is no {method} {path}; see /api/v1/openapi.json.")

    def refusal(self, fault: Fault, request_id: str) -> Answer:
        """``{"error": {"code", "message", "parameter"}}``."""
        fault = fault.named(setting_name)
        error = {"code": fault.code, "message": fault.message, "parameter": fault.parameter}
        headers = {"x-request-id": request_id}
        if "retry_after" in fault.details:
            headers["Retry-After"] = str(fault.details["retry_after"])
        if "allow" in fault.details:
            headers["Allow"] = str(fault.details["allow"])
        told = {key: value for key, value in error.items() if value is not None}
        return Answer.of({"error": told}, STATUS.get(fault.code, 400), **headers)


def _run(operation: Operation, call: Call) -> Answer:
    query = {key: values[-1] for key, values in call.query.items()}
    parsed = _parsed(operation.query, query)
    body = None
    if operation.body is not None:
        body = _parsed(operation.body, _json(call))
    given = operation.run(Request(call, dict(call.params), parsed, body))
    headers = {"x-request-id": call.request_id}
    if isinstance(given, Answer):
        return Answer(given.status, given.body, {**headers, **given.headers})
    plain = given.model_dump(mode="json", exclude_none=True)
    return Answer.of(plain, operation.status, **headers)


def _json(call: Call) -> Any:
    try:
        return call.json if call.body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise Fault("Serialization", f"The body is no JSON: {error}.") from error


def _parsed(kind: type[BaseModel], value: Any) -> Any:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)
        places = [".".join(map(str, each["loc"])) for each in first]
        text = "; ".join(
            f"{place or 'the body'}: {each['msg']}"
            for place, each in zip(places, first, strict=True)
        )
        raise Fault("Validation", text, parameter=places[0] or None) from error
