"""Refusals as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luthier.api.wire import Answer, Fault

INVALID, SERVER = "invalid_request_error", "server_error"


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
    "ExpiredToken": _Shape(401, INVALID, "expired_token"),
    "AccessDenied": _Shape(403, "permission_error", "permission_denied"),
    "ResourceNotFound": _Shape(404, INVALID, "not_found"),
    "UnknownOperation": _Shape(404, INVALID, "unknown_url"),
    # The client repeats a 409 by itself; what is in use stays so for longer than that.
    "Conflict": _Shape(409, INVALID, "conflict", retry=False),
    "RequestEntityTooLarge": _Shape(413, INVALID, "request_too_large"),
    "RequestTimeout": _Shape(408, INVALID, "request_timeout"),
    "Throttling": _Shape(429, "requests", "rate_limit_exceeded"),
    "ServiceQuotaExceeded": _Shape(429, "insufficient_quota", "insufficient_quota", retry=False),
    "ModelNotReady": _Shape(503, SERVER, "model_not_ready"),
    "ServiceUnavailable": _Shape(503, SERVER, "service_unavailable"),
    "ModelTimeout": _Shape(504, SERVER, "timeout"),
}
_UNEXPECTED = _Shape(500, SERVER, "server_error")
_LATER = (429, 503)


def refusal(fault: Fault, request_id: str) -> Answer:
    """``fault`` as an answer. Details: ``reason`` is OpenAI's code, ``retry_after`` seconds."""
    shape = shape_of(fault)
    headers = {"x-request-id": request_id}
    if shape.status in _LATER and shape.retry is not False:
        headers["Retry-After"] = str(fault.details.get("retry_after", 1))
    if shape.retry is not None:
        headers["x-should-retry"] = str(shape.retry).lower()
    return Answer.of({"error": error_of(fault)}, shape.status, **headers)


def error_of(fault: Fault) -> dict[str, Any]:
    """The inner object of a refusal, as streams and batches hold it too."""
    shape = shape_of(fault)
    return {
        "message": fault.message,
        "type": shape.type,
        "param": fault.parameter,
        "code": fault.details.get("reason", shape.code),
    }


def status_of(fault: Fault) -> int:
    """The status of the refusal."""
    return shape_of(fault).status


def shape_of(fault: Fault) -> _Shape:
    """How ``fault`` is told; an unknown key is an access denied that names no action."""
    if fault.code == "AccessDenied" and fault.details.get("credentials"):
        return _UNKNOWN_KEY
    return _SHAPES.get(fault.code, _UNEXPECTED)


def invalid(message: str, parameter: str | None = None, reason: str | None = None) -> Fault:
    """A request that cannot be carried out: 400."""
    return Fault("Validation", message, parameter=parameter, reason=reason)


def absent(kind: str, identifier: str, parameter: str | None = None) -> Fault:
    """Nothing of this account has this id: 404, the same for what is gone and what never was."""
    return Fault("ResourceNotFound", f"No such {kind}: {identifier}", parameter=parameter)


def model_not_found(model: str) -> Fault:
    """No model answers to this name: 404."""
    text = f"The model `{model}` does not exist or you do not have access to it."
    return Fault("ResourceNotFound", text, parameter="model", reason="model_not_found")
