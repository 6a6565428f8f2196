"""OpenAI's protocol: validation of bodies, and error objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from luthier.server.http.messages import Fault, Response
from luthier.validation import describe_constraint, expected_type

JsonObject = dict[str, Any]
INVALID, SERVER = "invalid_request_error", "server_error"
METADATA_KEYS = 16
FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class _Shape:
    """HTTP status, type and code of a kind of fault."""

    status: int
    type: str
    code: str | None = None
    retry: bool | None = None
    """Value of the header ``x-should-retry``; None leaves the decision to the client."""


_UNKNOWN_KEY = _Shape(401, INVALID, "invalid_api_key")
_SHAPES = {
    "Validation": _Shape(400, INVALID),
    "Serialization": _Shape(400, INVALID),
    "MissingAuthenticationToken": _UNKNOWN_KEY,
    "IncompleteSignature": _UNKNOWN_KEY,
    "UnrecognizedClient": _UNKNOWN_KEY,
    "InvalidSignature": _UNKNOWN_KEY,
    "AccessDenied": _Shape(403, "permission_error", "permission_denied"),
    "ResourceNotFound": _Shape(404, INVALID, "not_found"),
    "UnknownOperation": _Shape(404, INVALID, "unknown_url"),
    "MethodNotAllowed": _Shape(404, INVALID, "unknown_url"),
    # The openai client retries a 409. A resource stays in use for longer than the retries.
    "Conflict": _Shape(409, INVALID, "conflict", retry=False),
    "RequestEntityTooLarge": _Shape(413, INVALID, "request_too_large"),
    "Throttling": _Shape(429, "requests", "rate_limit_exceeded"),
    "ServiceQuotaExceeded": _Shape(429, "insufficient_quota", "insufficient_quota", retry=False),
    "ModelNotReady": _Shape(503, SERVER, "model_not_ready"),
    "ServiceUnavailable": _Shape(503, SERVER, "service_unavailable"),
    "ModelTimeout": _Shape(504, SERVER, "timeout", retry=False),
}
_UNEXPECTED = _Shape(500, SERVER, "server_error")
_LATER = (429, 503)


def refusal(fault: Fault) -> Response:
    """Return the response for ``fault``. The fault's detail ``reason`` becomes OpenAI's error code."""
    shape = shape_of(fault)
    headers = {}
    if shape.status in _LATER and shape.retry is not False:
        headers["Retry-After"] = str(fault.details.get("retry_after", 1))
    if shape.retry is not None:
        headers["x-should-retry"] = str(shape.retry).lower()
    return Response.json({"error": error_of(fault)}, shape.status, **headers)


def error_of(fault: Fault) -> dict[str, Any]:
    """Return the error object for a response, a stream event or a batch line."""
    shape = shape_of(fault)
    return {
        "message": fault.message,
        "type": shape.type,
        "param": fault.parameter,
        "code": fault.details.get("reason", shape.code),
    }


def shape_of(fault: Fault) -> _Shape:
    """Return status, type and code of ``fault``. A wrong key is an AccessDenied fault with
    ``credentials``."""
    if fault.code == "AccessDenied" and fault.details.get("credentials"):
        return _UNKNOWN_KEY
    return _SHAPES.get(fault.code, _UNEXPECTED)


def invalid(message: str, parameter: str | None = None, reason: str | None = None) -> Fault:
    """Return a fault with status 400."""
    return Fault("Validation", message, parameter=parameter, reason=reason)


def missing(member: str) -> Fault:
    """Return the fault for a missing required member, with status 400."""
    text = f"Missing required parameter: '{member}'."
    return invalid(text, member, "missing_required_parameter")


def absent(kind: str, identifier: str, parameter: str) -> Fault:
    """Return the fault for an unknown id, with status 404."""
    return Fault("ResourceNotFound", f"No such {kind}: {identifier}", parameter=parameter)


def existing(found: FoundT | None, kind: str, identifier: str, parameter: str) -> FoundT:
    """Return what was found for an id.

    Raises:
        Fault: 404 without a result.
    """
    if found is None:
        raise absent(kind, identifier, parameter)
    return found


def model_not_found(model: str) -> Fault:
    """Return the fault for an unknown model, with status 404."""
    text = f"The model `{model}` does not exist or you do not have access to it."
    return Fault("ResourceNotFound", text, parameter="model", reason="model_not_found")


class Body(BaseModel):
    """A JSON body with strict types. Unknown members are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


_NOTHING: tuple[Any, ...] = (None, False, "", [], "none", "auto")
"""Values of unsupported members that request no feature."""


class StrictBody(Body):
    """A body that rejects unknown members, as OpenAI does: a misspelt member would have no effect."""

    model_config = ConfigDict(extra="forbid")
    without_effect: ClassVar[frozenset[str]] = frozenset()
    """OpenAI members that are accepted without effect."""
    unsupported: ClassVar[Mapping[str, str]] = {}
    """Unsupported OpenAI members and reasons. Values that request no feature are accepted."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, members: Any) -> Any:
        if not isinstance(members, dict):
            return members
        for name, text in cls.unsupported.items():
            if name in members and members[name] not in _NOTHING:
                raise invalid(f"{text}.", name, "unsupported_parameter")
        unused = cls.without_effect.union(cls.unsupported)
        return {name: value for name, value in members.items() if name not in unused}


Parsed = TypeVar("Parsed", bound=BaseModel)


def validate(body: Mapping[str, Any], kind: type[Parsed], under: str = "") -> Parsed:
    """Return ``body`` as ``kind``; ``under`` is the location of ``body`` in the request."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid_member(error.errors(include_url=False), body, under) from error


def invalid_member(errors: Sequence[Mapping[str, Any]], body: Any, under: str = "") -> Fault:
    """Return the fault for pydantic's ``errors``, about the first invalid member of ``body``."""
    errors_of_member = _errors_of_one_member(errors, body)
    where = _format_location([part for part in (under, *errors_of_member[0]["loc"]) if part != ""])
    if not where:
        return invalid("The body of the request must be a JSON object.")
    kind, context = errors_of_member[0]["type"], errors_of_member[0].get("ctx", {})
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        where += f".{context['discriminator'].strip(chr(39))}"
    if kind in ("missing", "union_tag_not_found"):
        return missing(where)
    if kind == "extra_forbidden":
        return invalid(f"Unknown parameter: '{where}'.", where, "unknown_parameter")
    if kind == "union_tag_invalid":
        text = f"must have one of the types {context['expected_tags']}"
    else:
        text = " or ".join(dict.fromkeys(map(describe_constraint, errors_of_member)))
    code = "invalid_type" if all(map(expected_type, errors_of_member)) else "invalid_value"
    return invalid(f"Invalid value for '{where}': {text}.", where, code)


def _errors_of_one_member(errors: Sequence[Mapping[str, Any]], body: Any) -> list[Any]:
    """Return all errors about the first invalid member.

    For a union, an error about the value precedes errors about the type.
    """
    cleaned = [{**each, "loc": _without_tags(each["loc"], body)} for each in errors]
    same = [each for each in cleaned if each["loc"][:1] == cleaned[0]["loc"][:1]]
    value = [
        each for each in same if expected_type(each) is None and each["type"] != "literal_error"
    ]
    locations = [_format_location(each["loc"]) for each in same]
    location = _format_location(value[0]["loc"]) if value else max(locations, key=len)
    own = [each for each, at in zip(same, locations, strict=True) if at == location]
    return value[:1] + [each for each in own if each not in value[:1]]


def _without_tags(location: Sequence[str | int], value: Any) -> tuple[str | int, ...]:
    """Return ``location`` without the union tags that pydantic inserts after an object with a
    ``type``."""
    parts: list[str | int] = []
    for index, part in enumerate(location):
        if isinstance(value, Mapping) and value.get("type") == part:
            next_part = location[index + 1 : index + 2]
            if part not in value or (next_part and next_part[0] in value):
                continue
        parts.append(part)
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
    return tuple(parts)


def _format_location(location: Sequence[str | int]) -> str:
    """Return a location such as ``messages[0].content``, without pydantic's names of union members."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() or not text:
            # pydantic inserts the type names of union members, which are not members of the body.
            if part in _ARMS or part[:1].isupper():
                continue
            text += f".{part}" if text else part
    return text


_ARMS = {"str", "int", "float", "bool", "list", "dict", "none", "constrained"}


def _metadata(value: dict[str, str] | None) -> dict[str, str] | None:
    if value is not None and len(value) > METADATA_KEYS:
        raise ValueError(f"at most {METADATA_KEYS} keys are allowed")
    for key, text in (value or {}).items():
        if len(key) > 64 or len(text) > 512:
            raise ValueError("keys have at most 64 characters, values 512")
    return value


Metadata = Annotated[dict[str, str] | None, AfterValidator(_metadata)]


def seconds(moment: datetime | None) -> int | None:
    """Return the Unix time in seconds."""
    return None if moment is None else int(moment.timestamp())
