"""OpenAI's protocol: bodies checked, queries, permissions, pages of lists, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from luthier.server.audit import record_action
from luthier.server.http.messages import (
    Fault,
    Request,
    Response,
    parse_digits,
)
from luthier.server.openai.validation import describe_error
from luthier.server.tables.arns import Arns
from luthier.validation import expected_type

INVALID, SERVER = "invalid_request_error", "server_error"
METADATA_KEYS = 16


@dataclass(frozen=True)
class _Shape:
    """How a kind of fault is told."""

    status: int
    type: str
    code: str | None = None
    retry: bool | None = None
    """Whether the client is told to try again; ``None`` leaves that to its own rules."""


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
    # The client repeats a 409 by itself; what is in use stays so for longer than that.
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
    """``fault`` as an answer. Details: ``reason`` is OpenAI's code, ``retry_after`` seconds."""
    shape = shape_of(fault)
    headers = {}
    if shape.status in _LATER and shape.retry is not False:
        headers["Retry-After"] = str(fault.details.get("retry_after", 1))
    if shape.retry is not None:
        headers["x-should-retry"] = str(shape.retry).lower()
    return Response.json({"error": error_of(fault)}, shape.status, **headers)


def error_of(fault: Fault) -> dict[str, Any]:
    """The inner object of a refusal, as streams and batches hold it too."""
    shape = shape_of(fault)
    return {
        "message": fault.message,
        "type": shape.type,
        "param": fault.parameter,
        "code": fault.details.get("reason", shape.code),
    }


def shape_of(fault: Fault) -> _Shape:
    """How ``fault`` is told; an unknown key is an access denied that names no action."""
    if fault.code == "AccessDenied" and fault.details.get("credentials"):
        return _UNKNOWN_KEY
    return _SHAPES.get(fault.code, _UNEXPECTED)


def invalid(message: str, parameter: str | None = None, reason: str | None = None) -> Fault:
    """A request that cannot be carried out: 400."""
    return Fault("Validation", message, parameter=parameter, reason=reason)


def missing(member: str) -> Fault:
    """A member that is needed and not there: 400."""
    text = f"Missing required parameter: '{member}'."
    return invalid(text, member, "missing_required_parameter")


def absent(kind: str, identifier: str, parameter: str) -> Fault:
    """Nothing of this account has this id: 404, the same for what is gone and what never was."""
    return Fault("ResourceNotFound", f"No such {kind}: {identifier}", parameter=parameter)


CHECKPOINT = ":ckpt-step-"
"""Behind the id of a job's model, and before a step at which it was measured."""


def model_not_found(model: str) -> Fault:
    """No model answers to this name: 404."""
    text = f"The model `{model}` does not exist or you do not have access to it."
    if CHECKPOINT in model:
        text += " A checkpoint is a step at which its job was measured: ask the model of the job."
    return Fault("ResourceNotFound", text, parameter="model", reason="model_not_found")


class Body(BaseModel):
    """A JSON body. Types are as sent, nothing is guessed; members we do not know are passed over."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


_NOTHING: tuple[Any, ...] = (None, False, "", [], "none", "auto")
"""Values of unsupported members that ask for nothing."""


class StrictBody(Body):
    """A body of which unknown members are refused, as OpenAI does: a misspelt one would change nothing,
    and nobody would see it."""

    model_config = ConfigDict(extra="forbid")
    without_effect: ClassVar[frozenset[str]] = frozenset()
    """OpenAI's members that are taken, and change nothing here."""
    unsupported: ClassVar[Mapping[str, str]] = {}
    """Those that would change what comes back; why they are refused, unless they ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, text in cls.unsupported.items():
            if name in given and given[name] not in _NOTHING:
                raise invalid(f"{text}.", name, "unsupported_parameter")
        unused = cls.without_effect.union(cls.unsupported)
        return {name: value for name, value in given.items() if name not in unused}


Parsed = TypeVar("Parsed", bound=BaseModel)


def body(request: Request, kind: type[Parsed]) -> Parsed:
    """The body of ``request`` as ``kind``.

    Raises:
        Fault: 400, for what is no JSON object and for the first member that is missing or wrong.
    """
    try:
        given = request.json
    except ValueError as error:
        raise invalid(f"The body of the request is not valid JSON: {error}.") from error
    if not isinstance(given, dict):
        raise invalid("The body of the request must be a JSON object.")
    return validate(given, kind)


def validate(given: Mapping[str, Any], kind: type[Parsed], under: str = "") -> Parsed:
    """``given`` as ``kind``; ``under`` is where it stands in the request."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        errors = _errors_of_one_member(error, given)
        where = _format_location([part for part in (under, *errors[0]["loc"]) if part != ""])
        text, code = describe_error(errors, where)
        raise invalid(text, where or None, code) from error


def _errors_of_one_member(error: ValidationError, given: Mapping[str, Any]) -> list[Any]:
    """All errors about the first member that is wrong.

    Of one with alternatives it is the error about its value and not its type, else the innermost.
    """
    found: list[dict[str, Any]] = [
        {**each, "loc": _without_tags(each["loc"], given)}
        for each in error.errors(include_url=False)
    ]
    same = [each for each in found if each["loc"][:1] == found[0]["loc"][:1]]
    value = [
        each for each in same if expected_type(each) is None and each["type"] != "literal_error"
    ]
    places = [_format_location(each["loc"]) for each in same]
    place = _format_location(value[0]["loc"]) if value else max(places, key=len)
    own = [each for each, at in zip(same, places, strict=True) if at == place]
    return value[:1] + [each for each in own if each not in value[:1]]


def _without_tags(location: Sequence[str | int], given: Any) -> tuple[str | int, ...]:
    """``location`` without what pydantic puts behind an object that is chosen by its ``type``."""
    kept: list[str | int] = []
    for place, part in enumerate(location):
        if isinstance(given, Mapping) and given.get("type") == part:
            further = location[place + 1 : place + 2]
            if part not in given or (further and further[0] in given):
                continue
        kept.append(part)
        try:
            given = given[part]
        except (KeyError, IndexError, TypeError):
            given = None
    return tuple(kept)


def _format_location(location: Sequence[str | int]) -> str:
    """``messages[0].content``; names of alternatives that pydantic puts between are left out."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() or not text:
            # The arms of a union are called after types: they are none of the client's members.
            if part in _ARMS or part[:1].isupper():
                continue
            text += f".{part}" if text else part
    return text


_ARMS = {"str", "int", "float", "bool", "list", "dict", "none", "constrained"}


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """``value``, when it is one of ``known``."""
    if value not in known:
        raise invalid(f"'{value}' is not one of {', '.join(known)}.", name, "invalid_value")
    return value


def _metadata(value: dict[str, str] | None) -> dict[str, str] | None:
    if value is not None and len(value) > METADATA_KEYS:
        raise ValueError(f"at most {METADATA_KEYS} keys are taken")
    for key, text in (value or {}).items():
        if len(key) > 64 or len(text) > 512:
            raise ValueError("keys have at most 64 letters, values 512")
    return value


Metadata = Annotated[dict[str, str] | None, AfterValidator(_metadata)]


def text_of(request: Request, name: str) -> str | None:
    """A member of the query; ``None`` where it is not there."""
    values = request.query.get(name)
    return values[-1] if values else None


def number_of(request: Request, name: str, default: int, most: int) -> int:
    """A whole number of the query, from 1 to ``most``."""
    text = text_of(request, name)
    if text is None:
        return default
    number = parse_digits(text)
    if number is None or not 1 <= number <= most:
        raise invalid(f"'{name}' must be a whole number from 1 to {most}.", name, "invalid_value")
    return number


def page_query(request: Request, default: int = 20, most: int = 100) -> tuple[int, str | None]:
    """How many rows the page of a list may have, and the id that it goes on after."""
    return number_of(request, "limit", default, most), text_of(request, "after")


def is_ascending(request: Request, default: Literal["asc", "desc"]) -> bool:
    """Whether a list is asked for with the oldest first."""
    return one_of("order", text_of(request, "order") or default, ("asc", "desc")) == "asc"


def page(found: Sequence[Any], limit: int, shown: Callable[[Any], dict[str, Any]]) -> Response:
    """A list of at most ``limit``, from rows of which one more was asked for."""
    data = [shown(each) for each in found[:limit]]
    return Response.json(
        {
            "object": "list",
            "data": data,
            "has_more": len(found) > limit,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
    )


def seconds(moment: datetime | None) -> int | None:
    """Unix time."""
    return None if moment is None else int(moment.timestamp())


class Recorder:
    """Notes the actions of the OpenAI API for the audit log."""

    def __init__(self, region: str) -> None:
        self._arns = Arns(region)

    def record(self, request: Request, action: str, kind: str = "", identifier: str = "") -> None:
        """Note ``openai.<action>`` on one resource of a ``kind``, or in general."""
        resource = "*"
        if kind:
            account = request.caller.account
            resource = self._arns.openai(account, kind, identifier or "*")
        record_action(f"luthier:openai.{action}", resource)
